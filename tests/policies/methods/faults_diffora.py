"""What `test_diffora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let the least modules stay",
        "policies/methods/diffora.py",
        "key=lambda i: (-means[i], i))",
        "key=lambda i: (means[i], i))",
    ),
]
