"""AdaLoRA: directions scored by smoothed sensitivity, of which the least important are taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from rankflow.budget import Budget, check_lowers
from rankflow.errors import ConfigError
from rankflow.gate import Gate
from rankflow.linalg import orthogonality
from rankflow.plan import Layout, RankPlan
from rankflow.policy import Observation, Policy, Signal, State
from rankflow.pruning import prune
from rankflow.schedule import Curve, curve
from rankflow.scores import TRIPLET_SIGNALS, complete, follow, measured, observe_triplets, triplet_scores


@dataclass(frozen=True, kw_only=True)
class AdaLora(Policy):
    """AdaLoRA (arXiv 2303.10512): at every event the directions of least score go, over all modules together.

    DeltaW = scaling * B diag(Lambda) A, and the total follows the budget curve.

    Each entry w of A, B and Lambda has the sensitivity |w dL/dw|, smoothed over steps to I, and an uncertainty U (see
    `rankflow.scores`); a direction's score is that of Lambda_i plus the means of I U over its row of A and its column
    of B. `orth` pulls the rows of A and the columns of B towards orthonormal ones.

    Differs: from the paper, its released code and PEFT's AdaLoRA,
    - directions are physically removed, with their optimizer state; there the tensors keep their size until saved, and
      a masked direction can come back;
    - Lambda starts at 1 and B at 0, as a PEFT LoRA has it, so that attaching changes nothing; there Lambda starts at 0
      and both factors at N(0, 0.02^2). The scaling stays alpha / r of the first rank;
    - Lambda is trained by an Adam of its own at the learning rate of the factors;
    - ties: upstream keeps fewer than the budget when scores are equal; here the budget is met exactly;
    - scores are taken on the `window` steps before each event, not on every step; `window: 0` is every step.
    """

    beta1: Annotated[float, Field(ge=0, lt=1, description="memory of the smoothed sensitivity I")] = 0.85
    beta2: Annotated[float, Field(ge=0, lt=1, description="memory of the uncertainty U")] = 0.85
    orth: Annotated[
        float, Field(ge=0, description="weight of the penalty that keeps A's rows and B's columns orthonormal; 0: off")
    ] = 0.5
    shape: Annotated[Curve, Field(description="how the total comes down to the budget over the events")] = "cubic"
    window: Annotated[NonNegativeInt, Field(description="steps before each event that are scored; 0: every step")] = 20

    needs: ClassVar[frozenset[Signal]] = TRIPLET_SIGNALS
    source: ClassVar[str] = "AdaLoRA, arXiv 2303.10512"

    @property
    def gate(self) -> Gate:
        return Gate()

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        return (lambda A, B: self.orth / 2 * orthogonality(A, B)) if self.orth > 0 else None

    def check(self, layout: Layout) -> None:
        if self.budget is None:
            raise ConfigError("adalora comes down to a budget; give it one, e.g. budget: {mean_rank: 8}")
        if not self.when.events:
            raise ConfigError("adalora has no due step in its phase; check when.start, when.every and when.stop")
        check_lowers("adalora", layout, self.budget)

    def listen(self, step: int) -> frozenset[Signal]:
        return self.needs if self.when.within(step, self.window) else frozenset()

    def init(self, layout: Layout) -> State:
        """`total`: what the adapter cost when the phase began; then I and U of every entry."""
        spent = self.budget.spent(layout) if self.budget is not None else 0
        return {"total": torch.tensor(spent, dtype=torch.int64)}

    def observe(self, state: State, obs: Observation, step: int) -> State:
        return observe_triplets(state, obs, self.beta1, self.beta2)

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        budget = self.budget
        assert budget is not None, "check refuses adalora without a budget"
        scores = complete(triplet_scores(state), layout.ranks)
        if not measured(scores):
            return RankPlan(reason="all scores are zero, or none was finite; nothing is removed")
        total = curve(self.shape, float(state["total"]), budget.amount, self.when.progress(step))
        allowed = Budget(budget.kind, max(int(total), int(budget.amount)))
        ops = prune(scores, layout, allowed)
        return RankPlan(ops, f"{len(ops)} of {len(layout)} modules give up directions of least score, to {allowed}")

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        return follow(state, plan)
