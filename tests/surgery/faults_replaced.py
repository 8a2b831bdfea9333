"""What `test_replaced.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take any shared variable for a function's",
        "surgery/holders.py",
        "(function := _closed_over_by(holder)) is not None",
        "(function := _closed_over_by(holder) or _known)",
        "-k used_again",
    ),
    Fault(
        "warn of hooks that were put on again",
        "surgery/holders.py",
        " and not _has_hooks(p)",
        "",
        "-k hooks",
    ),
    Fault(
        "tell callbacks nothing of a resize that is undone",
        "surgery/listeners.py",
        "        transaction.undo(told.rollback)\n",
        "",
    ),
    Fault(
        "warn of old parameters that only a cycle holds",
        "surgery/holders.py",
        "        gc.collect()",
        "        pass",
    ),
]
