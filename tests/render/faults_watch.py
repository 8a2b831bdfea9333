"""What `test_watch.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "watch a run by the decision that was last, not by the next",
        "analysis/run.py",
        """// decides["every"] + 1)""",
        """// decides["every"])""",
        "-k pace",
    ),
    Fault(
        "count the time a decision takes as that of steps",
        "analysis/run.py",
        "first = next(e for e in events if",
        "first = next(e for e in reversed(events) if",
        "-k pace",
    ),
    Fault(
        "make the time of a ledger's line part of its event",
        "training/ledger.py",
        "        if not times:\n            event.pop",
        "        if False:\n            event.pop",
        "-k line_is",
    ),
]
