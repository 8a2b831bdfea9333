"""What a squeeze is asked for, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankflow.budget import Budget, allocate
from rankflow.errors import ConfigError
from rankflow.linalg import Spectrum
from rankflow.plan import Layout


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
        if not self.given:
            raise ConfigError("no target: give one of target_rank, energy and max_params")
        if len(self.given) > 1:
            raise ConfigError(f"{' and '.join(self.given)} are {len(self.given)} targets; give one")
        if self.energy is not None and not (isinstance(self.energy, int | float) and 0 < self.energy <= 1):
            raise ConfigError(f"energy is {self.energy!r}; it is the share to keep, above 0 and at most 1")
        for name, whole in (("target_rank", self.target_rank), ("max_params", self.max_params)):
            if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or whole < 1):
                raise ConfigError(f"{name} is {whole!r}; it must be a whole number, at least 1")

    @property
    def given(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

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


def report(before: Layout, after: Layout, spectra: Mapping[str, Spectrum], **about: Any) -> SqueezeReport:
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
