"""The canvas of all pictures: matplotlib's objects without global state or a window, on a light or dark ground."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankflow.errors import ConfigError
from rankflow.formats.io.atomic import atomic_file, is_plain
from rankflow.formats.io.outputs import Reads, check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Paper:
    """Colours: of the ground, of what is written, of what stands back, and of cells that hold nothing."""

    ground: str
    ink: str
    faint: str
    absent: str


LIGHT = Paper(ground="#ffffff", ink="#222222", faint="#8a8a8a", absent="#e9e9e9")
DARK = Paper(ground="#16181d", ink="#e4e6eb", faint="#8d93a1", absent="#262a33")


def new_figure(height: float, paper: Paper, width: float = 10.5) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=paper.ground)


def new_title(ax: Axes, title: str, under: str, paper: Paper) -> None:
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=paper.ink, pad=20)
    ax.annotate(
        under,
        (0, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color=paper.faint,
    )


def plain(text: str) -> str:
    """Names as they are, to matplotlib, which takes what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def check_picture(path: Path, reads: Reads | None = None, *, force: bool = False) -> None:
    """
    Raises:
        ConfigError: the path ends in no format that matplotlib writes, or cannot be written.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds and not is_plain(path):
        raise ConfigError(f"{path}: a picture is one of {', '.join(sorted(kinds))}, by the end of its name")
    check_output(path, reads, force=force)


def save(fig: Figure, path: str | Path, reads: Reads | None = None, *, force: bool = False, of: str = "") -> Path:
    """Write the picture, whole or not at all; as PNG if the name of a device says nothing. `of`: see `picture_of`.

    Raises:
        ConfigError: see `check_picture`.
    """
    path = Path(path)
    check_picture(path, reads, force=force)
    with atomic_file(path) as partial:
        about = {"metadata": {"Source": of}} if of and partial.suffix in ("", ".png") else {}
        _draw(fig, partial, **({} if partial.suffix else {"format": "png"}), **about)
    return path


def picture_of(path: Path) -> str:
    """What `save` was told that a PNG is a picture of; empty where a file does not say so, or is no picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return str(picture.info.get("Source", ""))
    except Exception:  # of a stranger's file, anything
        return ""


def _draw(fig: Figure, to: Path | io.BytesIO, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # drawn as boxes
        fig.savefig(to, **options)


def png(fig: Figure) -> bytes:
    found = io.BytesIO()
    _draw(fig, found, format="png", dpi=120)
    return found.getvalue()
