"""What `test_shipped.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "forget what scaling a module left with",
        "training/controller.py",
        "self._adapter.sites[name].recall(transaction, slot.scaling)",
        "pass",
        "-k adalora",
    ),
    Fault(
        "go on under any policy",
        "training/state.py",
        "if own == saved:",
        "if own:",
        "-k another",
    ),
]
