"""How close a decision was: by which share scores would have to change for directions to go elsewhere.

A margin is (taken - left) / taken, 0 at a tie and 1 where what was left is worth nothing. It is None where nothing
competed: all that could be had was, or no score is above 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rankflow.plans.budget import Budget, Options, rounded
from rankflow.plans.limits import units
from rankflow.plans.plan import Layout


def allocation_margin(
    gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int], layout: Layout, budget: Budget
) -> float | None:
    """Of `budget.allocate`, which gave `ranks`: between the worst directions that a module has and the best that
    another, in their place, could have within budget and limits."""
    options = Options.of(gains, layout, budget)
    spare = int(budget.amount) - budget.spent(layout.with_ranks(ranks))
    taken: list[tuple[float, int, int]] = []  # (gain per cost, price, unit)
    left: list[tuple[float, int, int]] = []
    for i, unit in enumerate(options.units):
        rank = ranks[unit.names[0]]
        below = max(unit.ranks(options.least[i], rank - 1), default=rank)
        above = next(unit.ranks(rank + 1, options.have[i]), rank)
        for found, first, last in ((taken, below, rank), (left, rank, above)):
            if price := (last - first) * options.costs[i]:
                found.append((rounded(options.gain(i, first, last) / price, str(unit)), price, i))
    taken.sort()
    left.sort(reverse=True)
    margins = []
    for worth, price, i in taken:
        fits = (other for other, dear, j in left if j != i and dear <= price + spare)
        if worth > 0 and (rival := next(fits, None)) is not None:
            margins.append(max(0.0, 1 - rival / worth))
    return min(margins, default=None)


def growth_margin(scores: Mapping[str, float], ranks: Mapping[str, int], layout: Layout) -> float | None:
    """Of `budget.grow_by_score`, which let modules grow to `ranks`: between the lowest score that grew and the next one
    below it that limits would have let grow."""
    grown, stayed = [], []
    for unit in units(layout):
        mean = rounded(sum(scores.get(name, 0.0) for name in unit.names) / len(unit.names), str(unit))
        if unit.names[0] in ranks:
            grown.append(mean)
        elif unit.rank < unit.span[1]:
            stayed.append(mean)
    lowest = min(grown, default=0.0)
    return closest(1 - mean / lowest for mean in stayed if mean <= lowest) if lowest > 0 else None


def closest(margins: Iterable[float | None]) -> float | None:
    """The least of those that there are."""
    return min((m for m in margins if m is not None), default=None)
