"""What `test_adalora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "measure uncertainty against the old average",
        "policies/_sensitivity.py",
        "    return i, beta2 * u + (1 - beta2) * abs(s - i)",
        "    return i, beta2 * u + (1 - beta2) * abs(s - (i - (1 - beta1) * s) / beta1)",
        "tests/policies/methods/test_increlora.py",
    ),
]
