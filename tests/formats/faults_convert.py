"""What `test_convert.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "fold no scale into what has no alpha",
        "formats/convert.py",
        'gain = 1.0 if self.kind == "peft" else entry.slot.scaling',
        "gain = 1.0",
    ),
    Fault(
        "take the first way to read a kohya name",
        "formats/single_file/names.py",
        "if len(ways[-1]) != 1:",
        "if not ways[-1]:",
    ),
]
