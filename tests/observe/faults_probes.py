"""What `test_probes.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "score with absolute gradients",
        "observe/hooks.py",
        "self._add(Signal.DELTA_SCORE, delta_score(A, B, g, contract) / norm)",
        "self._add(Signal.DELTA_SCORE, delta_score(A, B, g.abs(), contract) / norm)",
    ),
    Fault(
        "read a Conv1D's weight as a Linear's",
        "lora/base_weight.py",
        'turned = site.kind == "embedding" or getattr(site.layer, "fan_in_fan_out", False)',
        'turned = site.kind == "embedding"',
    ),
    Fault(
        "count hidden tokens as inputs",
        "observe/hooks.py",
        "seen = None if mask is None or mask.shape != x.shape[:-1] else mask.to(x.device).flatten()",
        "seen = None",
        "tests/policies/methods/test_eva.py",
    ),
]
