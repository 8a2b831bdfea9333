"""What `test_adapter.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "skip alpha",
        "plans/peft_patterns.py",
        "        alpha,\n        {anchored(name): rank",
        "        8,\n        {anchored(name): rank",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "leave patterns unanchored",
        "plans/peft_patterns.py",
        'return "^" + re.escape(name)',
        "return re.escape(name)",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "write the ranks of one adapter into the config of another",
        "lora/discover.py",
        "if any(other is config for key, other in configs.items() if key != name):",
        "if False:",
        "-k one_config",
    ),
]
