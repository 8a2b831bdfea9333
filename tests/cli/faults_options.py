"""What `test_options.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "list every option under the panel of its dataclass",
        "cli/options.py",
        "rich_help_panel=option.panel or getattr",
        "rich_help_panel=getattr",
    ),
    Fault(
        "hand on what was typed where it has to be read first",
        "cli/options.py",
        "        if option.read is None:\n",
        "        if True:\n",
    ),
]
