"""GradientStart: ranks and rows of A from the gradient, once what trains beside the adapter has learnt a little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.plans.allocate import proportional
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies._initial import Opening
from rankflow.policies.base import State
from rankflow.policies.observation import Observation, Signal, Study

_COST = 20  # no more batches are looked at than one for so many steps: 5 % of the run
_SURE = 1e12  # the gain of a direction that every module is to have, over that of others
_ONCE = When(stop=0)


@dataclass(frozen=True, kw_only=True)
class GradientStart(Opening):
    """Give a fresh adapter its ranks and the rows of A from the gradient of the frozen weights, once.

    Ranks go to modules in proportion to mean |W0 * G| over sqrt(in + out), as in GoRA (arXiv 2502.12171), within
    `at_least` and `at_most` times the mean rank. A's rows are the leading right singular directions of G, as in
    LoRA-GA (arXiv 2407.05000), scaled in each module so that the mean square of z = A x is what it is under the random
    rows of a fresh LoRA: along the gradient inputs are many times larger, and so would be the first steps under Adam.
    B stays 0, so the function stays.

    Where more than the adapter trains, a new head for example, the adapter stands still for the first `head_first` of
    the run while the rest learns: the gradient under a random head says little. Where nothing else trains it looks
    before the first step.

    Convolutions and embeddings keep the random rows that they have; DoRA is refused, as its forward has no z.

    Without a budget the adapter keeps its number of parameters.

    When to use: the adapter is fresh and training batches are at hand. Under the Trainer they are those of its own.
    """

    when: When = field(default_factory=lambda: _ONCE)

    batches: Annotated[
        PositiveInt, Field(description="batches over which the gradient is averaged; at most 5 % of the run's steps")
    ] = 8
    head_first: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the run in which only what trains outside of the adapter learns"),
    ] = 0.1
    at_least: Annotated[
        float, Field(ge=0, le=1, description="no module with a gradient gets less than this times the mean rank")
    ] = 0.5
    at_most: Annotated[
        float, Field(ge=1, description="no module gets more than this times the mean rank, while others can have it")
    ] = 4.0
    rows: Annotated[
        PositiveInt, Field(description="output rows of each module whose gradient is kept for its score")
    ] = 256
    components: Annotated[
        PositiveInt, Field(description="rows of the gradient's sketch; directions beyond so many are random ones")
    ] = 64

    needs: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.A, Signal.B, Signal.WEIGHT_SCORE, Signal.SKETCH, Signal.INPUT_SAMPLE}
    )
    source: ClassVar[str] = "rankflow's own: GoRA's ranks, rows along the gradient, steps as of random rows"

    def in_run(self, total_steps: int, trains_more: bool) -> GradientStart:
        if self.when != _ONCE:
            raise ConfigError("it gives out ranks once, so leave `when` out; head_first says when")
        look = min(round(self.head_first * total_steps), total_steps - 1) if trains_more else 0
        batches = min(self.batches, max(1, total_steps // _COST))
        when = When(look, total_steps, look + 1) if look else _ONCE
        return replace(self, when=when, batches=batches)

    @property
    def waits(self) -> bool:
        """Whether the adapter stands still at first."""
        return isinstance(self.when.start, int) and bool(self.when.events)

    @property
    def studies(self) -> tuple[Study, ...]:
        return (
            Study(
                "gradients",
                self.needs,
                self.batches,
                when="every" if self.waits else "start",
                rows=self.rows,
                components=self.components,
                frozen=True,
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        when = f"after step {self.when.start}, while the rest learns" if self.waits else "before the first step"
        return (f"gradient_start looks at {self.batches} batches {when}",)

    @property
    def beyond_ranks(self) -> bool:
        return True

    def listen(self, step: int) -> frozenset[Signal]:
        return frozenset()

    def check(self, layout: Layout) -> None:
        if self.when.stop != 0 and not self.when.events:
            raise ConfigError(
                f"its phase ends at step {self.when.phase and self.when.phase[1]}, before it looks at step "
                f"{self.when.start}; let the phase end later, or set head_first lower (0: before the first step)"
            )
        self.held_total(layout)

    def held_total(self, layout: Layout) -> Budget:
        if self.budget is not None:
            return super().held_total(layout)
        return replace(self, budget=Budget("max_params", layout.params)).held_total(layout)

    def init(self, layout: Layout) -> State:
        """`free`: which modules train, bool ``[modules]``."""
        return {"free": torch.tensor([slot.trainable for slot in layout.values()])}

    def enter(self, state: State, layout: Layout) -> RankPlan:
        if not self.waits:
            return RankPlan()
        frozen = {name: (Train(False),) for name in self._free(state, layout)}
        return RankPlan(frozen, f"the rest of the model learns alone up to step {self.when.start}")

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        free = self._free(state, layout) if self.waits else []
        if not len(obs):
            return RankPlan({name: (Train(True),) for name in free}, "nothing was seen; ranks stay as they are")
        whole = Layout({name: replace(slot, trainable=slot.trainable or name in free) for name, slot in layout.items()})
        plan = super().decide(state, obs, whole, step)
        ops = {name: (Train(True), *plan.ops.get(name, ())) for name in free}
        return replace(plan, ops={**plan.ops, **ops})

    def gains(self, obs: Observation, layout: Layout, budget: Budget) -> Mapping[str, Sequence[float]]:
        weights = {
            name: float(score) / math.sqrt(layout[name].in_features + layout[name].out_features)
            for name, score in obs.gather(Signal.WEIGHT_SCORE).items()
        }
        mean = budget.amount / sum(budget.cost(slot) for slot in layout.values())
        least, most = round(self.at_least * mean), max(1, min(round(self.at_most * mean), self.components))
        gains = proportional(weights, layout, budget, dict.fromkeys(layout, most))
        return {name: [g * _SURE if i < least else g for i, g in enumerate(found)] for name, found in gains.items()}

    def directions(self, record: Mapping[Signal, Tensor]) -> Tensor | None:
        known = Signal.SKETCH in record and Signal.INPUT_SAMPLE in record
        return record[Signal.SKETCH] if known and bool(record[Signal.SKETCH].any()) else None

    def norms(self, record: Mapping[Signal, Tensor], rank: int) -> Tensor | None:
        x = record[Signal.INPUT_SAMPLE].double()
        v = torch.linalg.svd(record[Signal.SKETCH].double(), full_matrices=False).Vh[:rank]
        along, random = (x @ v.T).square().mean(), x.square().mean() / 3  # E z^2 of rows of norm 1, and of random ones
        if not along > 0:
            return None
        norms = torch.full((rank,), 1 / math.sqrt(3), dtype=torch.float64)  # of random rows, which come after v's
        norms[: len(v)] = (random / along).sqrt()
        return norms

    def _free(self, state: State, layout: Layout) -> list[str]:
        return [name for name, free in zip(layout, state["free"].tolist(), strict=True) if free]
