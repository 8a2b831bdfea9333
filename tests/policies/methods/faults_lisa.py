"""What `test_lisa.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave what a phase froze to the next",
        "training/controller.py",
        "        if phases.step + 1 >= phases.phase.end:\n            phases.operations.thaw(phases.now)",
        "        pass",
    ),
    Fault(
        "forget at a resume who was frozen",
        "training/state.py",
        'phases.operations.freeze(set(state.get("frozen", ())), phases.now)',
        "pass",
    ),
    Fault(
        "draw the same layers at every event",
        "policies/methods/lisa.py",
        'keyed_generator(self.seed, "lisa", step)',
        'keyed_generator(self.seed, "lisa")',
    ),
]
