"""How far to squeeze a saved adapter: one target, what else holds beside it, and the ranks that come of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from rankflow.compress.option import option
from rankflow.compress.rules import above_noise, as_planned, fewest, fit_ranks
from rankflow.errors import ConfigError
from rankflow.plans.allocate import allocate
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limits

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rankflow.linalg.spectrum import Spectrum

SV_RULES = ("sv_ratio", "sv_fro", "sv_cumulative")
TARGETS = ("target_rank", "energy", "error", *SV_RULES, "auto", "max_params", "size", "budget", "ranks", "keep")


class Goal(TypedDict, total=False):
    """The fields of `Target`, as keyword arguments."""

    target_rank: int | None
    energy: float | None
    error: float | None
    sv_ratio: float | None
    sv_fro: float | None
    sv_cumulative: float | None
    auto: bool
    max_params: int | None
    size: int | None
    budget: Budget | None
    ranks: Mapping[str, int] | None
    keep: bool
    across: bool
    exact: bool
    max_rank: int | None
    rank_multiple: int
    limits: Limits | None


def _size(word: str) -> dict[str, Any]:
    from rankflow.config.schema import parse_size

    return {"size": parse_size(int(word) if word.isdigit() else word)}


def _budget(path: Path) -> dict[str, Any]:
    from rankflow.compress.plan_file import read_budget

    budget, limits = read_budget(path)
    return {"budget": budget, "limits": limits}


def _plan(path: Path) -> dict[str, Any]:
    from rankflow.compress.plan_file import read_plan

    return {"ranks": read_plan(path)}


@dataclass(frozen=True)
class Target:
    """How far to squeeze: exactly one of the first twelve, with any of the others.

    target_rank: this rank in every module that has more. energy, error, sv_ratio, sv_fro, sv_cumulative, auto: see the
    table in `rankflow.compress.rules`; `across` applies the first two to all modules together, spending parameters
    where they do most. max_params: LoRA parameters in all; size: bytes of a file in all; budget: any other
    (`rankflow.plans.budget.Budget`); spent where singular values are largest, and with `exact` so that no other ranks
    of that cost keep more. ranks: module -> rank, for every module. keep: ranks as they are, but for what is said
    beside it.

    max_rank: no module has more. rank_multiple: ranks are multiples of it where the module has as many. limits: what
    else a policy file's `limits`, `tie` and `rank_buckets` say. Ranks are rounded up to what these allow, and never
    above what a module has.

    Raises:
        ConfigError: none or several targets, a value out of range, or options that do not go together.
    """

    panel: ClassVar = "How much"

    target_rank: int | None = option(None, "One rank for all modules that have more.", metavar="N")
    energy: float | None = option(
        None, "Share of its squared singular values every module keeps, e.g. 0.9.", metavar="E"
    )
    error: float | None = option(None, "Relative error |change| / |DeltaW| of every module, e.g. 0.1.", metavar="E")
    sv_ratio: float | None = option(None, "Singular values above the largest over P.", metavar="P")
    sv_fro: float | None = option(None, "Share of the Frobenius norm every module keeps.", metavar="P")
    sv_cumulative: float | None = option(None, "Share of its summed singular values it keeps.", metavar="P")
    auto: bool = option(False, "Directions above the noise threshold (Marchenko-Pastur, from the median).")
    max_params: int | None = option(None, "LoRA parameters in all, spent where they keep most.", metavar="N")
    size: int | None = option(None, "Bytes of the file in all, e.g. 32MiB.", metavar="SIZE", type=str, read=_size)
    budget: Budget | None = option(
        None, "YAML with budget, limits, tie and rank_buckets.", metavar="FILE", type=Path, read=_budget
    )
    ranks: Mapping[str, int] | None = option(
        None, "Ranks as `rankflow plan` wrote them.", name="plan", metavar="FILE", type=Path, read=_plan
    )
    keep: bool = False
    across: bool = option(False, "With --energy or --error: of all modules together, not of each.")
    exact: bool = option(False, "With --max-params, --size or --budget: the very best ranks of that cost.")
    max_rank: int | None = option(None, "No module has a higher rank.", metavar="N")
    rank_multiple: int = option(1, "Ranks are multiples of this.", metavar="N")
    limits: Limits | None = None

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None and getattr(self, name) is not False]
        if not given:
            raise ConfigError(f"no target: give one of {', '.join(TARGETS)}")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are {len(given)} targets; give one")
        for name in ("energy", "error", "sv_fro", "sv_cumulative"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and 0 < value <= 1 and (name != "error" or value < 1)):
                what = (
                    "share to lose, above 0 and below 1" if name == "error" else "share to keep, above 0 and at most 1"
                )
                raise ConfigError(f"{name} is {value!r}; it is the {what}")
        if self.sv_ratio is not None and not (_number(self.sv_ratio) and 1 <= self.sv_ratio < math.inf):
            raise ConfigError(f"sv_ratio is {self.sv_ratio!r}; it is how far below the largest to go, at least 1")
        for name in ("target_rank", "max_params", "size", "max_rank", "rank_multiple"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if self.across and self.energy is None and self.error is None:
            raise ConfigError(f"across all modules is said of energy and error; {given[0]} is not asked that way")
        if self.exact and self._spending is None:
            raise ConfigError(f"exact is said of max_params, size and budget; {given[0]} has but one answer")

    @property
    def _spending(self) -> Budget | None:
        if self.max_params is not None:
            return Budget("max_params", self.max_params)
        return Budget("size", self.size) if self.size is not None else self.budget

    @property
    def given(self) -> dict[str, object]:
        """Return the target and what else was given, as a report has it."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.limits is not None:
            changed["limits"] = [entry.pattern for entry in self.limits.entries]
        if self.budget is not None:
            changed["budget"] = str(self.budget)
        return changed

    @property
    def suffix(self) -> str:
        """What the default name of the output ends in."""
        for name, letter in _LETTERS.items():
            if (value := getattr(self, name)) is not None:
                return f"{letter}{value:g}" if isinstance(value, float) else f"{letter}{value}"
        return "auto" if self.auto else "kept" if self.keep else "squeezed"

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on singular values."""
        return self.target_rank is None and self.ranks is None and not self.keep

    @property
    def highest(self) -> int | None:
        """The highest rank that can come of it, where that is said."""
        return max(self.ranks.values(), default=None) if self.ranks is not None else self.target_rank or self.max_rank

    @property
    def shared(self) -> bool:
        """Whether modules compete for what there is, so that their singular values are compared with each other."""
        return self.across or self._spending is not None

    def choose(self, layout: Layout, spectra: Mapping[str, Spectrum], overhead: int = 0) -> dict[str, int]:
        """Return module -> rank, never above the present one.

        Where singular values are looked at, directions that are nothing but rounding are not kept, and a module
        without a real one leaves the adapter, if PEFT can do without it. `overhead`: bytes of the file that are not
        LoRA factors.

        Raises:
            ConfigError: what is asked for cannot be had.
        """
        allowed = self._allowed(layout)
        if self.ranks is not None:
            return as_planned(self.ranks, layout)
        if self.target_rank is not None or self.keep:
            return fit_ranks({name: self.target_rank or slot.rank for name, slot in layout.items()}, layout, allowed)
        if not any(s.rank for s in spectra.values()):
            raise ConfigError(
                "the adapter is zero (never trained?), so there is nothing to go by; give target_rank instead"
            )
        from rankflow.plans.knapsack import (
            allocate_exactly,
            cover,
        )  # takes torch, which the command line's help has not

        gains = _gains(spectra)
        if self._spending is not None:
            return (allocate_exactly if self.exact else allocate)(gains, allowed, self._left(layout, overhead))
        if self.across:
            inside = math.fsum(map(math.fsum, gains.values()))
            share = self._energy * math.fsum(s.total for s in spectra.values()) / inside
            return cover(gains, allowed, min(share, 1.0) if any(s.outside for s in spectra.values()) else self._energy)
        wanted = {name: self._rule(spectra[name], slot) for name, slot in layout.items()}
        return fit_ranks(wanted, layout, allowed)

    def shortfall(
        self, layout: Layout, spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], overhead: int
    ) -> float:
        """Return the most, as a share of the energy, by which `ranks` fall short of the best of the same cost."""
        if self._spending is None or self.exact:
            return 0.0
        from rankflow.plans.knapsack import upper_bound

        gains = _gains(spectra)
        total = math.fsum(map(math.fsum, gains.values()))
        kept = math.fsum(math.fsum(gains[name][: ranks[name]]) for name in layout)
        return max(0.0, upper_bound(gains, self._allowed(layout), self._left(layout, overhead)) - kept) / total

    def _left(self, layout: Layout, overhead: int) -> Budget:
        """Return the budget for LoRA factors, in whole units."""
        budget = self._spending
        assert budget is not None
        if self.size is None:
            return budget.resolve(layout)
        if self.size <= overhead:
            raise ConfigError(f"size is {self.size:,} bytes, but what is not LoRA factors already takes {overhead:,}")
        return replace(budget, amount=self.size - overhead)

    def _allowed(self, layout: Layout) -> Layout:
        """`layout` with what each slot may have: no more than now, and multiples where the module has as many."""
        slots = {}
        for name, slot in (self.limits or Limits()).apply(layout).items():
            most = min(slot.rank, slot.max_rank, self.max_rank or slot.rank)
            multiple = math.lcm(slot.multiple, self.rank_multiple)
            slots[name] = replace(slot, max_rank=most, multiple=multiple if multiple <= most else 1)
        return Layout(slots)

    def _rule(self, spectrum: Spectrum, slot: Slot) -> int:
        """Return how many directions of one module the given rule keeps."""
        gains = spectrum.gains[: spectrum.rank]
        if not len(gains):
            return 0
        if spectrum.outside and (self.auto or self.sv_cumulative is not None):
            raise ConfigError(
                f"{'auto' if self.auto else 'sv_cumulative'} looks at all singular values, and of a full update only "
                "the leading ones are known; give another target"
            )
        sigma = gains.sqrt()
        if self.auto:
            return above_noise(spectrum, slot)[1]
        if self.sv_ratio is not None:
            return max(1, int((sigma > sigma[0] / self.sv_ratio).sum()))
        if self.sv_cumulative is not None:
            return fewest((sigma.cumsum(0) / sigma.sum()).tolist(), self.sv_cumulative)
        return fewest((gains.cumsum(0) / (gains.sum() + spectrum.outside)).tolist(), self._energy)

    @property
    def _energy(self) -> float:
        """The share of the sum of squares that `energy`, `error` or `sv_fro` asks for."""
        if self.sv_fro is not None:
            return self.sv_fro**2
        if self.error is not None:
            return 1 - self.error**2
        assert self.energy is not None
        return self.energy


_LETTERS = {
    "target_rank": "r",
    "energy": "e",
    "error": "err",
    "sv_ratio": "ratio",
    "sv_fro": "fro",
    "sv_cumulative": "cum",
    "max_params": "p",
    "size": "b",
}


def every_rank(layout: Layout, **limits: Unpack[Goal]) -> list[Target]:
    """Return a target for every uniform rank that can be had within `limits`, in growing order.

    Raises:
        ConfigError: `limits` hold a target.
    """
    given = [name for name in TARGETS if limits.get(name)]
    if given:
        raise ConfigError(f"acceptance looks for the rank by itself, so {given[0]} cannot be given too; leave out one")
    most = max(slot.rank for slot in layout.values())
    step = limits.get("rank_multiple", 1)
    limits = {**limits, "target_rank": min(most, limits.get("max_rank") or most)}
    widest = Target(**limits)  # which checks them
    assert widest.target_rank is not None
    ranks = range(step, widest.target_rank + 1, step) or [widest.target_rank]
    return [replace(widest, target_rank=rank) for rank in ranks]


def _gains(spectra: Mapping[str, Spectrum]) -> dict[str, list[float]]:
    return {name: s.gains[: s.rank].tolist() for name, s in spectra.items()}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
