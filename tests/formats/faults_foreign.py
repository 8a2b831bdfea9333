"""What `test_foreign.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take an index at its word",
        "formats/peft/adapter.py",
        "if missing := index.keys() - raw.keys():",
        "if missing := index.keys() - index.keys():",
    ),
    Fault(
        "take empty tensors for damage of another kind",
        "formats/peft/adapter.py",
        "refuse_empty(self._tensors, self.weights)",
        "pass",
    ),
]
