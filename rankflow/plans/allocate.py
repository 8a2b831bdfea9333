"""Scores, limits and a budget in; ranks out, and how close it was. The same input gives the same ranks everywhere.

Modules that are tied move as one; everything else is a question of what one more direction is worth and costs. A
margin is (taken - left) / taken, 0 at a tie and 1 where what was left is worth nothing. It is None where nothing
competed: all that could be had was, or no score is above 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankflow.errors import ConfigError, PlanError
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Unit, units

_LATER = 1e-100  # puts a gain that is multiplied by it behind all that are not


def round_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores to a relative 1e-5, so that the last bits, which differ between machines, decide no ranking.

    Raises:
        PlanError: a score is not finite.
    """
    return {name: rounded(score, name) for name, score in scores.items()}


def rounded(score: float, name: str) -> float:
    """One score of module `name` to a relative 1e-5; see `round_scores`."""
    if not math.isfinite(score):
        raise PlanError(f"{name}: score is {score}; a decision needs finite scores")
    return float(f"{score:.5e}")


def allocate(gains: Mapping[str, Sequence[float]], layout: Layout, budget: Budget) -> dict[str, int]:
    """Return the ranks of largest total gain within `budget` (resolved), limits and ties; module -> rank, for every
    module.

    ``gains[module][i]`` is what direction i adds, not increasing with i. As many directions as it has entries can be
    had (more only where a minimum asks for them), and as many are taken as the budget allows, worthless ones too.
    The sum of gains is the greatest there is when all ranks cost the same and no bucket, multiple or tie applies;
    otherwise it falls short by at most the largest single increment. Of equal gains the lower direction goes first,
    then the earlier module, so that where all is equal ranks come out even.

    Raises:
        ConfigError: limits demand more than the budget, or the budget does not buy a single direction.
        PlanError: a gain is not finite.
    """
    options = Options.of(gains, layout, budget)
    ranks, left = list(options.least), options.left
    for i, rank in options.best_first(ranks):
        price = (rank - ranks[i]) * options.costs[i]
        if price <= left:  # a unit whose next step is too dear stays behind; cheaper ones go on
            left -= price
            ranks[i] = rank
    return options.bought(ranks)


