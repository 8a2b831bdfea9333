"""IncreLoRA: ranks grow where the update matters and its importance is still uncertain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.budget import Budget, check_reachable, grow_by_score
from rankflow.errors import ConfigError
from rankflow.limits import units
from rankflow.linalg import orthogonality
from rankflow.plan import Grow, Layout, Op, RankPlan, Refactor, Slot
from rankflow.policy import Observation, Policy, Signal, State
from rankflow.scores import smoothed


@dataclass(frozen=True, kw_only=True)
class IncreLora(Policy):
    """IncreLoRA (arXiv 2308.12043): start small, and at each event add directions to the modules of highest score.

    With s_t = sum |DeltaW * dL/dDeltaW| / sqrt(out * in) of a module at step t, its smoothed sensitivity and
    uncertainty are I_t = beta1 I_{t-1} + (1 - beta1) s_t and U_t = beta2 U_{t-1} + (1 - beta2) |s_t - I_t|, both 0 at
    first, and its score is I_t U_t. A step whose score is not finite counts for nothing.

    Differs: from the released code,
    - the budget is met exactly: it counts modules against ranks, and passes its target when it adds several at once;
    - scores come from all micro-batches of a step, not the last alone, and from `window` steps before each event, not
      from every step (`window: all` with `score_fraction: 1` does that);
    - scaling stays as it is, so growth never changes the function: the released code divides by the rank, which
      shrinks the old DeltaW by r / (r + n) at every growth (`rescale: official` does that);
    - the first growth is at `start`, not one interval later, and comes after the optimizer's step;
    - directions are plain rows of A and columns of B: no diagonal between them, no reserve that learns in advance, and
      new directions ramp up in the optimizer instead of restarting its learning rate;
    - the orthogonality penalty takes a module's whole factors, as its trainer does; its library helper takes the
      pieces one by one, which for pieces of rank 1 only pulls norms to 1. It is off unless asked for.
    """

    top_k: Annotated[
        Literal["auto"] | PositiveInt,
        Field(description="modules that grow at each event; auto: as many as reach the budget by the last one"),
    ] = "auto"
    grow_by: Annotated[PositiveInt, Field(description="directions that a module gains when it grows")] = 2
    beta1: Annotated[float, Field(ge=0, lt=1, description="memory of the smoothed sensitivity I")] = 0.85
    beta2: Annotated[float, Field(ge=0, lt=1, description="memory of the uncertainty U")] = 0.85
    score: Annotated[
        Literal["exact", "sampled"],
        Field(description="the score from all rows of DeltaW, or estimated from a seeded sample of them"),
    ] = "exact"
    window: Annotated[
        Literal["all"] | PositiveInt, Field(description="steps before each event that are scored; all: every step")
    ] = 20
    score_fraction: Annotated[
        float, Field(gt=0, le=1, description="scored steps are at most this share of the run; windows shrink to it")
    ] = 0.08
    rescale: Annotated[
        Literal["preserve", "official"],
        Field(description="what growth does to the old DeltaW: nothing, or times r / (r + n) as the released code"),
    ] = "preserve"
    grow_init: Annotated[
        Literal["zero_b", "grad"],
        Field(description="new rows of A: random as a new LoRA's, or leading directions of the gradient of DeltaW"),
    ] = "zero_b"
    orth: Annotated[
        float, Field(ge=0, description="weight of the penalty that keeps A's rows and B's columns orthonormal; 0: off")
    ] = 0.0

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED, Signal.SKETCH})
    source: ClassVar[str] = "IncreLoRA, arXiv 2308.12043"

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """orth / 2 (|A A^T - 1|_F + |B^T B - 1|_F), which averaged over modules is the paper's regulariser."""
        return (lambda A, B: self.orth / 2 * orthogonality(A, B)) if self.orth > 0 else None

    @property
    def scored(self) -> int | None:
        """Steps scored before each event, its own among them; None: all steps."""
        wanted = None if self.window == "all" else self.window
        if self.score_fraction == 1 or not self.when.events:
            return wanted
        share = max(1, int(self.score_fraction * (self.when.run or self.when.events[-1]) / len(self.when.events)))
        return share if wanted is None else min(wanted, share)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.scored is None or (self.window != "all" and self.scored >= self.window):
            return ()
        asked = "every step" if self.window == "all" else f"{self.window} steps"
        return (
            f"increlora scores {self.scored} steps before each of {len(self.when.events)} events, not {asked}, to stay "
            f"within score_fraction {self.score_fraction:g} of the run",
        )

    def check(self, layout: Layout) -> None:
        if self.budget is None:
            raise ConfigError("increlora grows towards a budget; give it one, e.g. budget: {mean_rank: 8}")
        budget, events = self.budget, len(self.when.events)
        missing = int(budget.amount) - budget.spent(layout)
        if missing < 0:
            raise ConfigError(
                f"increlora only grows, but the adapter already has {budget.unit(budget.spent(layout))} of a budget of "
                f"{budget}; start from a smaller rank or raise the budget"
            )
        check_reachable(layout, budget)
        if missing and not events:
            raise ConfigError("increlora has no due step in its phase; check when.start, when.every and when.stop")
        if isinstance(self.top_k, int):
            most = events * self.top_k * self.grow_by * min(_costs(layout, budget))
            if most < missing:
                raise ConfigError(
                    f"{events} events of top_k {self.top_k} times grow_by {self.grow_by} add {budget.unit(most)}, but "
                    f"{budget.unit(missing)} are missing to the budget; raise one of them or leave top_k at auto"
                )

    def listen(self, step: int) -> frozenset[Signal]:
        due = self.when.next(step - 1)
        if due is None or (self.scored is not None and due - step >= self.scored):
            return frozenset()
        signals = {self._score_signal}
        if self.grow_init == "grad" and step == due:
            signals.add(Signal.SKETCH)
        return frozenset(signals)

    @property
    def _score_signal(self) -> Signal:
        return Signal.DELTA_SCORE if self.score == "exact" else Signal.DELTA_SCORE_SAMPLED

    def init(self, layout: Layout) -> State:
        return {name: torch.zeros(3, dtype=torch.float64) for name in layout}

    def observe(self, state: State, obs: Observation, step: int) -> State:
        """Update (I, U, step of the last finite score), float64 ``[3]`` per module."""
        seen = obs.gather(self._score_signal)
        if not seen:
            return state
        device = next(iter(seen.values())).device
        # Experts are blocks of one DeltaW: the sum over all of them, over the root of how many entries they have.
        scores = torch.stack([s.sum().to(device) / math.sqrt(s.numel()) for s in seen.values()]).double().tolist()
        state = dict(state)
        for name, s in zip(seen, scores, strict=True):
            if math.isfinite(s):
                i, u, _ = state[name].tolist()
                i, u = smoothed(i, u, s, self.beta1, self.beta2)
                state[name] = torch.tensor([i, u, step], dtype=torch.float64)
        return state

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        budget = self.budget
        assert budget is not None, "check refuses increlora without a budget"
        if budget.spent(layout) >= budget.amount:
            return RankPlan(reason=f"budget of {budget} is reached")
        scores: dict[str, float] = {}
        for name, slot in layout.items():
            i, u, at = state[name].tolist()
            if slot.rank > 0 and at > step - self.when.events.step:
                scores[name] = i * u
        silent = sum(slot.rank > 0 for slot in layout.values()) - len(scores)
        if not any(scores.values()):
            what = "all scores are zero" if scores else "no finite score since the last event"
            return RankPlan(reason=f"{what}; nothing grows")
        ranks = grow_by_score(scores, layout, budget, self._shares(layout, budget, step), self.grow_by)
        sketches = obs.gather(Signal.SKETCH)
        ops = {name: self._grow(layout[name], rank, sketches.get(name)) for name, rank in ranks.items()}
        total = budget.unit(budget.spent(layout.with_ranks(ranks)))
        best = max(scores, key=lambda name: scores[name])
        reason = f"{len(ops)} of {len(layout)} modules grow to {total} of {budget}; highest score at {best}"
        return RankPlan(ops, reason + (f"; {silent} modules had no finite score" if silent else ""))

    def _shares(self, layout: Layout, budget: Budget, step: int) -> int | None:
        """How many modules grow at `step`; None: as many as it takes to spend the budget."""
        if self.top_k != "auto":
            return self.top_k
        left = sum(event >= step for event in self.when.events)
        if left <= 1:
            return None
        costs = _costs(layout, budget)
        missing = budget.amount - budget.spent(layout)
        return math.ceil(missing / (left * self.grow_by * sum(costs) / len(costs)))

    def _grow(self, slot: Slot, rank: int, sketch: Tensor | None) -> list[Op]:
        added = rank - slot.rank
        ops: list[Op] = []
        if self.rescale == "official" and slot.rank > 0:
            root = math.sqrt(slot.rank / rank) * torch.eye(slot.rank, dtype=torch.float64)
            if slot.kind == "experts":
                root = root.expand(slot.experts, -1, -1).contiguous()
            ops.append(Refactor(root, root))
        usable = sketch is not None and bool(torch.isfinite(sketch).all())
        ops.append(Grow(added, "grad", sketch) if usable else Grow(added))
        return ops


def _costs(layout: Layout, budget: Budget) -> list[int]:
    return [sum(budget.cost(slot) for slot in unit.slots) for unit in units(layout)]
