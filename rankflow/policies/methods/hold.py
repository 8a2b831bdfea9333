"""Hold: every rank stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Hold(Policy):
    """Plain LoRA: no rank changes.

    When to use: as the last phase of a lifecycle, so that training ends at ranks that stay, and as the plain LoRA that
    other policies are compared with.
    """

    when: When = field(default_factory=lambda: When(stop=0))  # never due: nothing is asked, nothing is recorded

    grows: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    lowers: ClassVar[bool] = False
    source: ClassVar[str] = "plain LoRA, arXiv 2106.09685"

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        return RankPlan(reason="ranks are held")
