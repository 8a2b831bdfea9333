"""What other people add: packages, as an installer leaves them in a folder of packages, and files in our folders."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest


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


def drop_file(package: ModuleType, name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `package`, one of our folders, have one file more, which lies in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
