"""What `test_ledger.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "ignore a restore in the ledger",
        "training/ledger.py",
        'return events[: event["events"]]',
        "return events",
    ),
    Fault(
        "lost: keep a line that was not synced",
        "training/ledger.py",
        "    except BaseException:\n        if path.is_file():  # not a pipe",
        "    except OSError:\n        if path.is_file():  # not a pipe",
        "-k not_synced",
    ),
]
