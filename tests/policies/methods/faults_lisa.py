"""What `test_lisa.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave what a phase froze to the next",
        "training/controller.py",
        "        if self.step + 1 >= self.phase.end:\n            self._operations.thaw(self._now)",
        "        pass",
    ),
    Fault(
        "forget at a resume who was frozen",
        "training/controller.py",
        'self._operations.freeze(set(state.get("frozen", ())), self._now)',
        "pass",
    ),
    Fault(
        "draw the same layers at every event",
        "policies/methods/lisa.py",
        'keyed_generator(self.seed, "lisa", step)',
        'keyed_generator(self.seed, "lisa")',
    ),
]
