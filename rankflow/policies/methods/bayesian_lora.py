"""Bayesian-LoRA: gates learn how many directions every module needs, and how many bits each of its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rankflow.plans.budget import check_lowers
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Drop
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import prune
from rankflow.policies._quantizer import THRESHOLD
from rankflow.policies.base import Policy, State
from rankflow.policies.bits_and_rank import BitsAndRank
from rankflow.policies.gate import Gate
from rankflow.policies.observation import Observation, Signal


@dataclass(frozen=True, kw_only=True)
class BayesianLora(Policy):
    """B-LoRA (arXiv 2406.13046), a reconstruction: gates learn every module's rank and every factor's bits.

    The gates are hard-concrete, with a prior that prefers them closed, and trained along with the factors: one for each
    direction, and those that double a factor's bits, from 2 to 4, 8, 16 and 32.

    No code of it was found. The quantiser follows Bayesian Bits (arXiv 2005.07093), which the paper extends; how ranks
    are gated is our reading of it. A direction whose gate is closed leaves the adapter at the next due step. A budget,
    where one is given, is a bound: at the last due step the directions of least P(z > 0) go until it holds. From
    `fix_at` on gates are 0 or 1 for good, and factors learn to live with that. When the phase ends the factors are
    written dequantised, as plain LoRA; `rankflow.save_quantized` puts the integers beside them.

    When to use: the adapter has to be small in bytes, and bits may be traded for ranks. Steps take about twice the time
    of plain LoRA's.

    Differs:
    - there is no diagonal E between B and A unless asked for, and it begins with 1, not 0: PEFT's B is 0, and with both
      at 0 nothing would ever learn. E is trained at the factors' rate, without weight decay;
    - A begins as PEFT draws it and B with 0, neither with N(0, 0.02^2). A range begins with its tensor's largest entry,
      which for B would be 0, so with `range_init` there (5 of those 0.02); that of E with 1.5, whose grids all hold 1;
    - Bayesian Bits keeps closed channels until all gates are fixed; here closed directions leave when due, for good;
    - `mu` is 1e-4, not the 0.01 to 0.2 of Bayesian Bits, which in an adapter of many modules closes nearly everything;
    - activations are not quantised, and there is no orthogonality term.
    """

    rank_gates: Annotated[
        Literal["independent", "nested"],
        Field(description="every direction has its own gate, or counts only while all before it are open"),
    ] = "independent"
    diagonal: Annotated[bool, Field(description="a trained diagonal between A and B, quantised like them")] = False
    mu: Annotated[NonNegativeFloat, Field(description="weight of the penalty on open gates; more closes more")] = 1e-4
    weights: Annotated[
        Literal["const", "bop"],
        Field(description="what open gates are charged: all alike, or their bits times the tensor's share of the work"),
    ] = "const"
    gate_init: Annotated[
        float, Field(gt=THRESHOLD, le=20, description="logit that gates begin with; they close below -0.935")
    ] = 6.0
    gate_lr: Annotated[PositiveFloat, Field(description="learning rate of logits, in Adam")] = 1e-3
    range_lr: Annotated[PositiveFloat, Field(description="learning rate of the quantisers' ranges, in Adam")] = 1e-3
    range_init: Annotated[
        PositiveFloat, Field(description="range that a factor of zeros, as a new LoRA's B, begins with")
    ] = 0.1
    fix_at: Annotated[
        float, Field(gt=0, le=1, description="share of the phase after which gates stay as they are; 1: never")
    ] = 0.75

    grows: ClassVar[bool] = False
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.GATE_OPEN, Signal.GATE_SCORE})
    takes_budget: ClassVar[bool] = True
    source: ClassVar[str] = "B-LoRA, arXiv 2406.13046 (reconstruction)"

    @property
    def gate(self) -> Gate:
        return BitsAndRank(
            nested=self.rank_gates == "nested",
            diagonal=self.diagonal,
            mu=self.mu,
            by_cost=self.weights == "bop",
            first=self.gate_init,
            gate_lr=self.gate_lr,
            range_lr=self.range_lr,
            zeros=self.range_init,
            last=self.when.at(self.fix_at),
        )

    @property
    def settling(self) -> float:
        """Half of what follows `fix_at`: in the other half what is closed for good can leave."""
        return (1 - self.fix_at) / 2

    @property
    def notes(self) -> tuple[str, ...]:
        steps, way = self._trained, self.gate_init - THRESHOLD
        if self.gate_lr * steps >= way:
            return ()
        return (
            f"bayesian_lora: Adam moves a logit by about gate_lr {self.gate_lr:g} a step, so in the {steps} steps that "
            f"gates are trained none gets from {self.gate_init:g} to {THRESHOLD:.3f}, where it closes; gate_lr "
            f"{2 * way / max(steps, 1):.2g} would leave time for that",
        )

    @property
    def _trained(self) -> int:
        """Steps on which gates are trained."""
        return self.when.at(self.fix_at) - self.when.at(0)

    def stuck(self, layout: Layout) -> str | None:
        way = self.gate_init - THRESHOLD
        if self.budget is not None or self.gate_lr * self._trained >= way:
            return None
        return (
            f"in {self._trained} steps gates come about {self.gate_lr * self._trained:.2g} of the {way:.3g} that takes "
            "them from gate_init to where they close; raise gate_lr"
        )

    def check(self, layout: Layout) -> None:
        self.require_events()
        if self.budget is not None:
            check_lowers("bayesian_lora", layout, self.budget)
        super().check(layout)

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        scores, is_open = obs.gather(Signal.GATE_SCORE), obs.gather(Signal.GATE_OPEN)
        budget = self.budget if step == self.when.events[-1] else None
        ops = prune(scores, layout, budget, is_open, obs.unheard)
        shut = [name for name, on in is_open.items() if not bool(on.any())]
        kept = [name for name in shut if not any(isinstance(op, Drop) for op in ops.get(name, ()))]
        left = sum(int(on.sum()) for on in is_open.values())
        reason = [f"{left} of {layout.total_rank} gates are open"]
        if ops:
            reason.append(f"{len(ops)} modules change" + (f", to be within {budget}" if budget is not None else ""))
        if len(shut) > len(kept):
            reason.append(f"{len(shut) - len(kept)} leave the adapter")
        if kept:
            reason.append(f"no gate is open in {len(kept)} that keep their best direction, {kept[0]} the first")
        return RankPlan(ops, "; ".join(reason))
