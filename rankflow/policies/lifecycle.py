"""Policies in order, each with its phase of the run, and the limits that hold throughout."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from rankflow.errors import ConfigError
from rankflow.plans.allocate import even
from rankflow.plans.layout import Layout
from rankflow.plans.limits import Limits, allowed_ranks
from rankflow.plans.schedule import StepLike, resolve_step
from rankflow.policies.base import Policy

Mode = Literal[
    "resize", "mask"
]  # new tensors with every decision, or a capacity for all of them (see `rankflow.lora.capacity`)

StepLength = Literal["capped", "held", "free"]  # what other ranks may do to the length of the model's steps
DEFAULT_STEP: StepLength = "capped"


def _flat(place: str, value: Any) -> dict[str, str]:
    if not is_dataclass(value):
        return {place: re.sub(r" at 0x[0-9a-f]+", "", str(value))}  # of a function in a policy of the user's own
    return {k: v for f in fields(value) for k, v in _flat(f"{place}.{f.name}", getattr(value, f.name)).items()}


@dataclass(frozen=True)
class Phase:
    """One policy from step `begin` on, up to but without step `end`."""

    policy: Policy
    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Lifecycle:
    """Phases in order, and the limits that hold throughout. A single policy is a lifecycle of one phase.

    `mode` says how ranks change: `resize` makes new tensors, `mask` writes into tensors with room for the largest.
    `step` says whether the length of the model's steps is held while ranks are other than the one that the learning
    rate is for, kept from being longer only, or let go, and `rate_for` for which rank it was chosen (see `rate_rank`).

    Before `resolve`, ends are `until` values as written (steps or percentages).
    """

    policies: tuple[tuple[str, Policy, StepLike | None], ...]  # (name, policy, until)
    limits: Limits = field(default_factory=Limits)
    mode: Mode = "resize"
    source: str = ""  # where it was read from, for messages
    step: StepLength = DEFAULT_STEP
    rate_for: float | None = None

    @property
    def resizes(self) -> bool:
        """Whether any phase may change factors."""
        return any(policy.resizes for _, policy, _ in self.policies)

    def settings(self) -> dict[str, str]:
        """Everything that is set, by place: two lifecycles that do the same have the same settings."""
        found: dict[str, str] = {} if self.mode == "resize" else {"mode": self.mode}
        if self.step != DEFAULT_STEP or self.rate_for is not None:
            found |= {"step": self.step, "rate_for": str(self.rate_for)}
        for i, (name, policy, until) in enumerate(self.policies):
            found |= {f"phases[{i}].policy": name, f"phases[{i}].until": str(until), **_flat(f"phases[{i}]", policy)}
        return found | _flat("limits", self.limits)

    def rate_rank(self, layout: Layout, phases: tuple[Phase, ...]) -> float | None:
        """Return the mean rank that the learning rate is for, of a run with these (resolved) phases from `layout`: that
        of its last budget, or what it starts from. None where the step is free, or where ranks are given but once,
        before they train: such a start is what the rate is for."""
        if self.step == "free":
            return None
        if self.rate_for is not None:
            return self.rate_for
        if not any(phase.policy.resizes and not phase.policy.first_only for phase in phases):
            return None
        for phase in phases:
            if phase.policy.budget is not None:
                layout = layout.with_ranks(even(layout, phase.policy.budget))
        return layout.total_rank / len(layout)

    def __str__(self) -> str:
        names = " -> ".join(name for name, _, _ in self.policies)
        return f"{names} ({self.source})" if self.source else names

    def resolve(
        self, total_steps: int, layout: Layout, *, trains_more: bool = False
    ) -> tuple[Layout, tuple[Phase, ...]]:
        """Layout with limits in its slots, and phases in steps with budgets in whole units.

        Args:
            trains_more: whether parameters outside of the adapter train as well, those of a new head for example.

        Raises:
            ConfigError: phases out of order, limits that match nothing, or a budget that cannot be met.
        """
        if total_steps < 1:
            raise ConfigError(f"total_steps is {total_steps}; a run has at least one step")
        layout = self.limits.apply(layout)
        phases: list[Phase] = []
        begin, expected = 0, layout
        for i, (name, policy, until) in enumerate(self.policies):
            last = i == len(self.policies) - 1
            end = total_steps + 1 if until is None else resolve_step(until, total_steps, what=f"phases[{i}].until")
            if until is None and not last:
                raise ConfigError(f"phases[{i}] ({name}): only the last phase may leave out `until`")
            if policy.first_only and i > 0:
                raise ConfigError(f"phases[{i}] ({name}): decides before the first step; put it first, or leave it out")
            if end <= begin:
                raise ConfigError(f"phases[{i}] ({name}): ends at step {end} but begins at step {begin}")
            if policy.budget is not None:
                policy = replace(policy, budget=policy.budget.resolve(layout))
            policy = policy.in_run(total_steps, trains_more)
            changes = policy.changes(expected)
            when = policy.when.resolve(total_steps, begin, end, settling=policy.settling, changes=changes)
            policy = replace(policy, when=when)
            try:
                policy.check(expected)
                if policy.budget is not None:  # which module will have what is not known yet; how much there is, is
                    expected = expected.with_ranks(even(expected, policy.budget))
                elif policy.lowers:  # by how much is not known; it brings ranks within limits
                    expected = expected.with_ranks(allowed_ranks(expected, expected.ranks))
            except ConfigError as e:
                raise ConfigError(f"phases[{i}] ({name}): {e}") from None
            phases.append(Phase(policy, name, begin, end))
            begin = end
        return layout, tuple(phases)
