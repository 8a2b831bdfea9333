"""ElaLoRA: at every event the least important directions go, and the most important modules gain as many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.plans.allocate import allocate, allocation_margin, closest
from rankflow.plans.budget import Budget, reachable
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import best, ops_to, prune, pruning_margin
from rankflow.policies._sensitivity import Orth, Triplets, frozen_last, measured, triplet_scores
from rankflow.policies.base import State
from rankflow.policies.observation import Observation

_KEPT = 1e9  # times the best score that may say who grows: what a direction is worth that stays
_FILLER = -1.0  # and one that no score asks for


@dataclass(frozen=True, kw_only=True)
class ElaLora(Triplets):
    """ElaLoRA (arXiv 2504.00254): ranks move between modules at a constant budget.

    Directions are scored as AdaLoRA does (see `rankflow.policies._sensitivity`), with a diagonal Lambda between A and
    B. Of every module the `candidates` directions of least score take part in an event, but never all that it has. Of
    all of these, the b of least score go, and the b of greatest score say who grows: a module gains as many directions
    as it has among them. b falls from `move` as 1 - p^3, p the share of the way from one `when.every` before the first
    event to `when.stop`. A module that would both lose and gain keeps the better of what it would have lost instead.
    The budget is what the adapter has, or what is given, which it then comes to at the first event.

    When to use: the size of the adapter is fixed, and ranks should move to the modules that need them during the whole
    run.

    Differs: from the paper or its released code,
    - optimizer state is carried: the released code means to, and loses all of it;
    - Lambda starts at 1 and B at 0, as a PEFT LoRA has it, and new directions likewise; there Lambda starts at 0 (new:
      1e-13) between random factors. So the penalty leaves lengths alone, as AdaLoRA's does here;
    - new rows of A are drawn as PEFT draws them, not orthogonalised against the old ones; `orth` pulls them apart;
    - a module that would both lose and gain does both there: the direction lost, which may be the best of what it has
      in the event, makes room for a random one;
    - limits, ties and budgets: what a module may not gain goes to the next by score. The released code knows none;
    - b falls with its `enable_scheduler`, which its image scripts set and its GLUE scripts do not;
    - warm-up and final stretch without moves are `when.start` and `when.stop`;
    - scores are taken on the `window` steps before each event; `window: 0` is every step, as there.
    """

    move: Annotated[PositiveInt, Field(description="b, directions that change modules at the first event")] = 4
    candidates: Annotated[
        PositiveInt, Field(description="k, directions of each module that may go, or say that it grows, at an event")
    ] = 2
    orth: Orth = 0.1

    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True
    source: ClassVar[str] = "ElaLoRA, arXiv 2504.00254"

    def check(self, layout: Layout) -> None:
        self.require_events()
        self.held_total(layout)

    def init(self, layout: Layout) -> State:
        """`total`: the rank to be kept where there is no budget; then I and U of every entry."""
        return {"total": torch.tensor(layout.total_rank, dtype=torch.int64)}

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        seen = triplet_scores(state)
        if not measured(seen):
            return RankPlan(reason="all scores are zero, or none was finite; nothing moves")
        budget = self.budget or Budget("total_rank", int(state["total"]))
        scores = frozen_last(seen, layout)
        least = {name: self._least(of, layout[name].trainable) for name, of in scores.items()}
        spared = _others_last(scores, least)
        room = self._room(layout, budget, step)
        lost = prune(spared, layout, room)
        pruned = RankPlan(lost).apply_to(layout)
        gains = self._gains(scores, least, pruned)
        ranks = allocate(gains, pruned, budget)
        ops = {n: ops_to(ranks[n], slot.rank, best(n, spared)) for n, slot in layout.items()}
        moved = sum(max(0, ranks[name] - slot.rank) for name, slot in layout.items())
        margins = pruning_margin(spared, lost, layout, room), allocation_margin(gains, ranks, pruned, budget)
        after = budget.unit(budget.spent(layout.with_ranks(ranks)))
        if not moved:
            return RankPlan(ops, f"no module gains a direction, at {after}", margin=closest(margins))
        reason = f"{moved} directions move to the modules whose least scores are highest, at {after}"
        return RankPlan(ops, reason, margin=closest(margins))

    def _moving(self, step: int) -> int:
        """How many directions move at the event at `step`: round(move (1 - p^3)), as the released scheduler has it."""
        events = self.when.events
        begin = events.start - events.step
        return round(self.move * (1 - ((step - begin) / (events.stop - begin)) ** 3))

    def _room(self, layout: Layout, budget: Budget, step: int) -> Budget:
        """What is left when the event's directions are gone."""
        cheapest = min(budget.cost(slot) for slot in layout.values())
        least, _ = reachable(layout, budget)
        here = min(budget.spent(layout), int(budget.amount))
        return Budget(budget.kind, max(1, least, here - self._moving(step) * cheapest))

    def _least(self, scores: Tensor, trainable: bool) -> list[int]:
        """The directions of a module that take part in an event, the least first; of equal ones the last."""
        order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), -i))
        return order[: min(self.candidates, len(order) - 1)] if trainable else []

    def _gains(
        self, scores: Mapping[str, Tensor], least: Mapping[str, Sequence[int]], pruned: Layout
    ) -> dict[str, list[float]]:
        """What each direction of a module is worth, of those it would have: all that it keeps, then one for each of its
        scores that took part, then what only a budget or a minimum asks for."""
        offers = {n: sorted((float(scores[n][i]) for i in of), reverse=True) for n, of in least.items()}
        kept = _KEPT * (max((max(of) for of in offers.values() if of), default=0.0) or 1.0)
        gains = {}
        for name, slot in pruned.items():
            more = [*offers.get(name, ()), *[_FILLER] * slot.max_rank] if slot.trainable else []
            gains[name] = [*[kept] * slot.rank, *more[: max(0, slot.max_rank - slot.rank)]]
        return gains


def _others_last(scores: Mapping[str, Tensor], least: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return `scores` in which all directions but those that take part come after them, in their own order."""
    top = max((float(of[i]) for name, of in scores.items() for i in least[name]), default=0.0)
    found = {}
    for name, of in scores.items():
        found[name] = of + top
        found[name][least[name]] = of[least[name]]
    return found
