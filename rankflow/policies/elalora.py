"""ElaLoRA: at every event the least important directions go, and the most important modules gain as many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from rankflow.budget import Budget, check_reachable, grow_by_score, reachable
from rankflow.errors import ConfigError
from rankflow.gate import Gate
from rankflow.linalg import orthogonality
from rankflow.plan import Layout, RankPlan
from rankflow.policy import Observation, Policy, Signal, State
from rankflow.pruning import best, prune
from rankflow.scores import TRIPLET_SIGNALS, complete, follow, measured, observe_triplets, triplet_scores
from rankflow.transitions import ops_to


@dataclass(frozen=True, kw_only=True)
class ElaLora(Policy):
    """ElaLoRA (arXiv 2504.00254): ranks move between modules at a constant budget.

    Directions are scored as AdaLoRA does (see `rankflow.scores`), with a diagonal Lambda between A and B. At each event
    the `move` directions of least score go, over all modules together, and the modules of highest mean score gain one
    each. A module that would do both keeps the better of what it would have lost instead. The budget is what the
    adapter has, or what is given, which it then comes to at the first event.

    Differs: from the paper or its released code,
    - optimizer state is carried: the released code means to, and loses all of it;
    - Lambda starts at 1 and B at 0, as a PEFT LoRA has it, and new directions likewise (there: Lambda of 1e-13);
    - new rows of A are drawn as PEFT draws them, not orthogonalised against the old ones; `orth` pulls them apart;
    - warm-up and final stretch without moves are `when.start` and `when.stop`; `move` does not change in between;
    - scores are taken on the `window` steps before each event; `window: 0` is every step.
    """

    move: Annotated[PositiveInt, Field(description="directions that change modules at each event")] = 4
    beta1: Annotated[float, Field(ge=0, lt=1, description="memory of the smoothed sensitivity I")] = 0.85
    beta2: Annotated[float, Field(ge=0, lt=1, description="memory of the uncertainty U")] = 0.85
    orth: Annotated[
        float, Field(ge=0, description="weight of the penalty that keeps A's rows and B's columns orthonormal; 0: off")
    ] = 0.1
    window: Annotated[NonNegativeInt, Field(description="steps before each event that are scored; 0: every step")] = 20

    needs: ClassVar[frozenset[Signal]] = TRIPLET_SIGNALS
    source: ClassVar[str] = "ElaLoRA, arXiv 2504.00254"

    @property
    def gate(self) -> Gate:
        return Gate()

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        return (lambda A, B: self.orth / 2 * orthogonality(A, B)) if self.orth > 0 else None

    def check(self, layout: Layout) -> None:
        if not self.when.events:
            raise ConfigError("elalora has no due step in its phase; check when.start, when.every and when.stop")
        if self.budget is not None:
            check_reachable(layout, self.budget)

    def listen(self, step: int) -> frozenset[Signal]:
        return self.needs if self.when.within(step, self.window) else frozenset()

    def init(self, layout: Layout) -> State:
        """`total`: the rank to be kept where there is no budget; then I and U of every entry."""
        return {"total": torch.tensor(layout.total_rank, dtype=torch.int64)}

    def observe(self, state: State, obs: Observation, step: int) -> State:
        return observe_triplets(state, obs, self.beta1, self.beta2)

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        scores = complete(triplet_scores(state), layout.ranks)
        if not measured(scores):
            return RankPlan(reason="all scores are zero, or none was finite; nothing moves")
        budget = self.budget or Budget("total_rank", int(state["total"]))
        cheapest = min(budget.cost(slot) for slot in layout.values())
        least, _ = reachable(layout, budget)
        room = Budget(budget.kind, max(1, least, int(budget.amount) - self.move * cheapest))
        pruned = RankPlan(prune(scores, layout, room)).apply_to(layout)
        means = {name: float(t.mean()) for name, t in scores.items()}
        ranks = {**pruned.ranks, **grow_by_score(means, pruned, budget, None, 1)}
        ops = {n: ops_to(ranks[n], slot.rank, best(n, scores)) for n, slot in layout.items()}
        moved = sum(max(0, ranks[name] - slot.rank) for name, slot in layout.items())
        return RankPlan(ops, f"{moved} directions move to the modules of highest score, at {budget}")

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        return follow(state, plan)
