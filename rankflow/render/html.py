"""A report as one HTML file that opens from disk: pictures and script inside, nothing fetched, every name escaped."""

from __future__ import annotations

import base64
import hashlib
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
from rankflow.render.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENDS = (".html", ".htm")


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
    table: Table | None = None


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
    """Write the page, whole or not at all.

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
