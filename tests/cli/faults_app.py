"""What `test_app.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "read a PEFT folder as PEFT where another format was given",
        "formats/open.py",
        "if kind is not None and not inside and",
        "if False and not inside and",
        "-k peft_folder",
    ),
    Fault(
        "ignore what goes with an adapter where a policy is checked",
        "cli/policies.py",
        "if of_adapters and is_policy:",
        "if False:",
        "-k would_ignore",
    ),
    Fault(
        "let headings make columns wide",
        "render/table.py",
        '"\\n".join(wrap(name, _HEADING, break_long_words=False))',
        "name",
        "-k heading",
    ),
]
