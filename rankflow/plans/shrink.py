"""Choose the directions that stay when modules lose some: the best of each by score, as many as limits and budget
allow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from rankflow.linalg.decompose import MetricName
from rankflow.linalg.spectrum import Gauge, Spectrum
from rankflow.plans.allocate import allocate, allocation_margin, round_scores
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.plans.limits import allowed_ranks
from rankflow.plans.ops import Drop, Grow, Keep, Op, Refactor
from rankflow.plans.plan import RankPlan

Shrink = Callable[[int], Sequence[Op]]


def ops_to(rank: int, now: int, shrink: Shrink) -> Sequence[Op]:
    """Return the ops that take a module from rank `now` to `rank`: growth, leaving the adapter, none, or those of
    `shrink`."""
    if rank > now:
        return [Grow(rank - now)]
    if rank == now:
        return []
    return [Drop()] if rank == 0 else shrink(rank)


def first(order: Sequence[int]) -> Shrink:
    """Return a function that shrinks a module to the directions that come first in `order`, in the order that they
    have."""
    return lambda rank: [Keep(tuple(sorted(order[:rank])))]


def best_cut(spectrum: Callable[[], Spectrum], metric: MetricName = "weights", gauge: Gauge = "nearest") -> Shrink:
    """Return a function that shrinks a module to the best approximation in a metric. `spectrum` is called only if it
    cuts.

    Growth supplies the directions that the factors at hand have no room for.
    """

    def shrink(rank: int) -> Sequence[Op]:
        cut = spectrum().cut(rank, gauge)
        return [Refactor(cut.N, cut.M, metric), *([Grow(cut.fresh)] if cut.fresh else [])]

    return shrink


def prune(
    scores: Mapping[str, Tensor],
    layout: Layout,
    budget: Budget | None = None,
    wanted: Mapping[str, Tensor] | None = None,
    unheard: Collection[str] = (),
) -> dict[str, Sequence[Op]]:
    """Return the ops that take directions out, by module. A module that does not change has none.

    Args:
        scores: ``[r]``, not negative, of every module that is there; comparable between modules. Rounded to 1e-5 of
            themselves; of equal ones the lower direction stays.
        budget: (resolved) what may be left; the directions of lowest score go first, over all modules.
        wanted: ``[r]`` bool; the others go whatever the budget. A module of which none is wanted leaves the adapter
            where limits allow rank 0, else it keeps its best. Limits, buckets and ties can keep more than are wanted.
            All may leave: see `rankflow.plans.last_direction`.
        unheard: modules that no gradient reaches, whose directions are worth nothing whatever their score.

    Raises:
        ConfigError: limits demand more than the budget. PlanError: a score is not finite.
    """
    values = {name: [0.0] * len(t) if name in unheard else _rounded(name, t) for name, t in scores.items()}
    order = {name: _order(of, None if wanted is None else wanted[name].tolist()) for name, of in values.items()}
    count = {name: len(of) if wanted is None else int(wanted[name].sum()) for name, of in values.items()}
    ranks = allowed_ranks(layout, count)
    if budget is not None and budget.spent(layout.with_ranks(ranks)) > budget.amount:
        gains = {name: sorted((values[name][i] for i in order[name][: ranks[name]]), reverse=True) for name in values}
        ranks = allocate(gains, layout, budget)
    ops = {name: ops_to(ranks[name], slot.rank, first(order.get(name, ()))) for name, slot in layout.items()}
    return {name: of for name, of in ops.items() if of}


def pruning_margin(
    scores: Mapping[str, Tensor], ops: Mapping[str, Sequence[Op]], layout: Layout, budget: Budget
) -> float | None:
    """Of `prune` under a budget, which gave `ops`; see `rankflow.plans.allocate`."""
    gains = {name: sorted(of.tolist(), reverse=True) for name, of in scores.items()}
    return allocation_margin(gains, RankPlan(ops).apply_to(layout).ranks, layout, budget)


def best(name: str, scores: Mapping[str, Tensor]) -> Shrink:
    """Return a function that shrinks the module to its directions of highest score ``[r]``."""
    return lambda rank: first(_order(_rounded(name, scores[name]), None))(rank)


def direction_sizes(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return scaling * |b_i| |a_i| ``[r]``, the most that each direction can add to DeltaW; over experts the root of
    the sum of squares. A is ``[*e, r, in]``, B ``[*e, out, r]``."""
    sizes = A.double().square().sum(-1) * B.double().square().sum(-2)
    return abs(scaling) * (sizes if sizes.dim() == 1 else sizes.sum(0)).sqrt()


def _order(values: list[float], wanted: list[bool] | None) -> list[int]:
    """Directions from the one that stays longest to the one that goes first."""
    return sorted(range(len(values)), key=lambda i: (wanted is not None and not wanted[i], -values[i], i))


def _rounded(name: str, t: Tensor) -> list[float]:
    return list(round_scores({f"{name}[{i}]": s for i, s in enumerate(t.double().tolist())}).values())
