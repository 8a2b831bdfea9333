"""What `test_names.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave wrappers in names that are inside",
        "formats/wrappers.py",
        'return _INSIDE.sub("", name)',
        "return name",
    ),
    Fault(
        "take every module called module for a wrapper",
        "formats/wrappers.py",
        "if all(_IN_FRONT.match(new[n]) for n in members) for n in members]",
        "for n in members if _IN_FRONT.match(new[n])]",
    ),
]
