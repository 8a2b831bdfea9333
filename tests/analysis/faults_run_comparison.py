"""What `test_run_comparison.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave the margin out of the ledger",
        "plans/plan.py",
        '"margin": self.margin,',
        '"margin": None,',
    ),
    Fault(
        "take last digits for other decisions",
        "analysis/run_comparison.py",
        "for k, v in op.items() if k not in _NUMBERS}",
        "for k, v in op.items()}",
    ),
    Fault(
        "look at ranks alone, not at which directions stay",
        "analysis/run_comparison.py",
        'ops = (event.get("plan") or {}).get("ops", {})',
        'ops = event.get("ranks", {}) and {}',
    ),
    Fault(
        "miss what a run that has not finished has yet to do",
        "analysis/run_comparison.py",
        'return math.inf if events[-1]["event"] == "finish" else int(events[-1]["step"])',
        "return math.inf",
    ),
]
