"""IncreLoRA: ranks grow where the update matters and its importance is still uncertain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.linalg.decompose import orthogonality_term
from rankflow.plans.allocate import grow_by_score, growth_margin, next_ranks
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import units
from rankflow.plans.ops import Grow, Keep, Op, Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.policies._sensitivity import Orth, smoothed
from rankflow.policies.base import Policy, State
from rankflow.policies.gate import Gate
from rankflow.policies.observation import Observation, Signal


@dataclass(frozen=True, kw_only=True)
class IncreLora(Policy):
    """IncreLoRA (arXiv 2308.12043): start small, and at each event add directions to the modules of highest score.

    With s_t = sum |DeltaW * dL/dDeltaW| / sqrt(out * in) of a module at step t, its smoothed sensitivity and
    uncertainty are I_t = beta1 I_{t-1} + (1 - beta1) s_t and U_t = beta2 U_{t-1} + (1 - beta2) |s_t - I_t|, both 0 at
    first, and its score is I_t U_t.

    With `advance`, every module has a reserve: the directions that it would gain next, which train from the phase's
    first step on behind a gate that stays at e = `reserve_gate` (DeltaW = scaling * B diag(v) A, v = e for them and 1
    for the others). A module that grows opens its reserve, which keeps the rows of A that it has learnt, and gets a new
    one. Limits and budget do not count reserves, which come on top of them while ranks grow: they leave with the last
    growth, at the latest when the phase ends. Adapters saved before that hold them, times e. Their gradients are e
    times those of other directions, so they learn under optimizers that make up for it, like Adam, as far as its `eps`
    lets them.

    When to use: memory is short at the start, or nobody knows which modules need rank. Start at about a quarter of the
    budget.

    Differs: from the released code,
    - the budget is met exactly: it counts modules against ranks, and passes its target when it adds several at once;
    - scores come from all micro-batches of a step, not the last alone, and from `window` steps before each event, not
      from every step (`window: all` with `score_fraction: 1` does that);
    - scaling stays as it is, so growth never changes the function: the released code divides by the rank, which
      shrinks the old DeltaW by r / (r + n) at every growth (`rescale: official` does that);
    - the first growth is at `start`, not one interval later, and comes after the optimizer's step;
    - directions are plain rows of A and columns of B, with no trained diagonal between them, and new directions ramp up
      in the optimizer instead of restarting its learning rate;
    - `advance` is off, where its command line has it on. As no diagonal trains from e on, the e of a reserve that opens
      goes into B, so that opening it changes nothing and B starts almost afresh; B of a new reserve is 0, not random;
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
    advance: Annotated[
        bool, Field(description="whether each module's next directions learn in advance, in a reserve all but closed")
    ] = False
    reserve_gate: Annotated[
        float, Field(gt=0, lt=1, description="e, what reserves are multiplied by while they learn in advance")
    ] = 1e-5
    orth: Orth = 0.0

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED, Signal.SKETCH})
    lowers: ClassVar[bool] = False
    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True
    source: ClassVar[str] = "IncreLoRA, arXiv 2308.12043"

    @property
    def gate(self) -> Gate | None:
        """Values that nothing trains: those of reserves are set where they open."""
        return Gate(trained_on="nothing") if self.advance else None

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """orth / 2 (|A A^T - 1|_F + |B^T B - 1|_F), which averaged over modules is the paper's regulariser."""
        return orthogonality_term(self.orth)

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
        notes = []
        if self.scored is not None and (self.window == "all" or self.scored < self.window):
            asked = "every step" if self.window == "all" else f"{self.window} steps"
            notes.append(
                f"increlora scores {self.scored} steps before each of {len(self.when.events)} events, not {asked}, to "
                f"stay within score_fraction {self.score_fraction:g} of the run"
            )
        if self.advance:
            notes.append("increlora's reserves come on top of limits and budget until growth is over")
        return tuple(notes)

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
        super().check(layout)
        if missing:
            self.require_events()
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
        """(I, U, step of the last finite score, rank without the reserve), float64 ``[4]`` per module."""
        return {name: torch.tensor([0, 0, 0, slot.rank], dtype=torch.float64) for name, slot in layout.items()}

    def enter(self, state: State, layout: Layout) -> RankPlan:
        if not (self.advance and self.when.events):
            return RankPlan()
        ops = self._ops(layout, {}, layout, self._reserves(layout))
        return RankPlan(ops, f"{len(ops)} of {len(layout)} modules get a reserve")

    def leave(self, state: State, layout: Layout) -> RankPlan:
        return RankPlan(self._ops(_bare(state, layout), {}, layout, {}), "growth is over and reserves leave")

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        state = dict(state)
        for name, ops in plan.ops.items():
            grown = sum(op.n for op in ops if isinstance(op, Grow))
            opened = sum(len(op.idx) * (1 if op.to == 1 else -1) for op in ops if isinstance(op, Open))
            state[name] = state[name] + torch.tensor([0, 0, 0, grown + opened])
        return state

    def observe(self, state: State, obs: Observation, step: int) -> State:
        seen = obs.gather(self._score_signal)
        if not seen:
            return state
        device = next(iter(seen.values())).device
        # Experts are blocks of one DeltaW: the sum over all of them, over the root of how many entries they have.
        scores = torch.stack([s.sum().to(device) / math.sqrt(s.numel()) for s in seen.values()]).double().tolist()
        state = dict(state)
        for name, s in zip(seen, scores, strict=True):
            i, u, _, rank = state[name].tolist()
            i, u = smoothed(i, u, s, self.beta1, self.beta2)
            state[name] = torch.tensor([i, u, step, rank], dtype=torch.float64)
        return state

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        budget = self.budget
        assert budget is not None, "check refuses increlora without a budget"
        bare = _bare(state, layout)
        scores: dict[str, float] = {}
        for name, slot in bare.items():
            i, u, at, _ = state[name].tolist()
            if slot.rank > 0 and at > step - self.when.events.step:
                scores[name] = i * u
        silent = sum(slot.rank > 0 for slot in bare.values()) - len(scores)
        ranks: dict[str, int] = {}
        margin = None
        if budget.spent(bare) >= budget.amount:
            reason = f"budget of {budget} is reached"
        elif not any(scores.values()):
            what = "all scores are zero" if scores else "no finite score since the last event"
            reason = f"{what}; nothing grows"
        else:
            ranks = grow_by_score(scores, bare, budget, self._shares(bare, budget, step), self.grow_by)
            margin = growth_margin(scores, ranks, bare)
            total = budget.unit(budget.spent(bare.with_ranks(ranks)))
            best = max(scores, key=lambda name: scores[name])
            reason = f"{len(ranks)} of {len(layout)} modules grow to {total} of {budget}; highest score at {best}"
            reason += f"; {silent} modules had no finite score" if silent else ""
        after = bare.with_ranks(ranks)
        reserves: dict[str, int] = {}
        if self.advance and budget.spent(after) < budget.amount and step < self.when.events[-1]:
            reserves = self._reserves(after)
            for name, slot in layout.items():  # where nothing grew, a reserve goes on learning
                if name not in ranks and slot.rank > bare[name].rank:
                    reserves[name] = slot.rank - bare[name].rank
        ops = self._ops(bare, ranks, layout, reserves, obs.gather(Signal.SKETCH))
        return RankPlan(ops, reason, margin=margin)

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

    def _reserves(self, layout: Layout) -> dict[str, int]:
        """How many directions each module of a `layout` without reserves would gain next."""
        assert self.budget is not None
        return {name: rank - layout[name].rank for name, rank in next_ranks(layout, self.budget, self.grow_by).items()}

    def _ops(
        self,
        bare: Layout,
        ranks: Mapping[str, int],
        layout: Layout,
        reserves: Mapping[str, int],
        sketches: Mapping[str, Tensor] | None = None,
    ) -> dict[str, list[Op]]:
        """From `layout`, which is `bare` without its reserves, to `ranks` and `reserves`."""
        ops: dict[str, list[Op]] = {}
        for name, slot in bare.items():
            rank, reserve, held = ranks.get(name, slot.rank), reserves.get(name, 0), layout[name].rank - slot.rank
            if rank > slot.rank or reserve != held:
                ops[name] = self._grow(slot, rank, held, reserve, (sketches or {}).get(name))
        return ops

    def _grow(self, slot: Slot, rank: int, held: int, reserve: int, sketch: Tensor | None) -> list[Op]:
        """To `rank` and a `reserve`, which is last in its module, from `held` in reserve."""
        opened = min(held, rank - slot.rank)
        kept = min(held - opened, reserve)
        old = slot.rank + opened + kept
        ops: list[Op] = [Keep(tuple(range(old)))] if old < slot.rank + held else []
        if self.rescale == "official" and rank > slot.rank > 0:
            root = math.sqrt(slot.rank / rank) * torch.eye(old, dtype=torch.float64)
            if slot.kind == "experts":
                root = root.expand(slot.experts, -1, -1).contiguous()
            ops.append(Refactor(root, root))
        if opened:
            ops.append(Open(tuple(range(slot.rank, slot.rank + opened))))
        if added := rank + reserve - old:
            ops.append(Grow(added) if sketch is None else Grow(added, "grad", sketch))
        if kept < reserve:
            ops.append(Open(tuple(range(rank + kept, rank + reserve)), self.reserve_gate))
        return ops


def _bare(state: State, layout: Layout) -> Layout:
    """`layout` as it is without reserves."""
    return layout.with_ranks({name: int(state[name][3]) for name in layout})


def _costs(layout: Layout, budget: Budget) -> list[int]:
    return [sum(budget.cost(slot) for slot in unit.slots) for unit in units(layout)]
