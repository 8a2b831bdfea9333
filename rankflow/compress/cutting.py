"""Decompose every module of a saved adapter, and write the adapter at other ranks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rankflow.compress.metric import Metric
from rankflow.compress.residual import residual_writer
from rankflow.errors import ConfigError, naming
from rankflow.formats.base import Put, SavedAdapter
from rankflow.formats.io.atomic import together
from rankflow.formats.io.tensors import all_finite
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.linalg.decompose import refactor, spectra
from rankflow.linalg.growth import new_rows
from rankflow.linalg.parallel import Pool
from rankflow.linalg.random import keyed_generator
from rankflow.linalg.spectrum import Gauge, Spectrum
from rankflow.linalg.svd import Backend
from rankflow.plans.layout import Layout
from rankflow.serving.export import Fitting, padded

# Of factors in float64 that one batch may hold; a GPU is busy with far less.
_BYTES = 1 << 28


@dataclass
class Cutting:
    """Decompose the modules of one adapter, and write them at other ranks.

    Args:
        adapter: what is cut; only read.
        metric: what a cut preserves.
        device, backend, gauge: see `rankflow.squeeze`.
        dtype: of what is written; that of each module if None.
        canonical: whether modules that keep their rank have their directions sorted too.
    """

    adapter: SavedAdapter
    metric: Metric
    device: torch.device
    backend: Backend
    gauge: Gauge
    dtype: torch.dtype | None = None
    canonical: bool = False
    spectra: dict[str, Spectrum] = field(default_factory=dict, init=False)  # of the modules decomposed so far

    @property
    def batched(self) -> bool:
        """Whether modules of one shape are decomposed at once."""
        return pays_on(self.device) and self._plain

    @property
    def _plain(self) -> bool:
        return self.backend == "exact" and self.metric.name == "weights"

    def measure(self, pool: Pool) -> None:
        """Let `pool` decompose all modules, and write nothing."""
        layout = self.adapter.layout
        dtypes = {name: entry.dtype for name, entry in self.adapter.entries.items()}
        groups = by_shape(layout, layout, dtypes) if self.batched else [(name,) for name in layout]
        with naming(self.adapter.path):
            self.spectra = pool.together(self._measured, groups)

    def write(
        self,
        pool: Pool,
        ranks: Mapping[str, int],
        out: Path,
        fitting: Fitting,
        *,
        residual: Path | None = None,
        force: bool = False,
    ) -> None:
        """Let `pool` write the adapter at these ranks to `out`, and what is cut off to `residual`.

        Modules that were not decomposed before are now.
        """
        rows = fitting.ranks(ranks)
        with ExitStack() as files:
            put_residual = None
            if residual is not None and isinstance(self.adapter, PeftAdapter):
                both = files.enter_context(together())
                put_residual = files.enter_context(residual_writer(residual, self.adapter, ranks, self.dtype, both))
                put = files.enter_context(self.adapter.rewrite(out, rows, dtype=self.dtype, force=force, group=both))
            else:
                put = files.enter_context(self.adapter.rewrite(out, rows, dtype=self.dtype, force=force))
            with naming(self.adapter.path):
                self.spectra = pool.each(
                    lambda name: self._write(name, ranks[name], rows[name], put, put_residual), self.adapter.layout
                )

    # -- one module -------------------------------------------------------------------------------------------------

    def _measured(self, names: Sequence[str]) -> list[Spectrum]:
        pairs = [self._factors(name) for name in names]
        if len(names) == 1:
            return [self._spectrum(names[0], *pairs[0])]
        found = spectra(pairs, [self.adapter.layout[name].scaling for name in names])
        return [replace(one, outside=self.adapter.outside(name)) for name, one in zip(names, found, strict=True)]

    def _spectrum(self, name: str, a: Tensor, b: Tensor) -> Spectrum:
        found = self.metric.spectrum(name, a, b, self.adapter.layout[name].scaling, self.backend)
        return replace(found, outside=self.adapter.outside(name))

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = (t.to(self.device) for t in self.adapter.factors(name))
        if a.dtype != b.dtype or (self.backend == "exact" and not (self._plain and a.dtype == torch.bfloat16)):
            return a.double(), b.double()  # once for all; bfloat16 may do with less where weights are all that counts
        return a, b

    def _write(self, name: str, rank: int, rows: int, put: Put, put_residual: Put | None) -> Spectrum:
        a, b = self._factors(name)
        slot, dtype = self.adapter.layout[name], self.dtype or self.adapter.entries[name].dtype
        found = self.spectra.get(name) or self._spectrum(name, a, b)
        if self.canonical or (rank < slot.rank and put_residual is not None):
            a, b = self._cut(found, a, b, slot.rank, name)
        elif 0 < rank < slot.rank:
            a, b = self._cut(found, a, b, rank, name)
        if rows:
            kept = padded(a[..., :rank, :], b[..., :rank], rows)
            put(name, *(_rounded(t, dtype, name) for t in kept))
        if rank < slot.rank and put_residual is not None:
            put_residual(name, _rounded(a[..., rank:, :], dtype, name), _rounded(b[..., rank:], dtype, name))
        return found

    def _cut(self, found: Spectrum, A: Tensor, B: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the best factors of that rank; rows that A lacks are drawn afresh, beside zero columns of B."""
        cut = found.cut(rank, self.gauge)
        a, b = refactor(A, B, cut.N, cut.M, wide=found.wide)
        if cut.fresh:
            rows = new_rows(cut.fresh, a, keyed_generator(0, 0, name), kind=self.adapter.layout[name].kind)
            a, b = torch.cat([a, rows], -2), torch.cat([b, b.new_zeros(*b.shape[:-1], cut.fresh)], -1)
        return a, b


def _rounded(t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = t.to(dtype)
    if not all_finite(rounded):
        size, kind = float(t.abs().max()), str(dtype).removeprefix("torch.")
        raise ConfigError(f"{name}: values up to {size:.3g} do not fit {kind}; use bfloat16 or float32")
    return rounded


# -- modules of one shape, factorised at once where that pays ---------------------------------------------------------


def pays_on(device: torch.device) -> bool:
    """Whether many small factorisations at once are quicker there than one by one; on a CPU, cores share them out."""
    return device.type != "cpu"


def by_shape(layout: Layout, names: Iterable[str], dtypes: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """Return `names` in groups of one shape and dtype, none larger than memory allows, in the order they begin."""
    groups: dict[Hashable, list[list[str]]] = {}
    for name in names:
        slot = layout[name]
        key = (slot.experts, slot.in_features, slot.out_features, slot.rank, dtypes[name])
        most = max(1, _BYTES // (8 * slot.rank * slot.params_per_rank))
        alike = groups.setdefault(key, [[]])
        if len(alike[-1]) == most:
            alike.append([])
        alike[-1].append(name)
    return [tuple(group) for alike in groups.values() for group in alike]
