"""RigL: the weakest directions make room for new ones where the gradient is largest; the budget stays."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.linalg.growth import gradient_directions
from rankflow.plans.allocate import allocate, rounded
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop, Grow, Keep, Op
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import curve
from rankflow.plans.shrink import direction_sizes
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation, Signal

Queue = list[tuple[float, int | None]]  # (gain, direction) by gain; None for a direction that is new

_KEPT = 1e9  # times the strongest candidate: no kept direction is ever given up for one
_FILLER = -1.0  # a direction that no gradient asks for: only to meet a budget or a minimum


@dataclass(frozen=True, kw_only=True)
class RigL(Policy):
    """RigL (arXiv 1911.11134) for LoRA directions: at each event some are dropped and as many grown elsewhere.

    The share `rate` f(t) of all directions is dropped, f decaying to 0 between the first event and the end of the
    events: those of smallest |s| |b_i| |a_i|, the norm of what they add to DeltaW. As many are grown where the gradient
    of DeltaW is largest outside the row space that a module has: its singular values there are the strengths of a
    module's candidates, and the candidates of all modules compete, within limits. New directions start with B at 0.

    A dropped direction is itself a candidate, as strong as the gradient along its row (outside the rows that are kept),
    and if it wins it is left as it is, bit for bit, as in SpIEL (arXiv 2401.16405).

    With a budget above what there is, the first event fills it; without one the total rank stays what it was. Where
    costs differ, the total is never above the budget and within one direction of it.

    A module at rank 0 has no gradient to show. It competes, for one random direction, with the strength of its best
    candidate when it was last measured. One that was never measured comes back only to meet a budget or its minimum.
    A module that is frozen neither loses nor gains; one that trains, and that no gradient has reached yet, loses first.
    Layers that have no sketch (DoRA, attention, experts) are refused when the run starts.

    When to use: the size of the adapter is fixed, and directions, not only ranks, should be chosen again during the
    whole run.

    Differs:
    - directions instead of weights, and one competition over all modules, where RigL moves weights within a layer;
    - the gradient of DeltaW is known from random rows of it (the sketch), whose singular values stand for its own;
    - the event comes after the optimizer's step instead of in its place;
    - `rate` and its linear fading are SpIEL's; RigL's are 0.3 and `cosine`.
    """

    rate: Annotated[float, Field(gt=0, le=1, description="share of all directions dropped at the first event")] = 0.2
    fade: Annotated[
        Literal["linear", "cosine"], Field(description="how that share comes down to 0 at the end of the events")
    ] = "linear"

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.SKETCH})
    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True
    source: ClassVar[str] = "RigL, arXiv 1911.11134, on LoRA directions"

    def check(self, layout: Layout) -> None:
        self.require_events()
        budget = self.held_total(layout)
        if budget.spent(layout) > budget.amount:
            raise ConfigError(
                f"rigl moves directions and gives none up, but the adapter has {budget.unit(budget.spent(layout))} and "
                f"its budget is {budget}; raise the budget, or put a policy that shrinks before it"
            )

    @property
    def beyond_ranks(self) -> bool:
        return True  # a module's own new directions may take the places of its weakest

    def stuck(self, layout: Layout) -> str | None:
        full = self.budget is None or self.budget.spent(layout) >= self.budget.amount
        if full and round(self.rate * layout.total_rank) == 0:
            return f"rate {self.rate:g} of {layout.total_rank} directions is less than one; raise it"
        return None

    def init(self, layout: Layout) -> State:
        """`total`: the rank to be held without a budget; then strengths of candidates ``[k]`` by module, float64."""
        return {"total": torch.tensor(layout.total_rank, dtype=torch.int64)}

    def observe(self, state: State, obs: Observation, step: int) -> State:
        state = dict(state)
        for name, signals in obs.items():
            if all(signal in signals for signal in self.needs):
                strengths, _ = gradient_directions(signals[Signal.A], signals[Signal.SKETCH])
                state[f"strengths/{name}"] = strengths.cpu()
        return state

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        moving = [name for name, slot in layout.items() if slot.trainable and Signal.SKETCH in obs.get(name, {})]
        sizes = {
            name: (
                direction_sizes(obs[name][Signal.A], obs[name][Signal.B], slot.scaling) * (name not in obs.unheard)
            ).tolist()
            for name, slot in layout.items()
            if slot.rank > 0
        }
        dropped = self._weakest({name: sizes[name] for name in moving}, layout, step)
        queues: dict[str, Queue] = {}
        for name, slot in layout.items():
            strengths = state.get(f"strengths/{name}", torch.zeros(0)).tolist()
            seen = len(strengths) if name in moving else int(slot.rank == 0 and slot.trainable)
            candidates: Queue = [(s, None) for s in strengths[:seen]]
            if name in dropped:
                candidates = [*_again(obs[name], dropped[name]), *candidates]
            queues[name] = _queue(name, slot, sizes.get(name, []), dropped.get(name, set()), candidates)
        ranks = self._allocate(queues, layout, state)
        ops: dict[str, list[Op]] = {}
        for name, slot in layout.items():
            stay = [i for _, i in queues[name][: ranks[name]] if i is not None]
            if found := _ops(slot, stay, ranks[name], obs.get(name, {})):
                ops[name] = found
        weakest = sum(map(len, dropped.values()))
        if not ops:
            return RankPlan(reason=f"none of the {weakest} weakest directions would do better elsewhere")
        grown = [op.n for found in ops.values() for op in found if isinstance(op, Grow)]
        reason = f"{weakest} weakest directions may move; {sum(grown)} grow in {len(grown)} modules"
        still = sum(slot.rank > 0 for slot in layout.values()) - len(moving)
        return RankPlan(ops, reason + (f"; {still} modules are frozen or show no gradient" if still else ""))

    def _weakest(self, sizes: Mapping[str, list[float]], layout: Layout, step: int) -> dict[str, set[int]]:
        """The directions to drop at `step`, by module. Of equal ones the last goes first, so that where all is equal
        modules lose evenly."""
        events = self.when.events
        share = curve(self.fade, self.rate, 0.0, (step - events.start) / (events.stop - events.start))
        found = [(rounded(s, name), -i, -at, name) for at, name in enumerate(sizes) for i, s in enumerate(sizes[name])]
        dropped: dict[str, set[int]] = {}
        for _, i, _, name in heapq.nsmallest(round(share * layout.total_rank), found):
            dropped.setdefault(name, set()).add(-i)
        return dropped

    def _allocate(self, queues: Mapping[str, Queue], layout: Layout, state: State) -> dict[str, int]:
        budget = self.budget if self.budget is not None else Budget("total_rank", int(state["total"]))
        strongest = max((gain for queue in queues.values() for gain, _ in queue if 0 < gain < math.inf), default=1.0)
        gains = {name: [min(gain, _KEPT * strongest) for gain, _ in queue] for name, queue in queues.items()}
        return allocate(gains, layout, budget)


def _again(signals: Mapping[Signal, Tensor], dropped: set[int]) -> Queue:
    """The dropped directions as candidates: the gradient along their rows, outside the rows that are kept."""
    a = signals[Signal.A].double()
    kept, lost = [i for i in range(len(a)) if i not in dropped], sorted(dropped)
    strengths, directions = gradient_directions(a[kept], signals[Signal.SKETCH])
    rows = torch.nn.functional.normalize(a[lost], dim=-1).to(directions.device)
    along = (strengths[:, None] * (directions @ rows.mT)).norm(dim=0)
    return list(zip(along.tolist(), lost, strict=True))


def _queue(name: str, slot: Slot, sizes: list[float], dropped: set[int], candidates: Queue) -> Queue:
    """What a module would have, the best first: what it keeps, its candidates, fillers."""
    kept = sorted((i for i in range(len(sizes)) if i not in dropped), key=lambda i: -sizes[i])
    ranked = sorted(candidates, key=lambda c: -rounded(c[0], name))  # of equal ones a dropped direction stays first
    queue: Queue = [*((math.inf, i) for i in kept), *ranked]
    return [*queue, *[(_FILLER, None)] * (slot.max_rank - len(queue))] if slot.trainable else queue


def _ops(slot: Slot, stay: list[int], rank: int, signals: Mapping[Signal, Tensor]) -> list[Op]:
    """From `slot` to `rank`, with the directions `stay` among them."""
    ops: list[Op] = []
    if len(stay) < slot.rank:
        ops.append(Keep(tuple(sorted(stay))) if stay else Drop())
    if (fresh := rank - len(stay)) > 0:
        sketch = None
        if Signal.SKETCH in signals:
            strengths, directions = gradient_directions(signals[Signal.A], signals[Signal.SKETCH])
            sketch = strengths[:fresh, None] * directions[:fresh]
        ops.append(Grow(fresh, "grad", sketch) if sketch is not None and len(sketch) else Grow(fresh))
    return ops
