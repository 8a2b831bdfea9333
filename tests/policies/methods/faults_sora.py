"""What `test_sora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "shrink gates by a threshold that ignores the learning rate",
        "policies/methods/sora.py",
        'xi *= lr if self.threshold == "lr_scaled" else 1.0',
        "pass",
    ),
    Fault(
        "prune the directions of greatest score",
        "plans/shrink.py",
        "not wanted[i], -values[i], i))",
        "not wanted[i], values[i], i))",
    ),
    Fault(
        "lost: decide over gates as they were before the phase",
        "gating/gates.py",
        "            for name in names\n        }",
        "            for name in (names if self else ())\n        }",
    ),
]
