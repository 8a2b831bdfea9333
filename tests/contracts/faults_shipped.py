"""What `test_shipped.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "forget what scaling a module left with",
        "training/state.py",
        "site_edits.recall(phases.adapter.sites[name], transaction, slot.scaling)",
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
