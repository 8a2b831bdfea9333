"""What `test_base_names.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take CLIP's old names for ones that PEFT finds",
        "serving/base_names.py",
        "if not isinstance(t, PrefixChange)]",
        "if t is not None]",
    ),
    Fault(
        "name modules that a checkpoint calls otherwise",
        "serving/base_names.py",
        "return theirs == any(",
        "return theirs or any(",
    ),
]
