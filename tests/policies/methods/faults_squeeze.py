"""What `test_squeeze.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "trust averages of no token",
        "policies/metrics.py",
        "float(measured[Signal.MEASURED].min()) >= rank",
        "True",
    ),
    Fault(
        "forget the growth that a cut asks for",
        "plans/shrink.py",
        ", *([Grow(cut.fresh)] if cut.fresh else [])]",
        "]",
        "tests/surgery/test_surgeon.py",
    ),
]
