"""What `test_collect.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let energies in different metrics compete for one budget",
        "policies/metrics.py",
        "set(ranks) if lacking and shared else set(lacking)",
        "set(lacking)",
        "tests/policies/methods/test_squeeze.py",
    ),
    Fault(
        "trust a module of which one direction was measured enough",
        "policies/metrics.py",
        "measured[Signal.MEASURED].min()) >= rank",
        "measured[Signal.MEASURED].max()) >= rank",
    ),
    Fault(
        "squeeze by the statistics of other factors",
        "calibration/statistics.py",
        "if self.digests[name] != digest(A, B):",
        "if name not in self.digests:",
    ),
    Fault(
        "let earlier batches fade",
        "calibration/collect.py",
        "AVERAGED, decay=1.0)",
        "AVERAGED, decay=0.9)",
    ),
    Fault(
        "take averages that are none from a file",
        "calibration/statistics.py",
        "> _ROUNDING * size or _least(S) < -_ROUNDING * size * rank:",
        "> _ROUNDING * size:",
    ),
    Fault(
        "forget scalings when weight errors are added up",
        "compress/report.py",
        "(abs(slot.scaling) * norm for norm",
        "(norm for norm",
    ),
    Fault(
        "call the error in the metric that of the weights",
        "compress/report.py",
        'if metrics[name] != "weights":\n            changed',
        'if metrics[name] == "none":\n            changed',
    ),
    Fault(
        "learn from padding",
        "calibration/texts.py",
        """batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)""",
        """batch["input_ids"]""",
    ),
]
