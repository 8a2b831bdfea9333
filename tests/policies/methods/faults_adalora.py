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
    Fault(
        "elalora: move as many directions at every event",
        "policies/methods/elalora.py",
        "(events.stop - begin)) ** 3))",
        "(events.stop - begin)) ** 99))",
        "-k released_rule",
    ),
    Fault(
        "elalora: let all directions of a module say that it grows",
        "policies/methods/elalora.py",
        "order[: min(self.candidates, len(order) - 1)]",
        "order[: len(order) - 1]",
        "-k released_rule",
    ),
    Fault(
        "pull the lengths of directions to 1, which hold the size of DeltaW",
        "policies/_sensitivity.py",
        "return overlap_term(self.orth)",
        "return __import__('rankflow.linalg.decompose', fromlist=['x']).orthogonality_term(self.orth)",
        "-k penalty",
    ),
]
