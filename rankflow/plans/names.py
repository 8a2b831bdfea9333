"""Names as people read them: modules by type and layer, and strings of strangers without what acts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def shown(text: object, *, lines: bool = False, most: int | None = None) -> str:
    """Return a string from a file, or a file's name, in a form that is safe to show. Characters that move the cursor,
    colour, turn the direction of writing, hide or break the line become escapes. Of more than `most` characters, both
    ends are shown.

    Args:
        lines: it has several, as our own texts do.
    """
    text = str(text)
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    if lines:
        return "\n".join(shown(line) for line in text.split("\n"))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """A name of at most `most` characters: of a longer one as many of the first and of the last words as there is room
    for, half of it for each. The first ones name the block of a model, the last ones the projection."""
    if len(text) <= most:
        return text
    words = re.split(r"(?<=[._ ])", text)  # each with what parts it from the next
    head, tail = "", words.pop()[-(most - 1) :]
    while words:
        room = most - 1 - len(head) - len(tail)
        if len(words[0]) <= room and (len(head) <= len(tail) or len(words[-1]) > room):
            head += words.pop(0)
        elif len(words[-1]) <= room:
            tail = words.pop() + tail
        else:
            break
    return f"{head}…{tail}"


@dataclass(frozen=True)
class Row:
    """A module's place in a table or picture: modules of one type together, in order of their layers."""

    name: str
    type: str  # the name without layer numbers and without what all names begin with
    layer: str  # the layer numbers, dotted; empty where there are none

    @property
    def label(self) -> str:
        """The type as a heading, from its first word on."""
        return self.type.lstrip("*._")

    @property
    def block(self) -> str:
        """What the type begins with, up to its first number: the block of a model, such as `unet.down_blocks`."""
        return self.label.partition("*")[0].strip("._")

    @property
    def short(self) -> str:
        """The label of the type, followed by the numbers of the layers."""
        numbers = self.layer.split(".") if self.layer else []
        return " ".join([self.label, *numbers])


def arrange(names: Iterable[str]) -> list[Row]:
    """Rows by type, in order of first appearance, and by layer within."""
    names = list(names)
    dot = "." if any("." in name for name in names) else "_"  # which kohya's names have in the places of dots
    types = {name: dot.join("*" if part.isdecimal() else part for part in name.split(dot)) for name in names}
    shared = _shared_prefix([t.split(dot) for t in types.values()])
    order = {t: i for i, t in enumerate(dict.fromkeys(types.values()))}

    def layers(name: str) -> list[int]:
        return [int(part) for part in name.split(dot) if part.isdecimal()]

    return [
        Row(name, dot.join(types[name].split(dot)[shared:]), ".".join(map(str, layers(name))))
        for name in sorted(names, key=lambda n: (order[types[n]], layers(n)))
    ]


def by_type(names: Iterable[str]) -> dict[str, list[Row]]:
    """Rows of each type, in the order of `arrange`."""
    found: dict[str, list[Row]] = {}
    for row in arrange(names):
        found.setdefault(row.type, []).append(row)
    return found


def _shared_prefix(paths: Sequence[Sequence[str]]) -> int:
    """Return how many leading parts all paths have in common. The last part of a path is never counted."""
    shortest = min(map(len, paths), default=1) - 1
    return next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)


def layer_of(name: str) -> str:
    """The layer that a module belongs to: its name up to the last part that is a number; its own name without one."""
    parts = name.split(".")
    return ".".join(parts[: max((i for i, part in enumerate(parts, 1) if part.isdecimal()), default=len(parts))])


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which layers.2 comes before layers.10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]
