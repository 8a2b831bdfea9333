"""What `test_whole_checkpoints.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave rank state out of what the Trainer saves",
        "training/trainer_patches.py",
        "for callback in list(callbacks):",
        "for callback in ():",
    ),
    Fault(
        "resume from whatever is newest",
        "training/trainer_patches.py",
        "        if problem is None:\n            for passed",
        "        if True:\n            for passed",
    ),
    Fault(
        "take a checkpoint that is written over for a whole one",
        "training/trainer_patches.py",
        ".unlink(missing_ok=True)\n        return save",
        "\n        return save",
    ),
    Fault(
        "load what is not finite",
        "training/checkpoint.py",
        'return None if saved.isfinite().all() else "has NaN or infinite values"',
        "return None",
    ),
    Fault(
        "leave ranks those of what could not be loaded",
        "training/checkpoint.py",
        "layout = match_layout(model, folder, adapter_name, transaction)",
        "layout = match_layout(model, folder, adapter_name)",
    ),
]
