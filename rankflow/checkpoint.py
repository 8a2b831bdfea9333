"""Adapters that are not training: squeeze a saved one to a smaller rank, or look into it. No base model is needed.

rankflow.squeeze("out/checkpoint-500", target_rank=8)        # writes out/checkpoint-500-r8
rankflow.squeeze("out/checkpoint-500", "small", energy=0.9)  # ranks that keep 90 % of every module's energy
rankflow.inspect("out/checkpoint-500").modules[0].effective_rank
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.budget import Budget, allocate
from rankflow.crew import Crew, Progress
from rankflow.errors import ConfigError
from rankflow.formats.peft import PeftAdapter
from rankflow.formats.tensors import check_destination
from rankflow.inspection import inspect
from rankflow.linalg import Gauge, Spectrum, new_rows, refactor, spectrum
from rankflow.plan import Layout
from rankflow.rsvd import Backend, check_backend
from rankflow.seeds import keyed_generator

__all__ = ["SqueezeReport", "SqueezedModule", "Target", "inspect", "squeeze"]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


# -- what is asked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """How far to squeeze: exactly one of the three.

    target_rank: this rank in every module that has more. energy: per module the smallest rank whose singular values
    keep this share of the sum of squares. max_params: LoRA parameters in all, spent where singular values are largest.
    """

    target_rank: int | None = None
    energy: float | None = None
    max_params: int | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in asdict(self).items() if value is not None]
        if not given:
            raise ConfigError("no target: give one of target_rank, energy and max_params")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are {len(given)} targets; give one")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy is {self.energy}; it is the share to keep, above 0 and at most 1")
        for name, whole in (("target_rank", self.target_rank), ("max_params", self.max_params)):
            if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or whole < 1):
                raise ConfigError(f"{name} is {whole!r}; it must be a whole number, at least 1")

    @property
    def suffix(self) -> str:
        """What the default name of the output ends in."""
        if self.target_rank is not None:
            return f"r{self.target_rank}"
        return f"e{self.energy:g}" if self.energy is not None else f"p{self.max_params}"

    def ranks(self, layout: Layout, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Module -> rank, never above the present one. `spectra` is not looked at for a uniform target.

        By energy and by parameters, directions that are nothing but rounding are not kept, and a module without a
        real one leaves the adapter, if PEFT can do without it.
        """
        if self.target_rank is not None:
            return {name: min(slot.rank, self.target_rank) for name, slot in layout.items()}
        if not any(s.rank for s in spectra.values()):
            raise ConfigError(
                "the adapter is zero (never trained?), so there is no energy to go by; give target_rank instead"
            )
        if self.max_params is not None:
            gains = {name: s.gains[: s.rank].tolist() for name, s in spectra.items()}
            return allocate(gains, layout, Budget("max_params", self.max_params))
        assert self.energy is not None
        wanted = {name: _rank_for(spectra[name], self.energy, layout[name].min_rank) for name in layout}
        tied: dict[str, int] = {}
        for name, slot in layout.items():
            if slot.tie is not None:
                tied[slot.tie] = max(wanted[name], tied.get(slot.tie, 0))
        return {name: tied.get(slot.tie or "", wanted[name]) for name, slot in layout.items()}


def _rank_for(spectrum: Spectrum, energy: float, least: int) -> int:
    """The smallest rank that keeps `energy`, 0 for a module that is zero; the last bits of a sum decide nothing."""
    ranks = range(least, spectrum.rank)
    return max(least, next((k for k in ranks if k and spectrum.energy(k) >= energy * (1 - 1e-12)), spectrum.rank))


# -- what came of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SqueezedModule:
    """`energy_kept` is the share of the sum of squared singular values of DeltaW that is left, `error` the predicted
    Frobenius norm of the change of DeltaW."""

    name: str
    rank_before: int
    rank_after: int
    energy_kept: float
    error: float
    params_before: int
    params_after: int


@dataclass(frozen=True)
class SqueezeReport:
    """What a squeeze did, or with `dry_run` would do. `energy_kept` and `error` are over all modules together."""

    source: str
    out: str | None
    target: dict[str, float]
    metric: str
    backend: str
    gauge: str
    dtype: str | None
    dry_run: bool
    modules: tuple[SqueezedModule, ...]
    energy_kept: float
    error: float
    bytes_before: int  # of the LoRA factors
    bytes_after: int
    file_bytes_before: int | None = None
    file_bytes_after: int | None = None
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def params_before(self) -> int:
        return sum(m.params_before for m in self.modules)

    @property
    def params_after(self) -> int:
        return sum(m.params_after for m in self.modules)

    @property
    def ranks(self) -> dict[str, int]:
        return {m.name: m.rank_after for m in self.modules}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "params_before": self.params_before, "params_after": self.params_after}


# -- doing it -------------------------------------------------------------------------------------------------------


