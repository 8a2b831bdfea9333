"""Fields of dataclasses that are options of the command line too: name, type, default and help are said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """What the command line has to know about a field beside its name, type and default.

    help: one line for `--help`. metavar: what stands for the value there. panel: the heading it is listed under; its
    dataclass's `panel` if left out.
    name: of the option, where it is not the field's, without dashes.
    type: of the value on the command line, where the field's own is not bool, int, float or str.
    read: makes fields of such a value, a file's name say: field -> value. A ValueError of it is shown to the user.
    """

    help: str
    metavar: str | None = None
    panel: str | None = None
    name: str | None = None
    type: type | None = None
    read: Callable[[Any], Mapping[str, Any]] | None = None


def option(default: Any, help: str, **about: Any) -> Any:
    """Return a dataclass field with this default, which is an option of every command that takes the dataclass."""
    return field(default=default, metadata={"option": Option(help, **about)})


def options_of(kind: type) -> dict[str, Option]:
    """Return field -> option, of those fields of a dataclass that are options."""
    return {f.name: f.metadata["option"] for f in fields(kind) if "option" in f.metadata}
