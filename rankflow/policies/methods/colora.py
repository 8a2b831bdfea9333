"""CoLoRA: ranks in proportion to what each module's update contributes to the loss along the way to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt

from rankflow.errors import ConfigError
from rankflow.linalg.decompose import spectrum
from rankflow.linalg.spectrum import Spectrum
from rankflow.plans.allocate import allocate, allocation_margin, proportional
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.plans.shrink import best_cut, ops_to
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation, Signal, Study


@dataclass(frozen=True, kw_only=True)
class CoLora(Policy):
    """CoLoRA (arXiv 2408.01099), a reconstruction: a short probe run, then ranks by measured contribution.

    The steps before the event are the probe. What it learnt is scored by FAIG (arXiv 2108.01070), integrated gradients
    over the straight path from the pre-trained weights W to W + DeltaW, S = `points` passes over each batch:

        F = |DeltaW * 1/S sum_k dL/dW at W + p_k DeltaW|,  p_k = 1 - k/S,  k = 0 .. S-1

    entry by entry, averaged over `batches` batches: a left Riemann sum that starts at the adapter as it is. A module's
    contribution C is the mean of F over its weights (`per: weight`) or the sum (`per: module`). Each then gets the
    share delta = min(1, alpha (C / max C)^beta) of the parameters that it would have if trained in full, which is rank
    round(delta * out * in / (out + in)) within limits, with the alpha that meets the budget. Where no module
    contributes anything, ranks come out even; one that has left the adapter contributes nothing. Modules with too much
    rank are cut to their best approximation; growth does not change the function.

    When to use: some batches are at hand, and there is time and memory for a short study early in the run. Start at the
    mean rank of the budget.

    Reconstruction: the paper's code is not public. That C is a mean, the form of the map from C to a rank, and what the
    probe is follow from its figures and its project page, not from a formula of its text.

    Differs:
    - the probe is the LoRA run's own beginning, so that the path is a scaling of the adapter and no second set of
      weights is kept; it is not thrown away, and training goes on from it instead of from DeltaW = 0;
    - absolute values are taken per batch (FAIG: per image, which batches of one are), of the loss as the run has it;
    - a budget that delta = 1 cannot spend is spent beyond it;
    - biases and norms, which the paper seems to train in full, are whatever the user makes trainable;
    - its other half, pre-training on random degradations (PROD), is not a matter of ranks.
    """

    when: When = field(default_factory=lambda: When(start="10%", every="100%"))  # once

    per: Annotated[
        Literal["weight", "module"],
        Field(description="contribution of a module: mean over its weights, or their sum, which favours large modules"),
    ] = "weight"
    beta: Annotated[
        float, Field(ge=0, description="exponent of the contribution; 0: ranks by size alone, above 1: sharper")
    ] = 1.0
    points: Annotated[
        PositiveInt, Field(description="points of the path, S; each is a forward and a backward pass of every batch")
    ] = 10
    batches: Annotated[PositiveInt, Field(description="batches that contributions are averaged over")] = 8

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.PATH_SCORE})
    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True
    source: ClassVar[str] = "CoLoRA, arXiv 2408.01099 (reconstruction)"

    @property
    def studies(self) -> tuple[Study, ...]:
        path = tuple(1 - k / self.points for k in range(self.points))
        return (Study("contribution", self.needs, self.batches, points=path, when="every"),)

    @property
    def notes(self) -> tuple[str, ...]:
        each = self.batches * self.points
        return (f"colora takes {len(self.when.events)} decisions, each from {each} passes over batches of data",)

    def check(self, layout: Layout) -> None:
        if self.budget is None:
            raise ConfigError("colora spends a budget where it counts; give it one, e.g. budget: {mean_rank: 8}")
        self.require_events()
        super().check(layout)

    def listen(self, step: int) -> frozenset[Signal]:
        return frozenset()  # the study hears it all

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        budget = self.budget
        assert budget is not None, "check refuses colora without a budget"
        seen = obs.gather(Signal.PATH_SCORE)
        if not seen:
            return RankPlan(reason="no contribution was measured; nothing changes")
        device = next(iter(seen.values())).device
        totals = dict(zip(seen, torch.stack([s.to(device) for s in seen.values()]).double().tolist(), strict=True))
        size = {
            name: slot.out_features * slot.in_features if self.per == "weight" else 1 for name, slot in layout.items()
        }
        contribution = {name: totals.get(name, 0.0) / size[name] for name in layout}
        best = max(layout, key=lambda name: contribution[name])
        top = contribution[best]
        full = {name: _full_rank(slot) for name, slot in layout.items()}
        weights = {name: (c / top) ** self.beta * full[name] if top > 0 else 0.0 for name, c in contribution.items()}
        most = {name: round(rank) for name, rank in full.items()}
        gains = proportional(weights, layout, budget, most)
        ranks = allocate(gains, layout, budget)
        ops = {
            name: ops_to(rank, layout[name].rank, best_cut(partial(_spectrum, obs, name, layout[name])))
            for name, rank in ranks.items()
        }
        changed = sum(rank != layout[name].rank for name, rank in ranks.items())
        spent = budget.unit(budget.spent(layout.with_ranks(ranks)))
        why = f"{best} contributes most" if top > 0 else "no module contributes anything, so ranks are even"
        margin = allocation_margin(gains, ranks, layout, budget)
        return RankPlan(ops, f"{changed} of {len(layout)} modules change, for {spent}; {why}", margin=margin)


def _full_rank(slot: Slot) -> float:
    """The rank at which a module's factors hold as many parameters as its weight."""
    return slot.out_features * slot.in_features / (slot.out_features + slot.in_features)


def _spectrum(obs: Observation, name: str, slot: Slot) -> Spectrum:
    return spectrum(obs[name][Signal.A], obs[name][Signal.B], slot.scaling)
