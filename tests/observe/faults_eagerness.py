"""What `test_eagerness.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let the first listener that leaves speak for all",
        "observe/compile.py",
        "_listeners.discard(listener)",
        "_listeners.clear()",
    ),
    Fault(
        "keep compiled code eager for one that failed on its way to listening",
        "observe/compile.py",
        "weakref.finalize(listener, _leave, id(listener))",
        "(lambda who: lambda: _leave(who))(id(listener))",
    ),
]
