"""What `test_load.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "stop at a policy that there is not",
        "config/load.py",
        "    if any(new is not old for new, old in zip(meant, written, strict=True)):\n",
        "    if False:\n",
    ),
]
