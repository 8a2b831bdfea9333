"""What `test_families.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "list no file but the first",
        "optim/handlers/__init__.py",
        "return [file.name for file in pkgutil.iter_modules(__path__)]",
        "return [file.name for file in pkgutil.iter_modules(__path__[:1])]",
    ),
    Fault(
        "ask packages last",
        "optim/handlers/__init__.py",
        "chain(named, added, anybodys)",
        "chain(named, anybodys, added)",
    ),
]
