"""From one rank to another: the ops that take a module there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rankflow.linalg.decompose import Metric
from rankflow.linalg.spectrum import Gauge, Spectrum
from rankflow.plans.plan import Drop, Grow, Keep, Op, Refactor

Shrink = Callable[[int], Sequence[Op]]


def ops_to(rank: int, now: int, shrink: Shrink) -> Sequence[Op]:
    """What takes a module from rank `now` to `rank`: growth, leaving the adapter, nothing, or what `shrink` says."""
    if rank > now:
        return [Grow(rank - now)]
    if rank == now:
        return []
    return [Drop()] if rank == 0 else shrink(rank)


def first(order: Sequence[int]) -> Shrink:
    """Shrinks to the directions that come first in `order`; they stay in the order they have."""
    return lambda rank: [Keep(tuple(sorted(order[:rank])))]


def best_cut(spectrum: Callable[[], Spectrum], metric: Metric = "weights", gauge: Gauge = "nearest") -> Shrink:
    """Shrinks to the best approximation in the metric of `spectrum`, which is asked for only when there is a cut.

    Growth supplies the directions that the factors at hand have no room for.
    """

    def shrink(rank: int) -> Sequence[Op]:
        cut = spectrum().cut(rank, gauge)
        return [Refactor(cut.N, cut.M, metric), *([Grow(cut.fresh)] if cut.fresh else [])]

    return shrink
