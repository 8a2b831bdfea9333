"""What `test_run.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "draw the losses of the first checkpoint",
        "analysis/run.py",
        "*reversed(checkpoints)",
        "*checkpoints",
    ),
    Fault(
        "look for a ledger above folders that hold no adapter",
        "analysis/run.py",
        'if not found and (run / "adapter_config.json").exists():',
        "if not found:",
    ),
]
