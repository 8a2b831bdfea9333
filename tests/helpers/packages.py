"""What other people add: packages, as an installer leaves them in a folder of packages, and files in our folders."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from rankflow.formats.open import open_adapter


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


def assert_pair_is_read(folder: Path) -> None:
    """An adapter of a form that somebody added, PAIR, of which DeltaW is 2 B A, is read as the LoRA that it equals."""
    src = folder / "src"
    src.mkdir()
    a, b = torch.randn(4, 8), torch.randn(6, 4)
    save_file({"base_model.model.q.pair_A": a, "base_model.model.q.pair_B": b}, src / "adapter_model.safetensors")
    (src / "adapter_config.json").write_text('{"peft_type": "PAIR", "target_modules": ["q"]}')
    found = open_adapter(src)
    down, up = found.factors("q")
    torch.testing.assert_close(up @ down * found.layout["q"].scaling, 2 * b @ a)
