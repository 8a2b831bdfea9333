"""What `test_compile.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take layers that are compiled one by one for one",
        "observe/compile.py",
        "if 1 + compiled * decisions > (limit := recompile_limit()):",
        "if 1 + decisions > (limit := recompile_limit()):",
    ),
    Fault(
        "warn of decisions to come although ranks come back to buckets",
        "training/phases.py",
        'if self.lifecycle.mode == "mask" or all(slot.buckets for slot in self.layout.values()):',
        'if self.lifecycle.mode == "mask":',
    ),
    Fault(
        "see only the layers that were compiled in place",
        "observe/compile.py",
        "m._compiled_call_impl is not None or isinstance(m, wrapper)",
        "m._compiled_call_impl is not None",
    ),
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
