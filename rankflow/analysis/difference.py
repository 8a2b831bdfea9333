"""Measure how far apart two saved adapters of any ranks are: norms of DeltaW - DeltaW', from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.deprecation import renamed_arguments
from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.base import SavedAdapter
from rankflow.formats.open import open_adapter
from rankflow.linalg.parallel import Pool, Progress
from rankflow.linalg.spectrum import relative


@dataclass(frozen=True)
class DifferentModule:
    """`distance`: |DeltaW - DeltaW'|_F; `norms` of the two, 0 where an adapter does not have the module."""

    name: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float

    @property
    def relative(self) -> float:
        """Distance over the first's norm; infinite where that is 0 and they differ."""
        return relative(self.distance, self.norms[0])


@dataclass(frozen=True)
class Difference:
    """Two adapters, module by module; `distance` and `norms` are over all of them."""

    first: str
    second: str
    modules: tuple[DifferentModule, ...]
    norms: tuple[float, float]
    distance: float

    @property
    def relative(self) -> float:
        return relative(self.distance, self.norms[0])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@renamed_arguments(kind="from_format")
def diff(
    first: str | Path,
    second: str | Path,
    *,
    from_format: str | Sequence[str] | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Distances between two adapters of one base model.

    The norm of `DeltaW - DeltaW' = [s B, -s' B'] [A; A']` comes from the QR decompositions of the two factors: nothing
    is subtracted that is nearly equal, so adapters that agree to rounding are found to.

    Args:
        from_format: their format, as for `rankflow.squeeze`, or the first's and the second's; told from the files if
            left out.
        base: the base model's folder, for adapters that say less than all in their file.

    Raises:
        ConfigError: an unknown format, or more than two.
        AdapterError: one is no LoRA adapter, or they share no module, or a module's shapes differ.
    """
    kinds = [from_format] * 2 if from_format is None or isinstance(from_format, str) else [*from_format]
    if len(kinds) != 2:
        raise ConfigError(f"{len(kinds)} formats for two adapters; give one for both, or one for each")
    ours, theirs = (open_adapter(path, of, base) for path, of in zip((first, second), kinds, strict=True))
    if any(adapter.sketch is not None for adapter in (ours, theirs)):
        raise AdapterError(f"{first} or {second} comes as full matrices; squeeze it first, and compare what is written")
    names = [*ours.layout, *(name for name in theirs.layout if name not in ours.layout)]
    if len(names) == len(ours.layout) + len(theirs.layout):
        raise AdapterError(f"{first} and {second} share no module; they belong to different models")
    for name in ours.layout.keys() & theirs.layout.keys():
        a, b = ours.layout[name], theirs.layout[name]
        if (a.in_features, a.out_features, a.experts) != (b.in_features, b.out_features, b.experts):
            raise AdapterError(f"{name} has other shapes in {second} than in {first}; they belong to different models")

    def compare(name: str) -> DifferentModule:
        pairs = [_scaled(adapter, name) if name in adapter.layout else None for adapter in (ours, theirs)]
        present = [pair for pair in pairs if pair is not None]
        signs = [1.0 if pair is pairs[0] else -1.0 for pair in present]
        a = torch.cat([a for a, _ in present], -2)
        b = torch.cat([sign * b for sign, (_, b) in zip(signs, present, strict=True)], -1)
        return DifferentModule(
            name,
            ranks=(_rank(ours, name), _rank(theirs, name)),
            norms=(_norm(*pairs[0]) if pairs[0] else 0.0, _norm(*pairs[1]) if pairs[1] else 0.0),
            distance=_norm(a, b),
        )

    modules = tuple(Pool(progress, len(names)).each(compare, names).values())
    if huge := [m.name for m in modules if not math.isfinite(m.distance + sum(m.norms))]:
        raise AdapterError(f"{huge[0]} is too large in {first} or {second} to be compared; restore the file")
    return Difference(
        str(first),
        str(second),
        modules,
        norms=(math.hypot(*(m.norms[0] for m in modules)), math.hypot(*(m.norms[1] for m in modules))),
        distance=math.hypot(*(m.distance for m in modules)),
    )


def _rank(adapter: SavedAdapter, name: str) -> int:
    return adapter.layout[name].rank if name in adapter.layout else 0


def _scaled(adapter: SavedAdapter, name: str) -> tuple[Tensor, Tensor]:
    a, b = adapter.factors(name)
    return a.double(), adapter.layout[name].scaling * b.double()


def _norm(a: Tensor, b: Tensor) -> float:
    """|B A|_F"""
    root_a, root_b = torch.linalg.qr(a.mT).R, torch.linalg.qr(b).R
    return float(torch.linalg.vector_norm(root_b @ root_a.mT))
