"""What `test_peft_patches.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "put a patch on over itself",
        "lora/peft_patches.py",
        'if getattr(method, "_rankflow_patch", None) is self:',
        "if False:",
    ),
]
