"""What `test_deprecation.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "lose what was given by an old name",
        "deprecation.py",
        "kwargs[new] = kwargs.pop(old)",
        "kwargs.pop(old)",
    ),
]
