"""What `test_ledger.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "ignore a restore in the ledger",
        "training/ledger.py",
        'return events[: event["events"]]',
        "return events",
    ),
]
