"""What `test_peft_inits.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "resize adapters that have changed their base",
        "surgery/surgeon.py",
        "        if any(not isinstance(op, Train) for ops in plan.ops.values() for op in ops):\n"
        "            self.adapter.refuse_resizing()\n",
        "",
        "-k door",
    ),
    Fault(
        "know one spelling of an init only",
        "plans/peft_inits.py",
        "init.lower().startswith(_CHANGING_BASE)",
        "init in _CHANGING_BASE",
        "-k door",
    ),
    Fault(
        "leave orthogonal in the config of a resized adapter",
        "lora/adapter.py",
        'transaction.attr(self.config, "init_lora_weights", init)',
        "pass",
        "-k orthogonal",
    ),
    Fault(
        "restore an adapter onto another base",
        "training/checkpoint.py",
        "if started != init and (changes_base(started) or changes_base(init)):",
        "if False:",
        "-k restoring",
    ),
]
