"""What `test_colora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take absolute values at every point of a path",
        "observe/study.py",
        "                passes += 1\n            probes.end_batch()",
        "                passes += 1\n                probes.end_batch()",
    ),
    Fault(
        "score every point of a path at the adapter's own scaling",
        "observe/hooks.py",
        "gradients = [_working(g) / scaling for g, _, scaling in passes]",
        "gradients = [_working(g) / self.site.scaling for g, _, _ in passes]",
    ),
    Fault(
        "start a path half a step from the adapter",
        "policies/methods/colora.py",
        "1 - k / self.points",
        "1 - (k + 0.5) / self.points",
    ),
    Fault(
        "share ranks out whatever the size of a module",
        "policies/methods/colora.py",
        "(c / top) ** self.beta * full[name] if",
        "(c / top) ** self.beta if",
    ),
    Fault(
        "give a module more parameters than its weights",
        "plans/allocate.py",
        "quotient * _LATER",
        "quotient",
    ),
]
