"""The base of policies that give out ranks once, before the first step, from what they see of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from rankflow.errors import ConfigError, PlanError
from rankflow.plans.allocate import allocate, allocation_margin
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow, Op, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.plans.shrink import first, ops_to
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation, Signal


@dataclass(frozen=True, kw_only=True)
class Opening(Policy):
    """Give out the ranks of a fresh adapter, which adds nothing to the model yet, once and before the first step.

    Without a budget the total rank there is is spread anew. Nothing here changes what the model computes: directions
    come and go, but B stays 0. Subclasses declare a `Study` (with `A` and `B` among its signals) and say what each
    direction of each module is worth by it.
    """

    when: When = field(default_factory=lambda: When(stop=0))  # never due

    first_only: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True

    def gains(self, obs: Observation, layout: Layout, budget: Budget) -> Mapping[str, Sequence[float]]:
        """Return what the first, second, ... direction of every module is worth, as `budget.allocate` takes it."""
        raise NotImplementedError

    def directions(self, record: Mapping[Signal, Tensor]) -> Tensor | None:
        """Return a matrix ``[q, in]`` whose leading right singular directions become A's rows, or None if A stays as it
        is."""
        return None

    def norms(self, record: Mapping[Signal, Tensor], rank: int) -> Tensor | None:
        """Return the norms ``[rank]`` of the rows that `directions` gives, or None for a fresh LoRA's 1/sqrt(3)."""
        return None

    def check(self, layout: Layout) -> None:
        if self.when.events:
            raise ConfigError("it gives out ranks once, before the first step, so leave `when` out")
        self.held_total(layout)

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        self.check_start(obs)
        budget = self.held_total(layout)
        gains = self.gains(obs, layout, budget)
        idle = [name for name in layout if not any(gains[name])]
        if len(idle) == len(layout):
            return RankPlan(reason="no module is worth anything: every score is zero; ranks stay as they are")
        ranks = allocate(gains, layout, budget)
        ops = {name: self._ops(slot, ranks[name], obs.get(name, {})) for name, slot in layout.items()}
        spent = budget.unit(budget.spent(layout.with_ranks(ranks)))
        reason = f"ranks {min(ranks.values())} to {max(ranks.values())}, most at {max(ranks, key=lambda n: ranks[n])}"
        reason += f"; {spent} of {budget}" + (f"; {len(idle)} modules are worth nothing" if idle else "")
        margin = allocation_margin(gains, ranks, layout, budget)
        return RankPlan(ops, reason, state="reset", margin=margin)  # there is none yet, and so nothing to ramp up

    def check_start(self, factors: Observation) -> None:
        for name, record in factors.items():
            if bool(record[Signal.A].any()) and bool(record[Signal.B].any()):
                raise PlanError(
                    f"{name}: neither A nor B is zero, so the adapter adds something to the model already, and only a "
                    "fresh one can be given other directions; make a new adapter (with PEFT's default "
                    "init_lora_weights), hand attach(state=...) the run's state to go on with one of this policy's, or "
                    "use increlora to grow this one and squeeze to shrink it"
                )

    def _ops(self, slot: Slot, rank: int, record: Mapping[Signal, Tensor]) -> Sequence[Op]:
        sketch = self.directions(record)
        if rank == 0 or sketch is None:
            return ops_to(rank, slot.rank, first(range(slot.rank)))
        # From no rows at all: none of the old ones stands in a direction's way
        grown = [*ops_to(0, slot.rank, first(())), Grow(rank, "grad", sketch)]
        if (norms := self.norms(record, rank)) is None:
            return grown
        size = math.sqrt(3) * norms.double().cpu()
        return [*grown, Refactor(size.diag(), size.reciprocal().diag())]
