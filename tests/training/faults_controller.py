"""What `test_controller.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "reorder a group when a module comes back",
        "optim/param_groups.py",
        "group.params.insert(place, p)",
        "group.params.append(p)",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "count calls instead of optimizer steps",
        "training/controller.py",
        "if self._phases.counted == self.step:",
        "self._phases.counted = self.step + 1\n        if False:",
    ),
    Fault(
        "sample with the seed of the process instead of the run's",
        "training/state.py",
        "(phases, phases.surgeon, phases.gates, phases.probes, phases.data.held_out)",
        "(phases, phases.surgeon, phases.gates, phases.data.held_out)",
    ),
    Fault(
        "grow with the seed of the process instead of the run's",
        "training/state.py",
        "(phases, phases.surgeon, phases.gates, phases.probes, phases.data.held_out)",
        "(phases, phases.gates, phases.probes, phases.data.held_out)",
    ),
    Fault(
        "let a non-finite score decide",
        "policies/base.py",
        "        bad = obs.non_finite()\n",
        "        bad = None\n",
    ),
]
