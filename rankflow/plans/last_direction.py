"""Change a plan that would take everything that trains out of the adapter, so that one direction stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import Tensor

from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import units
from rankflow.plans.ops import Op, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import first


def spare_last(
    plan: RankPlan, layout: Layout, live: Collection[str], sizes: Callable[[str], Tensor]
) -> tuple[RankPlan, str | None]:
    """Return `plan`, changed to keep one module if it would have left none that trains, and that module or None.

    The module with the largest direction stays, and those that are tied to it, with as few directions as limits allow.

    Args:
        live: modules that a gradient reaches. Only these count, as long as one of them is in the adapter and trains.
        sizes: of a module's directions, ``[r]``.

    Raises:
        PlanError: the plan does not fit the layout.
    """
    training = [name for name, slot in layout.items() if slot.rank > 0 and slot.trainable]
    last = [name for name in training if name in live] or training
    counts = set(live) if set(last) & set(live) else set(layout)
    if not last or any(_trains(layout[name], plan.ops.get(name, ())) for name in layout if name in counts):
        return plan, None
    best = max(last, key=lambda name: float(sizes(name).max()))
    unit = next(unit for unit in units(layout) if best in unit.names)
    rank = next(unit.ranks(1, unit.rank), unit.rank)
    ops = dict(plan.ops)
    for name in unit.names:
        order = sizes(name).argsort(descending=True, stable=True).tolist()
        stays = [op for op in ops.get(name, ()) if not isinstance(op, Train)]
        if _rank(layout[name], stays) == 0:
            stays = [] if rank == layout[name].rank else first(order)(rank)
        ops[name] = tuple(stays)
    kept = f"{best} keeps {rank if rank > 1 else 'one'} of its directions, the last that train"
    return replace(plan, ops=ops, reason="; ".join(filter(None, (plan.reason, kept)))), best


def _rank(slot: Slot, ops: Sequence[Op]) -> int:
    rank = slot.rank
    for op in ops:
        rank = op.rank_after(rank)
    return rank


def _trains(slot: Slot, ops: Sequence[Op]) -> bool:
    """Whether the module is in the adapter, and trains, after `ops`."""
    on = [op.on for op in ops if isinstance(op, Train)]
    return _rank(slot, ops) > 0 and (on[-1] if on else slot.trainable)
