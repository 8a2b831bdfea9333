"""What `test_trainer.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "resume without reshaping",
        "training/trainer_patches.py",
        "            match_layout(model, folder, adapter_name, transaction)",
        "            pass",
    ),
    Fault(
        "believe in checkpoints above the budget",
        "training/trainer.py",
        "            state.best_metric = None",
        "            pass",
    ),
]
