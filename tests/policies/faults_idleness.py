"""What `test_idleness.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "start a run in which nothing can change without a word",
        "training/controller.py",
        "[*idle_phases(layout, phases), *late_phases(phases, total_steps)] if self._processes.leads",
        "[] if self._processes.leads",
    ),
    Fault(
        "take a bound that ranks may fall below for a budget that is met",
        "policies/methods/sora.py",
        "    meets_budget: ClassVar[bool] = False\n",
        "",
    ),
    Fault(
        "sora: forget that gates have gradients",
        "policies/methods/sora.py",
        "if taken + way >= 1:",
        "if taken >= 1:",
        "-k phases",
    ),
]
