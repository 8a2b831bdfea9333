"""What `test_recompiles.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "say nothing of compiled code until its versions run out",
        "observe/compile.py",
        "if soon + new * decisions > limit():",
        "if soon > limit():",
    ),
    Fault(
        "warn of decisions to come although ranks come back to buckets",
        "training/controller.py",
        'if self.lifecycle.mode == "mask" or all(slot.buckets for slot in self.layout.values()):',
        'if self.lifecycle.mode == "mask":',
    ),
    Fault(
        "take versions made for other models for this one's",
        "observe/compile.py",
        "compiled = compiled or have > before",
        "compiled = compiled or have > 0",
    ),
    Fault(
        "count shapes that come back as new ones",
        "observe/compile.py",
        "self._met[id(code)] = met | shapes",
        "self._met[id(code)] = shapes",
    ),
]
