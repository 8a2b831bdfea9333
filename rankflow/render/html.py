"""A report as one HTML file that opens from disk: pictures and script inside, nothing fetched, every name escaped."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from rankflow.errors import ConfigError
from rankflow.formats.io.atomic import atomic_file, is_plain
from rankflow.formats.io.outputs import Reads, check_output
from rankflow.plans.names import shown
from rankflow.render.figure import DARK, LIGHT, Paper, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENDS = (".html", ".htm")


@dataclass(frozen=True)
class Column:
    """A column of numbers, or of text; `means` is shown over its heading."""

    name: str
    means: str = ""
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """What is shown, and the `value` that its column is sorted by; beside it a bar of length `share`, or a curve."""

    text: str
    value: str | float = ""
    title: str = ""
    long: bool = False
    share: float | None = None
    curve: str = ""
    line: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Picture:
    """PNGs, base64, for either paper, and what they say to who does not see them."""

    light: str
    dark: str
    says: str

    @classmethod
    def of(cls, draw: Callable[[Paper], Figure], says: str) -> Picture:
        light, dark = (base64.b64encode(png(draw(paper))).decode() for paper in (LIGHT, DARK))
        return cls(light, dark, says)


@dataclass(frozen=True)
class Section:
    title: str
    about: str = ""
    picture: Picture | None = None
    columns: Sequence[Column] = ()
    rows: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True)
class Fact:
    name: str
    value: str


@dataclass(frozen=True)
class Page:
    title: str
    about: str
    facts: Sequence[Fact]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    footer: str = ""


def check_page_file(path: Path, reads: Reads | None = None, *, force: bool = False) -> None:
    """
    Raises:
        ConfigError: a page cannot be written there.
    """
    if path.suffix.lower() not in _ENDS and not is_plain(path):
        raise ConfigError(f"{path}: a report is an .html file; give it such a name")
    check_output(path, reads, force=force, parents=False)


def write_page(page: Page, path: Path, *, force: bool = False) -> Path:
    """Write it, whole or not at all.

    Raises:
        ConfigError: see `check_page_file`.
    """
    check_page_file(path, force=force)
    with atomic_file(path) as partial:
        partial.write_text(render(page), encoding="utf-8", errors="replace")
    return path


def render(page: Page) -> str:
    from jinja2 import BaseLoader, Environment, StrictUndefined
    from markupsafe import Markup

    def part(name: str) -> str:
        return (files("rankflow.render") / "pages" / name).read_text(encoding="utf-8")

    script = part("page.js")
    digest = hashlib.sha256(f"\n{script}".encode()).digest()
    environment = Environment(loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, finalize=_shown)
    return environment.from_string(part("page.html")).render(
        page=page,
        style=Markup(part("page.css")),  # our own files, which nothing that was read gets into
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
    )


def _shown(value: object) -> object:
    """Strings without what acts, which is more than HTML knows to escape; markup is our own."""
    return shown(value, lines=True) if isinstance(value, str) and not hasattr(value, "__html__") else value


# -- cells ----------------------------------------------------------------------------------------------------------


def word(text: str, title: str = "", *, long: bool = False) -> Cell:
    return Cell(text, value=text, title=title, long=long)


def number(value: float | None, shown: str = "{:,}") -> Cell:
    """Nothing for None, which sorts last."""
    return Cell("" if value is None else shown.format(value), value="" if value is None else value)


def share(value: float) -> Cell:
    return Cell(f"{value:.1%}", value=value, share=min(1.0, max(0.0, value)))


def curve(sigma: Sequence[float], top: float, line: float | None = None, *, decades: float = 3.0) -> Cell:
    """Singular values as steps of their logarithm, the highest at `top`; a line at one more value."""

    def height(value: float) -> float:
        return 20 * max(0.0, min(1.0, 1 + math.log10(value / top) / decades)) if value > 0 < top else 0.0

    wide = 100 / len(sigma)
    steps = "".join(f"V{20 - height(s):.2f}H{(i + 1) * wide:.2f}" for i, s in enumerate(sigma))
    at = 20 - height(line) if line is not None and line > 0 else None
    return Cell(
        "",
        value=sigma[0],
        curve=f"M0 20{steps}V20Z",
        line=at,
        says=f"singular values from {sigma[0]:.3g} to {sigma[-1]:.3g}",
    )
