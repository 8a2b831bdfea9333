"""Read whole saved models, whose tensors may be spread over many files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.io.links import check_own
from rankflow.formats.io.strict_json import read_text, strict_object
from rankflow.formats.io.tensors import open_tensors
from rankflow.formats.wrappers import renamed, unwrapped_names

MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_LONGEST = 255  # bytes of a name that file systems take


def is_model(path: Path) -> bool:
    """Whether a folder holds a whole model as transformers or diffusers save one, and no adapter."""
    return path.is_dir() and not (path / "adapter_config.json").is_file() and bool(_files(path))


def open_model(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model's folder, mapped and not read (`open_tensors`).

    Raises:
        ConfigError: no model there.
        AdapterError: a file of it is missing, truncated or corrupt.
    """
    files = _files(folder)
    if not files:
        raise ConfigError(f"{folder}: no model; a folder with one of {', '.join(MODEL_FILES)}, or its index, is needed")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = open_tensors(file)[0]
        tensors |= renamed(found, unwrapped_names(found, front=False), file)
    return tensors


def _files(folder: Path) -> list[Path]:
    for stem in MODEL_FILES:
        if (folder / stem).is_file():
            check_own(folder / stem, folder)
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return sorted(set(indexed(index).values()))
    return []


def indexed(index: Path) -> dict[str, Path]:
    """Return tensor -> its file, from an index of shards that all lie beside the index.

    Raises:
        AdapterError: it is no index, or names or links to what is elsewhere.
    """
    try:
        places = dict(strict_object(read_text(index))["weight_map"].items())
        names = set(places.values())
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        raise AdapterError(f"{index}: not an index of shards; the file is damaged") from None
    if not names or not all(map(_is_name, names)):
        raise AdapterError(f"{index}: names files that are not beside it; the file is damaged")
    for file in (index, *(index.parent / name for name in sorted(names))):
        check_own(file, index.parent)
    return {key: index.parent / name for key, name in places.items()}


def _is_name(name: object) -> bool:
    """Return whether it can be the name of a file in the same folder."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name.encode()) <= _LONGEST


def weight_of(tensors: Mapping[str, Tensor], module: str) -> Tensor | None:
    """A module's weight; the model may have been saved from within, or without, what an adapter's names begin with."""
    key = f"{module}.weight"
    parts = key.split(".")
    for i in range(len(parts) - 1):
        if (inner := ".".join(parts[i:])) in tensors:
            return tensors[inner]
    outer = [k for k in tensors if k.endswith(f".{key}")]
    return tensors[outer[0]] if len(outer) == 1 else None
