"""Updates that come as full matrices, reduced to their leading directions; what these leave out is measured.

One matrix at a time is made, decomposed (`rankflow.linalg.svd`) and dropped. With D ~ U S Vh the factors are A =
root(S) Vh and B = U root(S). What is left, D - B A, is orthogonal to B A and to every cut of it, of a randomised SVD
too, as there S Vh = U^T D: the energy that a cut loses is what it loses of the sketch plus |D - B A|_F^2, which is
computed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.base import SavedModule, Sketch, Source
from rankflow.formats.io.tensors import all_finite
from rankflow.linalg.svd import Backend, low_rank
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.names import natural

_ROWS = 1024  # of a residual that are formed at once


@dataclass(frozen=True)
class Delta:
    """One module's update ``[out, in * kernel]``, computed on demand."""

    out: int
    shape: tuple[int, ...]  # in, and the kernel of a convolution
    dtype: torch.dtype  # that factors are written in
    make: Callable[[], Tensor]


class DenseAdapter(Source):
    """Full updates as an adapter of at most the sketch's rank, to be read; `rankflow.formats.convert` writes it.

    `about` is what PEFT's config should say of it beside ranks and modules.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        deltas: Mapping[str, Delta],
        sketch: Sketch,
        *,
        file_bytes: int,
        about: Mapping[str, Any],
        notes: Sequence[str] = (),
    ):
        self.kind, self.path, self.sketch = kind, path, sketch
        self._about, self._file_bytes = about, file_bytes
        self._rank = sketch.rank
        self._backend: Backend = sketch.backend
        self._deltas = {name: deltas[name] for name in sorted(deltas, key=natural)}
        self.entries = {name: self._entry(delta) for name, delta in self._deltas.items()}
        self.layout = Layout({name: entry.slot for name, entry in self.entries.items()})
        self._outside: dict[str, float] = {}
        self.notes = [
            *notes,
            f"of every update the {sketch.rank} leading directions at most, by SVD ({sketch.backend}); what lies "
            "outside of them counts as lost",
        ]

    @property
    def about(self) -> Mapping[str, Any]:
        return self._about

    @property
    def file_bytes(self) -> int:
        return self._file_bytes

    def _entry(self, delta: Delta) -> SavedModule:
        inside, ones = math.prod(delta.shape), (1,) * (len(delta.shape) - 1)
        rank = min(self._rank, delta.out, inside)
        slot = Slot(
            rank=rank,
            in_features=inside,
            out_features=delta.out,
            scaling=1.0,
            kind="conv" if ones else "linear",
            itemsize=delta.dtype.itemsize,
        )
        return SavedModule(slot, "", "", (rank, *delta.shape), (delta.out, rank, *ones), delta.dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A ``[r, in]`` and B ``[out, r]`` of the leading directions, in float32. They are computed at each
        call.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        delta = self._deltas[name].make()
        delta = delta if delta.dtype == torch.float64 else delta.float()
        if not all_finite(delta):
            raise AdapterError(f"{self.path}: the update of {name} has NaN or infinite values; the file is damaged")
        U, S, Vh = low_rank(delta, self.layout[name].rank, self._backend)
        left, right = U * S.sqrt(), S.sqrt()[:, None] * Vh
        residual = (
            torch.linalg.vector_norm(rows - some @ right, dtype=torch.float64).square()
            for rows, some in zip(delta.split(_ROWS), left.split(_ROWS), strict=True)
        )
        self._outside[name] = math.fsum(map(float, residual)) if self.layout[name].rank < min(delta.shape) else 0.0
        return right, left

    def outside(self, name: str) -> float:
        """Return |D - B A|_F^2 of the factors that were computed last."""
        return self._outside[name]
