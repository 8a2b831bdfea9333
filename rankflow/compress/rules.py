"""How many directions of a module each rule keeps, and how ranks are fitted to limits and plans.

Of one module's singular values sigma_1 >= sigma_2 >= ... these are kept:

=============== =====================================================================================================
energy e        the fewest with sum(sigma_i^2) >= e of the whole
error e         the fewest with |change of DeltaW|_F <= e |DeltaW|_F, which is energy 1 - e^2
sv_ratio p      those above sigma_1 / p
sv_fro p        the fewest with sqrt(sum(sigma_i^2)) >= p of the whole, which is energy p^2
sv_cumulative p the fewest with sum(sigma_i) >= p of the whole
auto            those above the noise threshold (`noise_threshold`)
=============== =====================================================================================================

The three `sv_` rules are those of sd-scripts' `resize_lora.py`.

Differs: that script keeps one direction more than each of its rules asks for, and at least two; here they are as
stated. It computes shares of what a randomised SVD found, here they are of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import units

if TYPE_CHECKING:
    from rankflow.linalg.spectrum import Spectrum


def noise_threshold(sigma: list[float], slot: Slot) -> float:
    """Return the largest singular value that noise has whose median one is that of `sigma`.

    Directions that only noise has moved have a DeltaW like the product of two random matrices of shapes [out, r] and
    [r, in]: its singular values lie next to their median, none above it by more than (1 + sqrt(r / in)) (1 + sqrt(r /
    out)), the upper edges of Marchenko and Pastur's law for the two. The median stands for the noise as it does in
    Gavish & Donoho, "The optimal hard threshold for singular values is 4 / sqrt(3)", IEEE Trans. Inf. Theory 2014: so
    it is to be trusted where at least half of the directions carry nothing.
    """
    if len(sigma) < 2:
        return 0.0
    middle = sorted(sigma)[(len(sigma) - 1) // 2]
    return middle * (1 + math.sqrt(slot.rank / slot.in_features)) * (1 + math.sqrt(slot.rank / slot.out_features))


def above_noise(spectrum: Spectrum, slot: Slot) -> tuple[float, int]:
    """Return the noise threshold of a module's spectrum and how many singular values are above: one at least, unless
    all are nothing but rounding."""
    sigma = spectrum.gains[: spectrum.rank].sqrt()
    edge = noise_threshold(sigma.tolist(), slot)
    return edge, max(int((sigma > edge).sum()), min(1, len(sigma)))


def fewest(shares: list[float], share: float) -> int:
    """Return the smallest count whose share is reached; the last bits of a sum decide nothing."""
    return next((k for k, have in enumerate(shares, 1) if have >= share * (1 - 1e-12)), len(shares))


def fit_ranks(wanted: Mapping[str, int], layout: Layout, allowed: Layout) -> dict[str, int]:
    """Return ranks as wanted, rounded up to what is allowed (down if nothing is above). Tied modules get one rank.

    A module that nothing above 0 is allowed for stays as it is.
    """
    ranks = {}
    for unit in units(allowed):
        want = max(wanted[name] for name in unit.names)
        above = (rank for rank in unit.ranks(want, unit.rank) if rank or not want)
        rank = next(above, max(unit.ranks(1, want), default=unit.rank))
        ranks |= dict.fromkeys(unit.names, rank)
    return {name: ranks[name] for name in layout}


def as_planned(ranks: Mapping[str, int], layout: Layout) -> dict[str, int]:
    wrong = [f"{name} is not in the adapter" for name in ranks if name not in layout]
    wrong += [f"{name} is not in the plan" for name in layout if name not in ranks]
    for name, rank in ranks.items():
        if name in layout and not layout[name].min_rank <= rank <= layout[name].rank:
            wrong.append(f"{name}: rank {rank} is planned, {layout[name].min_rank} to {layout[name].rank} can be had")
    for unit in units(layout):
        if len({ranks.get(name) for name in unit.names}) > 1:
            wrong.append(f"{unit}: PEFT gives these one rank, and the plan several")
    if wrong:
        raise ConfigError("\n".join(f"plan: {line}" for line in wrong))
    return {name: ranks[name] for name in layout}
