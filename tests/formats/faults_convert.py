"""What `test_convert.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "fold no scale into what has no alpha",
        "formats/single_file/base.py",
        ", gain=entry.slot.scaling",
        "",
    ),
    Fault(
        "take the first way to read a kohya name",
        "formats/single_file/kohya.py",
        "if len(ways[-1]) != 1:",
        "if not ways[-1]:",
    ),
]
