"""ElaLoRA: at every event the least important directions go, and the most important modules gain as many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt

from rankflow.plans.allocate import closest, grow_by_score, growth_margin
from rankflow.plans.budget import Budget, reachable
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import best, ops_to, prune, pruning_margin
from rankflow.policies._sensitivity import Orth, Triplets, frozen_last, measured, triplet_scores
from rankflow.policies.base import State
from rankflow.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class ElaLora(Triplets):
    """ElaLoRA (arXiv 2504.00254): ranks move between modules at a constant budget.

    Directions are scored as AdaLoRA does (see `rankflow.policies._sensitivity`), with a diagonal Lambda between A and
    B. At each event the `move` directions of least score go, over all modules together, and the modules of highest mean
    score gain one each. A module that would do both keeps the better of what it would have lost instead. The budget is
    what the adapter has, or what is given, which it then comes to at the first event.

    When to use: the size of the adapter is fixed, and ranks should move to the modules that need them during the whole
    run.

    Differs: from the paper or its released code,
    - optimizer state is carried: the released code means to, and loses all of it;
    - Lambda starts at 1 and B at 0, as a PEFT LoRA has it, and new directions likewise (there: Lambda of 1e-13);
    - new rows of A are drawn as PEFT draws them, not orthogonalised against the old ones; `orth` pulls them apart;
    - warm-up and final stretch without moves are `when.start` and `when.stop`; `move` does not change in between;
    - scores are taken on the `window` steps before each event; `window: 0` is every step.
    """

    move: Annotated[PositiveInt, Field(description="directions that change modules at each event")] = 4
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
        cheapest = min(budget.cost(slot) for slot in layout.values())
        least, _ = reachable(layout, budget)
        room = Budget(budget.kind, max(1, least, int(budget.amount) - self.move * cheapest))
        lost = prune(scores, layout, room)
        pruned = RankPlan(lost).apply_to(layout)
        means = {name: float(t.mean()) for name, t in seen.items()}
        grown = grow_by_score(means, pruned, budget, None, 1)
        ranks = {**pruned.ranks, **grown}
        ops = {n: ops_to(ranks[n], slot.rank, best(n, scores)) for n, slot in layout.items()}
        moved = sum(max(0, ranks[name] - slot.rank) for name, slot in layout.items())
        margin = closest((pruning_margin(scores, lost, layout, room), growth_margin(means, grown, pruned)))
        after = budget.unit(budget.spent(layout.with_ranks(ranks)))
        if not moved:
            return RankPlan(ops, f"no module gains a direction, at {after}", margin=margin)
        return RankPlan(ops, f"{moved} directions move to the modules of highest score, at {after}", margin=margin)
