"""The base of policies that bring the adapter down to a budget, event by event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from rankflow.plans.budget import Budget, check_lowers
from rankflow.plans.layout import Layout
from rankflow.plans.schedule import Curve, curve, halvings
from rankflow.policies.base import Policy, State

Shape = Annotated[
    Curve,
    Field(description="how the total comes down to the budget over the events; constant: at the first, all at once"),
]


@dataclass(frozen=True, kw_only=True)
class Lowering(Policy):
    """Lower the total along `shape`, from what it was when the phase began to the budget, if there is one."""

    grows: ClassVar[bool] = False
    takes_budget: ClassVar[bool] = True
    meets_budget: ClassVar[bool] = True

    shape: Shape = "cubic"

    def check(self, layout: Layout) -> None:
        self.require_events()
        if self.budget is not None:
            check_lowers(self.name, layout, self.budget)
        super().check(layout)

    def changes(self, layout: Layout) -> int:
        if self.budget is None or self.shape != "halving":
            return 0
        return halvings(self.budget.spent(layout), self.budget.amount)

    def init(self, layout: Layout) -> State:
        """`total`: what the adapter cost when the phase began."""
        spent = self.budget.spent(layout) if self.budget is not None else 0
        return {"total": torch.tensor(spent, dtype=torch.int64)}

    def target(self, state: State, step: int) -> Budget | None:
        """Return what may be left after the event at `step`."""
        if self.budget is None:
            return None
        total = curve(self.shape, float(state["total"]), self.budget.amount, self.when.progress(step))
        return Budget(self.budget.kind, max(int(total), int(self.budget.amount)))
