"""What `test_gradient_start.py` must notice."""

from fault import Fault

_FILE = "policies/methods/gradient_start.py"
_TEST = "tests/policies/methods/test_gradient_start.py"

FAULTS = [
    Fault("rows as long as they come", _FILE, "(random / along).sqrt()", "(random / random).sqrt()", _TEST),
    Fault(
        "ranks whatever the score",
        _FILE,
        "name: float(score) /",
        "name: 1.0 /",
        _TEST,
    ),
    Fault("look at once, with a head that knows nothing", _FILE, "if trains_more else 0", "if False else 0", _TEST),
    Fault(
        "never thaw what waited",
        _FILE,
        "(Train(True), *plan.ops.get(name, ()))",
        "tuple(plan.ops.get(name, ()))",
        _TEST,
    ),
    Fault(
        "let a frozen adapter train after a pass without it",
        "training/phases.py",
        "p.requires_grad_(False)\n                    p.grad = None",
        "pass",
        _TEST,
    ),
]
