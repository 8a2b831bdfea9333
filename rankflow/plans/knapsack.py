"""The choice of ranks as a knapsack problem: its exact optimum, an upper bound, and its dual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from rankflow.errors import ConfigError
from rankflow.plans.allocate import Options
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout

_MOST_WORK = 4_000_000_000  # additions: some seconds


def allocate_exactly(gains: Mapping[str, Sequence[float]], layout: Layout, budget: Budget) -> dict[str, int]:
    """Return ranks of the largest possible total gain within `budget` (resolved), limits and ties; module -> rank.

    ``gains`` is as for `budget.allocate`. Directions that gain nothing are not taken.

    Raises:
        ConfigError: limits demand more than the budget, it does not buy a single direction, or the problem is too
            large to be solved exactly.
    """
    options = Options.of(gains, layout, budget)
    step = math.gcd(*options.costs)
    room = options.left // step
    choices = []  # per unit: (rank, cost in steps and gain over the least rank)
    for i, (unit, cost, have, low) in enumerate(
        zip(options.units, options.costs, options.have, options.least, strict=True)
    ):
        at = [0.0, *accumulate(options.gain(i, k, k + 1) for k in range(have))]
        choices.append([(k, (k - low) * cost // step, at[k] - at[min(low, have)]) for k in unit.ranks(low + 1, have)])
    work = (room + 1) * sum(map(len, choices))
    if work > _MOST_WORK:
        raise ConfigError(
            f"{work:,} steps are too many to find the exact optimum; leave out exact, whose bound is close"
        )
    best = torch.zeros(room + 1, dtype=torch.float64)
    taken = []
    for unit_choices in choices:
        found, choice = best.clone(), torch.zeros(room + 1, dtype=torch.int16)
        for n, (_, weight, gain) in enumerate(unit_choices, 1):
            if weight <= room:
                offer = best[: room + 1 - weight] + gain
                better = offer > found[weight:]
                found[weight:][better] = offer[better]
                choice[weight:][better] = n
        best = found
        taken.append(choice)
    ranks = list(options.least)
    at = room
    for i in reversed(range(len(ranks))):
        if n := int(taken[i][at]):
            ranks[i], weight, _ = choices[i][n - 1]
            at -= weight
    return options.bought(ranks)


def upper_bound(gains: Mapping[str, Sequence[float]], layout: Layout, budget: Budget) -> float:
    """Return a total gain that no ranks within `budget` (resolved) exceed: that of `budget.allocate`, with the first
    step that costs too much taken in part."""
    options = Options.of(gains, layout, budget)
    ranks, left = list(options.least), options.left
    total = math.fsum(options.gain(i, 0, rank) for i, rank in enumerate(ranks))
    for i, rank in options.best_first(ranks):
        price, gain = (rank - ranks[i]) * options.costs[i], options.gain(i, ranks[i], rank)
        if price > left:
            return total + gain * left / price
        left, total, ranks[i] = left - price, total + gain, rank
    return total


def cover(gains: Mapping[str, Sequence[float]], layout: Layout, share: float) -> dict[str, int]:
    """Return the ranks of fewest parameters whose gains are `share` (0, 1] of all, within limits and ties; module ->
    rank.

    ``gains`` is as for `budget.allocate`. No fewer will do when all ranks cost the same and no bucket, multiple or tie
    applies; otherwise there is at most the last increment too many. The last bits of a sum decide nothing.

    Raises:
        PlanError: a gain is not finite.
    """
    options = Options.of(gains, layout, Budget("max_params", 1))
    ranks = list(options.least)
    wanted = share * (1 - 1e-12) * math.fsum(g for name in layout for g in gains.get(name, ()))
    kept = math.fsum(options.gain(i, 0, rank) for i, rank in enumerate(ranks))
    for i, rank in options.best_first(ranks):
        if kept >= wanted:
            break
        kept += options.gain(i, ranks[i], rank)
        ranks[i] = rank
    return options.by_module(ranks)
