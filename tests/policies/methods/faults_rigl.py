"""What `test_rigl.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "drop the strongest directions",
        "policies/methods/rigl.py",
        "heapq.nsmallest(",
        "heapq.nlargest(",
    ),
    Fault(
        "compare directions without their scaling",
        "policies/methods/rigl.py",
        "obs[name][Signal.B], slot.scaling)",
        "obs[name][Signal.B], 1.0)",
    ),
    Fault(
        "grow anew what was dropped and wins again",
        "policies/methods/rigl.py",
        "candidates = [*_again(obs[name], dropped[name]), *candidates]",
        "candidates = [*((s, None) for s, _ in _again(obs[name], dropped[name])), *candidates]",
    ),
]
