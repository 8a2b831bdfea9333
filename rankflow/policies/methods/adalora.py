"""AdaLoRA: directions scored by smoothed sensitivity, of which the least important are taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import prune, pruning_margin
from rankflow.policies._sensitivity import Triplets, frozen_last, measured, triplet_scores
from rankflow.policies._shrinking import Lowering
from rankflow.policies.base import State
from rankflow.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class AdaLora(Triplets, Lowering):
    """AdaLoRA (arXiv 2303.10512): at every event the directions of least score go, over all modules together.

    DeltaW = scaling * B diag(Lambda) A, and the total follows the budget curve.

    Each entry w of A, B and Lambda has the sensitivity |w dL/dw|, smoothed over steps to I, and an uncertainty U (see
    `rankflow.policies._sensitivity`); a direction's score is that of Lambda_i plus the means of I U over its row of A
    and its column of B. `orth` pulls the rows of A, and the columns of B, towards right angles with each other.

    When to use: to repeat AdaLoRA with tensors that really shrink. Start at about one and a half times the budget.

    Differs: from the paper, its released code and PEFT's AdaLoRA,
    - directions are physically removed, with their optimizer state; there the tensors keep their size until saved, and
      a masked direction can come back;
    - Lambda starts at 1 and B at 0, as a PEFT LoRA has it, so that attaching changes nothing; there Lambda starts at 0
      and both factors at N(0, 0.02^2). The scaling stays alpha / r of the first rank, and nothing divides it by what
      rank there is now;
    - so B holds the size of DeltaW, which there Lambda does, and the penalty leaves lengths alone: it is that of the
      paper without the diagonal, |off A A^T|_F + |off B^T B|_F. The paper's own pulls every row and column to length 1,
      which here would bring every singular value of DeltaW to the scaling, whatever the task;
    - the penalty's gradient is added once a step, after the loss's own has been averaged, and after clipping where
      `before_step` comes after it; there the penalty is a term of the loss (as it is here with `penalty="in_loss"`).
      The default weight, 0.1, is that of the released scripts (0.3 for RTE and STS-B there); PEFT's is 0.5;
    - Lambda is trained by an Adam of its own at the learning rate of the factors, without weight decay;
    - ties: upstream keeps fewer than the budget when scores are equal; here the budget is met exactly;
    - scores are taken on the `window` steps before each event, not on every step; `window: 0` is every step.
    """

    source: ClassVar[str] = "AdaLoRA, arXiv 2303.10512"

    def check(self, layout: Layout) -> None:
        if self.budget is None:
            raise ConfigError("adalora comes down to a budget; give it one, e.g. budget: {mean_rank: 8}")
        super().check(layout)

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        scores = triplet_scores(state)
        if not measured(scores):
            return RankPlan(reason="all scores are zero, or none was finite; nothing is removed")
        allowed = self.target(state, step)
        assert allowed is not None, "check refuses adalora without a budget"
        among = frozen_last(scores, layout)
        ops = prune(among, layout, allowed)
        left = allowed.unit(allowed.spent(RankPlan(ops).apply_to(layout)))
        reason = f"{len(ops)} of {len(layout)} modules give up directions of least score, to {left}"
        return RankPlan(ops, reason, margin=pruning_margin(among, ops, layout, allowed))
