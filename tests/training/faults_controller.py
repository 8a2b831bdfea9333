"""What `test_controller.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "reorder a group when a module comes back",
        "optim/optimizer_state.py",
        "group.params.insert(place, p)",
        "group.params.append(p)",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "count calls instead of optimizer steps",
        "training/controller.py",
        "if self._counted == self.step:",
        "self._counted = self.step + 1\n        if False:",
    ),
    Fault(
        "sample with the seed of the process instead of the run's",
        "training/controller.py",
        "(self, self._surgeon, self._gates, self._probes, self._held_out)",
        "(self, self._surgeon, self._gates, self._held_out)",
    ),
    Fault(
        "grow with the seed of the process instead of the run's",
        "training/controller.py",
        "(self, self._surgeon, self._gates, self._probes, self._held_out)",
        "(self, self._gates, self._probes, self._held_out)",
    ),
    Fault(
        "let a non-finite score decide",
        "training/controller.py",
        '            if bad := _non_finite(observed):\n                self._skip(f"{bad} is not finite", warn=due)',
        '            if bad := None:\n                self._skip(f"{bad} is not finite", warn=due)',
    ),
]
