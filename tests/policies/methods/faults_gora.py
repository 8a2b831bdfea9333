"""What `test_gora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take the absolute value of gradients before their mean",
        "observe/hooks.py",
        "self._add(Signal.WEIGHT_SCORE, contract(g[rows]) / self.site.scaling)",
        "self._add(Signal.WEIGHT_SCORE, (contract(g[rows]) / self.site.scaling).abs())",
        "tests/observe/test_probes.py",
    ),
    Fault(
        "round ranks down instead of to the nearest",
        "plans/allocate.py",
        "budget.cost(slot) / (i + 0.5)",
        "budget.cost(slot) / (i + 1)",
        "tests/policies/methods/test_colora.py",
    ),
    Fault(
        "start a trained adapter anew",
        "policies/_initial.py",
        "if bool(record[Signal.A].any()) and bool(record[Signal.B].any()):",
        "if False:",
        "tests/policies/methods/test_eva.py",
    ),
]
