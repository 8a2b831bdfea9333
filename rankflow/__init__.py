"""rankflow: the rank of LoRA adapters, managed instead of guessed.

What is public stands in `__init__.pyi`, and nowhere else. A name is loaded when it is first used: torch and
transformers take seconds, and `rankflow --help` should not.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from typing import Any

from rankflow._version import __version__ as __version__

_STUB = pkgutil.get_data(__name__, "__init__.pyi")
assert _STUB is not None, "it lies beside this file"
_HOME = {
    alias.name: node.module
    for node in ast.parse(_STUB).body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
    if not alias.name.startswith("_")
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