def squeeze(
    src: str | Path,
    out: str | Path | None = None,
    *,
    target_rank: int | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    metric: str = "weights",
    backend: Backend = "exact",
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    gauge: Gauge = "balanced",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SqueezeReport:
    """The best adapter of smaller rank, from one saved by PEFT; the source is only read.

    Every module becomes the truncated SVD of its DeltaW (LoRA-Squeeze, arXiv 2602.10993, computed exactly from r x r
    matrices), with its scaling unchanged. See `Target` for the three targets, of which one is to be given. Modules at
    or below their new rank stay as they are, bit for bit. A uniform `target_rank` keeps directions that are zero, so
    that a fresh adapter (B = 0) still learns afterwards; the other targets drop them.

    Args:
        src: adapter folder, or its `.safetensors` or `.bin` file with `adapter_config.json` beside it.
        out: folder to write; `<src>-r8` and the like beside the source if left out.
        metric: `weights`; the other metrics need statistics of data, which no file has.
        backend: `exact`, or a randomised SVD of the full update, as the paper's (`rankflow.rsvd`).
        dtype: of the factors written (`float32`, `bfloat16`, `float16`); that of the source if left out.
        gauge: `balanced` splits singular values evenly between A and B; `keep` keeps |A| / |B|.
        force: replace `out` if it is an adapter folder.
        dry_run: compute the report and write nothing.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: a source that is no LoRA adapter, damaged, or of a variant that cannot be resized.
    """
    began = time.perf_counter()
    target = Target(target_rank, energy, max_params)
    if metric != "weights":
        raise ConfigError(
            f"metric {metric!r} needs statistics of data, which a file does not have; use metric 'weights', "
            "or squeeze while training with policy squeeze"
        )
    check_backend(backend)
    where, wanted = _device(device), _dtype(dtype)
    adapter = PeftAdapter(src)
    out = Path(out) if out is not None else _beside(adapter, target)
    if not dry_run:
        check_destination(out, adapter.path, force=force)
    layout = adapter.layout
    passes = 2 if target_rank is None and not dry_run else 1
    crew = Crew(progress, passes * len(layout))

    def factors(name: str) -> tuple[Tensor, Tensor]:
        a, b = adapter.factors(name)
        if wanted is not None and wanted.itemsize > a.element_size():
            a, b = a.to(wanted), b.to(wanted)
        return a.to(where), b.to(where)

    def measure(name: str) -> Spectrum:
        return spectrum(*factors(name), layout[name].scaling, backend=backend)

    spectra = {} if target_rank is not None and not dry_run else crew.each(measure, layout)
    ranks = target.ranks(layout, spectra)

    def write(name: str, put: Callable[[str, Tensor, Tensor], None]) -> Spectrum:
        a, b = factors(name)
        found = spectra.get(name) or spectrum(a, b, layout[name].scaling, backend=backend)
        if 0 < ranks[name] < layout[name].rank:
            a, b = _cut(found, a, b, ranks[name], gauge, name, layout[name].kind)
        if ranks[name]:
            put(name, _fit(a, wanted, name), _fit(b, wanted, name))
        return found

    if not dry_run:
        with adapter.rewrite(out, ranks, dtype=wanted, force=force) as put:
            spectra = crew.each(lambda name: write(name, put), layout)
    after = Layout({n: replace(s, rank=ranks[n], itemsize=(wanted or s).itemsize) for n, s in layout.items()})
    notes = list(adapter.notes)
    if ranks == layout.ranks:
        notes.append("no module is above its target, so all factors are as they were")
    if left := [name for name, rank in ranks.items() if not rank]:
        notes.append(f"left the adapter, being zero or not worth a direction: {', '.join(left)}")
    return _report(
        layout,
        after,
        spectra,
        source=str(adapter.path),
        out=None if dry_run else str(out),
        target=_given(target),
        backend=backend,
        gauge=gauge,
        dtype=None if wanted is None else str(wanted).removeprefix("torch."),
        dry_run=dry_run,
        file_bytes_before=adapter.file_bytes,
        file_bytes_after=None if dry_run else (out / f"adapter_model{adapter.weights.suffix}").stat().st_size,
        copied=() if dry_run else tuple(file.name for file in adapter.companions),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _given(target: Target) -> dict[str, float]:
    return {name: value for name, value in asdict(target).items() if value is not None}


def _report(before: Layout, after: Layout, spectra: Mapping[str, Spectrum], **about: Any) -> SqueezeReport:
    modules = tuple(
        SqueezedModule(
            name,
            rank_before=before[name].rank,
            rank_after=after[name].rank,
            energy_kept=1.0 if after[name].rank == before[name].rank else found.energy(after[name].rank),
            error=0.0 if after[name].rank == before[name].rank else found.error(after[name].rank),
            params_before=before[name].rank * before[name].params_per_rank,
            params_after=after[name].rank * after[name].params_per_rank,
        )
        for name in before
        for found in [spectra[name]]
    )
    total = math.fsum(float(spectra[name].gains.sum()) for name in before)
    lost = math.fsum(m.error**2 for m in modules)
    return SqueezeReport(
        metric="weights",
        modules=modules,
        energy_kept=1 - lost / total if total > 0 else 1.0,
        error=math.sqrt(lost),
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        **about,
    )


def _cut(found: Spectrum, A: Tensor, B: Tensor, rank: int, gauge: Gauge, name: str, kind: str) -> tuple[Tensor, Tensor]:
    """The best factors of that rank; rows that A has no room for are drawn afresh, beside zero columns of B."""
    cut = found.cut(rank, gauge)
    a, b = refactor(A, B, cut.N, cut.M)
    if cut.fresh:
        rows = new_rows(cut.fresh, a, keyed_generator("squeeze", name), kind=kind)
        a, b = torch.cat([a, rows], -2), torch.cat([b, b.new_zeros(*b.shape[:-1], cut.fresh)], -1)
    return a, b


def _fit(t: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or dtype == t.dtype:
        return t
    fitted = t.to(dtype)
    if dtype == torch.float16 and not bool(fitted.isfinite().all()):
        raise ConfigError(
            f"{name}: values up to {float(t.abs().max()):.3g} do not fit float16; use bfloat16 or float32"
        )
    return fitted


def _beside(adapter: PeftAdapter, target: Target) -> Path:
    """`<src>-r8` and the like: beside the adapter's folder, or beside the file where it has a name of its own."""
    base = adapter.folder if adapter.weights.stem == "adapter_model" else adapter.weights.with_suffix("")
    if base.name in ("", ".."):
        base = base.resolve()
    return base.with_name(f"{base.name}-{target.suffix}")


def _device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return found
