"""What `test_sharing.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "train one copy of shared factors on its own gradient",
        "training/gradients.py",
        "        for p in copies:",
        "        for p in copies[1:]:",
    ),
    Fault(
        "start shared factors from rows of each module's own",
        "surgery/surgeon.py",
        "target[name].shared or name",
        "name",
    ),
    Fault(
        "let shared factors keep the optimizer state of their modules",
        "surgery/surgeon.py",
        "if any(isinstance(op, Share) and op.group for op in ops)",
        "if False",
    ),
]
