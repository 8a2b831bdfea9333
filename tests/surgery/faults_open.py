"""What `test_open.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "open a gate and let the function jump",
        "surgery/staging.py",
        "(self.B.index_select(-1, at) * scale).to(self.B.dtype)",
        "self.B.index_select(-1, at)",
    ),
    Fault(
        "expect of a direction behind a gate the gradients of an open one",
        "optim/moments.py",
        "guess(t) * gate**2",
        "guess(t)",
    ),
]
