"""Packages of other people, as an installer leaves them in a folder of packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, package: str, source: str, declares: Mapping[str, Mapping[str, str]]) -> None:
    """A package of one module, and what it declares: group -> name -> "module:object"."""
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    groups = (
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in declares.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups) + "\n")
