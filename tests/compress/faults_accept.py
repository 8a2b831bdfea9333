"""What `test_accept.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "accept what a gate refused with a status above 0",
        "compress/accept.py",
        "check=False).returncode == 0",
        "check=False).returncode >= 0",
    ),
    Fault(
        "step over a rank in bisection",
        "compress/accept.py",
        "ranks, True, hi=len(ranks) - 1",
        "ranks, True, 1, len(ranks) - 1",
    ),
    Fault(
        "not see that a larger rank failed",
        "compress/accept.py",
        "if failed <= passed:",
        "if failed >= passed:",
    ),
    Fault(
        "decompose anew for every candidate",
        "compress/cutting.py",
        "self.spectra.get(name) or self._spectrum(name, a, b)",
        "self._spectrum(name, a, b)",
    ),
]