@dataclass(frozen=True)
class Options:
    """The choices of an allocation: for each unit the cost of one more rank, how many directions it can have, and the
    least rank that limits allow."""

    gains: Mapping[str, Sequence[float]]
    layout: Layout
    budget: Budget
    units: Sequence[Unit]
    costs: Sequence[int]
    have: Sequence[int]
    least: Sequence[int]

    @classmethod
    def of(cls, gains: Mapping[str, Sequence[float]], layout: Layout, budget: Budget) -> Options:
        """Return the choices that `layout` allows. `gains` are as for `allocate`, and `budget` is resolved."""
        moving = units(layout)
        have = [min(len(gains.get(name, ())) for name in unit.names) for unit in moving]
        costs, least = [budget.price(unit) for unit in moving], [unit.span[0] for unit in moving]
        return cls(gains, layout, budget, moving, costs, have, least)

    @property
    def left(self) -> int:
        """What is left of the budget when every unit has its least rank.

        Raises:
            ConfigError: they cost more.
        """
        spent = sum(rank * cost for rank, cost in zip(self.least, self.costs, strict=True))
        if spent > self.budget.amount:
            raise ConfigError(
                f"budget is {self.budget} but limits allow no less than {self.budget.unit(spent)}; raise it or lower "
                "the minima"
            )
        return int(self.budget.amount) - spent

    def gain(self, i: int, first: int, last: int) -> float:
        """Return the gain of the directions of unit i from `first` up to but without `last`."""
        return math.fsum(g for name in self.units[i].names for g in self.gains.get(name, ())[first:last])

    def best_first(self, ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (unit, its next allowed rank), the most gain per cost first. A unit comes again if `ranks` gives it
        that rank."""
        offers: list[tuple[float, int, int, int]] = []  # (-gain per cost, rank, unit, next rank)

        def offer(i: int) -> None:
            a, b = ranks[i], next(self.units[i].ranks(ranks[i] + 1, self.have[i]), None)
            if b is not None:
                worth = self.gain(i, a, b) / ((b - a) * self.costs[i])
                heapq.heappush(offers, (-rounded(worth, str(self.units[i])), a, i, b))

        for i in range(len(self.units)):
            offer(i)
        while offers:
            _, _, i, b = heapq.heappop(offers)
            yield i, b
            if ranks[i] == b:
                offer(i)

    def by_module(self, ranks: Sequence[int]) -> dict[str, int]:
        """Return module -> rank, in the order of the layout."""
        chosen = {name: rank for unit, rank in zip(self.units, ranks, strict=True) for name in unit.names}
        return {name: chosen[name] for name in self.layout}

    def bought(self, ranks: Sequence[int]) -> dict[str, int]:
        """Return `by_module`, in which some rank must be above 0.

        Raises:
            ConfigError: every rank is 0.
        """
        if not any(ranks):
            raise ConfigError(f"budget of {self.budget} does not buy a single direction in any module; raise it")
        return self.by_module(ranks)


def even(layout: Layout, budget: Budget) -> dict[str, int]:
    """Return the ranks that spend the whole budget and are as equal as limits allow; module -> rank."""
    return allocate({name: [0.0] * slot.max_rank for name, slot in layout.items()}, layout, budget)


def proportional(
    weights: Mapping[str, float], layout: Layout, budget: Budget, most: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Return gains with which `allocate` gives ranks in proportion to `weights`: w / (i + 1/2) for direction i.

    This is Webster's method of apportionment: rank = round(c w) in every module that limits leave alone, with the one c
    that spends the budget (resolved). A module without a weight has 0. Past its `most` a module goes on, in the same
    order, only when all others with a weight are there.
    """
    most = {} if most is None else most

    def gain(name: str, slot: Slot, i: int) -> float:
        quotient = weights.get(name, 0.0) * budget.cost(slot) / (i + 0.5)
        return quotient if i < most.get(name, slot.max_rank) else quotient * _LATER

    return {name: [gain(name, slot, i) for i in range(slot.max_rank)] for name, slot in layout.items()}


def grow_by_score(
    scores: Mapping[str, float], layout: Layout, budget: Budget, top_k: int | None, grow_by: int
) -> dict[str, int]:
    """Return the ranks after one growth event, in which the `top_k` modules of highest score gain `grow_by` directions;
    module -> rank, of those that grew.

    Never passes the budget (resolved): the last event is cut short so that it is met exactly where ranks cost the
    same and no bucket, multiple or tie applies, else to less than one increment. What a module cannot take because
    of its limits goes to the next by score, and round again; `top_k` None grows until the budget is spent. Modules
    below their minimum are brought up to it first. Tied modules count as one, with their mean score; of equal scores
    the earlier module goes first; a module without a score has 0.

    Raises:
        ConfigError: minima demand more than the budget. PlanError: a score is not finite.
    """
    moving = units(layout)
    ranks = [max(unit.rank, unit.span[0]) for unit in moving]
    costs = [budget.price(unit) for unit in moving]
    left = int(budget.amount) - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if left < 0 and any(rank > unit.rank for rank, unit in zip(ranks, moving, strict=True)):
        raise ConfigError(f"budget is {budget} but minima ask for {budget.unit(budget.amount - left)}; raise it")
    means = [sum(scores.get(name, 0.0) for name in unit.names) / len(unit.names) for unit in moving]
    order = sorted(range(len(moving)), key=lambda i: (-rounded(means[i], str(moving[i])), i))
    shares = sum(slot.max_rank for slot in layout.values()) if top_k is None else top_k * grow_by
    grown = True
    while grown:
        grown = False
        for i in order:
            want = min(grow_by, shares)
            new = _next_rank(moving[i], ranks[i], want, left // costs[i])
            if want > 0 and new > ranks[i]:
                left -= (new - ranks[i]) * costs[i]
                shares -= new - ranks[i]
                ranks[i], grown = new, True
    return {name: rank for unit, rank in zip(moving, ranks, strict=True) if rank > unit.rank for name in unit.names}


def next_ranks(layout: Layout, budget: Budget, grow_by: int) -> dict[str, int]:
    """Return the rank that each module (tied ones together) would grow to next if it alone gained `grow_by`, within
    limits and what is left of the budget (resolved). Only modules that are in the adapter and would grow are named."""
    left = int(budget.amount) - budget.spent(layout)
    found = {}
    for unit in units(layout):
        rank = _next_rank(unit, unit.rank, grow_by, left // budget.price(unit))
        if rank > unit.rank > 0 and unit.allows(unit.rank):
            found |= dict.fromkeys(unit.names, rank)
    return found


def _next_rank(unit: Unit, rank: int, want: int, afford: int) -> int:
    """Return the allowed rank to grow to: the first that adds `want`, else the largest that fits, else `rank`
    itself."""
    ahead = next(unit.ranks(rank + want, rank + afford), None)
    return ahead if ahead is not None else max(unit.ranks(rank + 1, rank + min(want - 1, afford)), default=rank)


def allocation_margin(
    gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int], layout: Layout, budget: Budget
) -> float | None:
    """Return the margin of `ranks`, which `budget.allocate` gave: between the worst directions that a module has and
    the best that another module could have in their place, within budget and limits."""
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
    """Return the margin of `ranks`, to which `budget.grow_by_score` let modules grow: between the lowest score that
    grew and the next one below it that limits would have let grow."""
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
    """Return the least of the margins that are not None."""
    return min((m for m in margins if m is not None), default=None)
