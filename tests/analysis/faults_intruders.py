"""What `test_intruders.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take as an intruder what a vector far from W0's first is like",
        "analysis/intruders.py",
        "steps, look = min(_STEPS, len(W) + 1), 8",
        "steps, look = min(_STEPS, 3), 8",
    ),
    Fault(
        "count as an intruder only what no two neighbouring vectors are like",
        "analysis/intruders.py",
        "certain = known >= limit or bound < limit",
        "certain = bound >= limit or bound < limit; guess = bound",
    ),
    Fault(
        "look for intruders in the part of a direction that W0 does not reach",
        "analysis/intruders.py",
        "limit = (epsilon / float(size[column])) ** 2 if size[column] > 0 else math.inf",
        "limit = epsilon**2",
    ),
    Fault(
        "leave out the scale of DeltaW before intruders are looked for",
        "analysis/intruders.py",
        "for t in (W0, A, scaling * B))",
        "for t in (W0, A, B))",
    ),
    Fault(
        "read transformers' Conv1D as a linear when intruders are looked for",
        "analysis/base_comparison.py",
        "W0.mT if turned and W0.ndim == 2 else W0",
        "W0.mT if W0.shape != shape else W0",
    ),
]
