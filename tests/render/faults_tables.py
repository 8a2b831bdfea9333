"""What `test_tables.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let numbers take the place of names on a narrow terminal",
        "render/table.py",
        "kept.remove(i)",
        "pass",
    ),
    Fault(
        "shorten names to what they end with",
        "plans/names.py",
        "(len(head) <= len(tail) or len(words[-1]) > room)",
        "(not head or len(words[-1]) > room)",
    ),
]
