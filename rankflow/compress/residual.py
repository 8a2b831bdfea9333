"""Keep what a squeeze cut off in a file, and put it back.

A residual holds, under the names the adapter's own file has for them, the rows of A and columns of B that were left
out, and the config of the adapter before. Directions are sorted, so what `expand` puts together is what `canonicalize`
makes of the source, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError, naming
from rankflow.formats.base import Put
from rankflow.formats.io.atomic import Together, atomic_file, atomic_folder, is_plain
from rankflow.formats.io.outputs import check_destination, check_harmless, check_output
from rankflow.formats.io.strict_json import strict_object
from rankflow.formats.io.tensors import Spec, all_finite, open_tensors
from rankflow.formats.io.writers import tensor_writer
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft.files import write_adapter_files
from rankflow.formats.peft.modules import Entry, read_entries
from rankflow.formats.peft_config import check_config
from rankflow.formats.wrappers import renamed
from rankflow.linalg.parallel import Pool, Progress

_LARGEST = 1 << 48  # numbers in a tensor
_CONFIG, _SHAPES = "rankflow_adapter_config", "rankflow_shapes"  # in the metadata of a residual


@contextmanager
def residual_writer(
    path: Path, adapter: PeftAdapter, ranks: Mapping[str, int], dtype: torch.dtype | None, group: Together
) -> Iterator[Put]:
    """Yields ``put(name, A, B)``, to be called with the cut-off factors of every module that loses rank.

    The residual appears with the adapter that it belongs to, which is in the same `group`, and just before it.
    """
    specs: dict[str, Spec] = {}
    shapes = {key: s for e in adapter.entries.values() for key, s in ((e.a_key, e.a_shape), (e.b_key, e.b_shape))}
    for name, entry in adapter.entries.items():
        if lost := entry.slot.rank - ranks[name]:
            for key, shape in zip((entry.a_key, entry.b_key), entry.raw_shapes(lost), strict=True):
                specs[key] = dtype or entry.dtype, shape
    with atomic_file(path, group) as partial:
        writer = tensor_writer(partial, specs, {_CONFIG: json.dumps(adapter.config), _SHAPES: json.dumps(shapes)})

        def put(name: str, a: Tensor, b: Tensor) -> None:
            entry = adapter.entries[name]
            for key, t in zip((entry.a_key, entry.b_key), entry.raw(a, b), strict=True):
                writer.put(key, t)

        yield put
        writer.close()


def check_residual(path: Path, out: Path, *, force: bool) -> None:
    """
    Raises:
        ConfigError: a residual cannot be written there, beside an adapter at `out`, or would replace what is none.
    """
    if is_plain(path):
        return
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: a residual is a .safetensors file; give it such a name")
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise ConfigError(f"{path}: is in {out}, which is replaced as a whole; put the residual beside it")
    check_output(path, force=force)
    if path.exists() and not _is_residual(path):
        raise ConfigError(f"{path}: is no residual, so --force does not replace it; choose another name")


def _is_residual(path: Path) -> bool:
    try:
        return open_tensors(path)[1].keys() >= {_CONFIG, _SHAPES}
    except AdapterError:
        return False


def expand(
    src: str | Path,
    residual: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Put a squeezed adapter and its residual together again; module -> rank.

    Raises:
        ConfigError: `out` cannot be written.
        AdapterError: a file that is damaged, no residual, or the residual of another adapter.
    """
    adapter, path, out = PeftAdapter(src), Path(residual), Path(out)
    check_harmless(out, {"its residual": path})
    check_destination(out, adapter.path, force=force)
    cut, metadata = open_tensors(path)
    config, shapes = _header(path, metadata)
    found, file_metadata = adapter.tensors_in_files()
    kept = renamed(found, adapter.names_in_file, adapter.weights)
    dtypes = {key: t.dtype for key, t in {**cut, **kept}.items()}
    factors = {key for entry in adapter.entries.values() for key in (entry.a_key, entry.b_key)}
    if odd := [*(factors - shapes.keys()), *(shapes.keys() - dtypes.keys())]:
        raise AdapterError(f"{path}: is not the residual of {adapter.path}: {odd[0]} is in one of them only")
    specs: dict[str, Spec] = {key: (t.dtype, tuple(t.shape)) for key, t in kept.items()}
    specs |= {key: (dtypes[key], shape) for key, shape in shapes.items()}
    whole = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in specs.items()}
    with naming(path):
        entries = read_entries(whole, config, path)
    factor_keys = {key for e in entries.values() for key in (e.a_key, e.b_key)}
    if odd := [*shapes.keys() - factor_keys]:
        raise AdapterError(f"{path}: is not the residual of {adapter.path}: {odd[0]} is no factor")
    for name, entry in entries.items():
        _check_parts(name, entry, [t for t in (kept, cut) if entry.a_key in t or entry.b_key in t], path, adapter.path)

    with atomic_folder(out) as folder:
        write_adapter_files(folder, config, adapter.companions)
        writer = tensor_writer(folder / f"adapter_model{adapter.weights.suffix}", specs, file_metadata)

        def put(name: str) -> None:
            entry = entries[name]
            pairs = [
                entry.canonical(tensors[entry.a_key], tensors[entry.b_key])
                for tensors in (kept, cut)
                if entry.a_key in tensors
            ]
            a, b = torch.cat([a for a, _ in pairs], -2), torch.cat([b for _, b in pairs], -1)
            for key, t in zip((entry.a_key, entry.b_key), entry.raw(a, b), strict=True):
                writer.put(key, t.to(specs[key][0]))

        Pool(progress, len(entries)).each(put, entries)
        for key in kept.keys() - factor_keys:
            writer.put(key, kept[key])
        writer.close()
    return {name: entry.slot.rank for name, entry in entries.items()}


def _check_parts(name: str, entry: Entry, files: Sequence[Mapping[str, Tensor]], path: Path, src: Path) -> None:
    """
    Raises:
        AdapterError: what the files have of one module does not make the whole of it.
    """
    keys = (entry.a_key, entry.b_key)
    pairs = [[file[key] for key in keys] for file in files if all(key in file for key in keys)]
    ranks = [a.shape[0] // entry.slot.experts for a, _ in pairs if a.ndim]
    fitting = [[entry.raw_shapes(rank) for rank in ranks], [tuple(tuple(t.shape) for t in pair) for pair in pairs]]
    if len(pairs) < len(files) or fitting[0] != fitting[1] or sum(ranks) != entry.slot.rank:
        raise AdapterError(f"{path}: is not the residual of {src}: ranks of {name} do not add up")
    for pair in pairs:
        for key, t in zip(keys, pair, strict=True):
            if t.dtype != entry.dtype:
                raise AdapterError(f"{path}: is not the residual of {src}: {key} is {t.dtype} and {entry.dtype}")
            if not all_finite(t):
                raise AdapterError(f"{path}: or {src}: {key} has NaN or infinite values; the file is damaged")


def _header(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the source's config, and the shapes of its factors by name in the file."""
    try:
        config, shapes = strict_object(metadata[_CONFIG]), strict_object(metadata[_SHAPES])
        for shape in shapes.values():
            if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) > _LARGEST:
                raise ValueError
    except (KeyError, ValueError, TypeError):
        raise AdapterError(f"{path}: is not a residual that `squeeze --keep-residual` wrote") from None
    return check_config(config, f"{path}: {_CONFIG}"), {key: tuple(shape) for key, shape in shapes.items()}
