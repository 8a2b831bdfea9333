"""Formats that other packages and scripts add, by entry points of the group `rankflow.formats` or by `register_format`.

Each is a subclass of `SingleFile`, under its `kind`, or a `Form` that equals a LoRA, under its PEFT type in lower case.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from rankflow.errors import ConfigError
from rankflow.plugins import Plugins


def register_format(found: Any) -> None:
    """Add a format for as long as this process lives.

    Raises:
        ConfigError: its name is taken, or it is neither a subclass of `SingleFile` nor a `Form`.
    """
    name = getattr(found, "kind", "") or getattr(found, "peft_type", "").lower()
    ADDED.register(name, found)


def loadable() -> Iterator[Any]:
    """Every format that was added. One that cannot be imported is left out with a warning, as it is in nobody's way."""
    return (found for name in ADDED.names() if (found := _loaded(name)) is not None)


def _loaded(name: str) -> Any:
    try:
        return ADDED.load(name)
    except ConfigError as e:
        warnings.warn(str(e), stacklevel=3)
        return None


def _shipped() -> list[str]:
    from rankflow.formats.as_lora.registry import known_types
    from rankflow.formats.single_file.registry import shipped

    return ["peft", "gguf", "full", *shipped(), *(kind.lower() for kind in known_types())]


def _check_added(name: str, found: Any) -> None:
    from rankflow.formats.as_lora.parts import Form
    from rankflow.formats.single_file.base import SingleFile

    kind = found.kind if isinstance(found, type) and issubclass(found, SingleFile) else None
    if name != (found.peft_type.lower() if isinstance(found, Form) else kind):
        raise ConfigError(f"this must be a SingleFile whose kind is {name}, or a Form whose peft_type is that")


ADDED = Plugins("rankflow.formats", _shipped, _check_added)
