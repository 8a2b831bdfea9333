"""What `test_engine_files.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "forget the engines of installed packages",
        "serving/engines/__init__.py",
        "if name not in _ADDED.names():",
        "if True:",
    ),
    Fault(
        "go by an engine's fields alone",
        "serving/check.py",
        "*engine.rank_problems(adapter)",
        "*Engine.rank_problems(engine, adapter)",
    ),
]
