"""Find phases that can change nothing, or change it too late, from limits, budget and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankflow.plans.allocate import even
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.plans.limits import Unit, units
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import Phase


def idle_phases(layout: Layout, phases: Sequence[Phase]) -> list[str]:
    """Return a line for each (resolved) phase in which no decision can change anything, of a run that starts from
    `layout`.

    Of a later phase it is known how much rank there is, if the one before comes to its budget, and not which module has
    it. Policies say what they may do by `grows`, `lowers`, `meets_budget`, `beyond_ranks` and `stuck`.
    """
    found, expected, sure = [], layout, True
    for i, phase in enumerate(phases):
        why = _why_idle(phase, expected, sure=sure, first=i == 0)
        if why is not None:
            found.append(f"phases[{i}] ({phase.name}): {why}" if len(phases) > 1 else f"{phase.name}: {why}")
            continue
        policy = phase.policy
        if policy.budget is not None:
            expected = expected.with_ranks(even(expected, policy.budget))
            sure = policy.meets_budget
        elif policy.lowers and not policy.meets_budget:
            sure = False
    return found


def late_phases(phases: Sequence[Phase], total_steps: int) -> list[str]:
    """Return a line for each (resolved) phase that decides after the last step of the run, so that no step trains what
    it changes: such a `when` is kept, as it was written."""
    return [
        f"{phase.name}: decides after step {total_steps}, the last of the run, so no step trains what it changes then; "
        "leave out when.stop and when.start, or set them lower"
        for phase in phases
        if total_steps > 1 and phase.policy.settling > 0 and total_steps in phase.policy.when.events
    ]


def _why_idle(phase: Phase, layout: Layout, *, sure: bool, first: bool) -> str | None:
    """Return why no decision of the phase can change anything, or None. The phase starts from `layout`; its total may
    be lower if not `sure`, and every rank is known only for the `first` phase."""
    policy = phase.policy
    decisions = len(policy.when.events) + sum(study.when == "start" for study in policy.studies)
    if policy.when.phase is not None and not decisions and policy.when.phase[0] >= policy.when.phase[1]:
        return f"the run is over when it begins, at step {phase.begin}; let the one before end earlier, or leave it out"
    if not (policy.grows or policy.lowers):
        return None
    if not decisions:
        return "no decision is due while it is in charge; see when.start, when.every and when.stop"
    why = policy.stuck(layout)
    if why is None and not policy.beyond_ranks:
        why = _why_still(policy, layout, sure=sure, first=first)
    if why is None:
        return None
    return f"{decisions} decision{'s' * (decisions > 1)}, none can change anything: {why}"


def _why_still(policy: Policy, layout: Layout, *, sure: bool, first: bool) -> str | None:
    """Return why no rank can change, or None if one can."""
    moving = units(layout)
    if not sure and not (policy.lowers and not policy.grows):
        free = any(len(list(unit.ranks(1, unit.span[1]))) > 1 or unit.span[0] == 0 for unit in moving)
        return None if free else "limits leave every module one rank"
    up = [unit for unit in moving if unit.span[1] > unit.rank] if policy.grows else []
    down = [unit for unit in moving if unit.span[0] < unit.rank] if policy.lowers else []
    if policy.lowers and not all(unit.allows(unit.rank) for unit in moving):
        return None  # limits themselves ask for another rank
    if not up and not down:
        way = {(True, True): "another", (True, False): "a higher", (False, True): "a lower"}
        return f"limits let no module have {way[policy.grows, policy.lowers]} rank than it starts with; widen them"
    budget = policy.budget
    if budget is None and policy.meets_budget and policy.grows and policy.lowers:
        budget = Budget("total_rank", layout.total_rank)
    if budget is None or (policy.lowers and not policy.meets_budget):
        return None
    room = int(budget.amount) - budget.spent(layout)
    fits = any(_step_up(unit, budget) <= room for unit in up)
    if not policy.lowers:
        return None if fits else _at_budget(layout, budget, room, growing=True, first=first)
    if not policy.grows:
        return None if room < 0 else _at_budget(layout, budget, room, growing=False, first=first)
    trade = up and down and not (first and len({*up, *down}) == 1)
    if fits or room < 0 or trade:
        return None
    most = "most" if not up else "least"
    return f"every module starts with the {most} that limits allow, and what one gains another has to lose; widen them"


def _step_up(unit: Unit, budget: Budget) -> int:
    """Return how much more the unit's next rank costs than the one that it has."""
    return (next(unit.ranks(unit.rank + 1, unit.span[1])) - unit.rank) * budget.price(unit)


def _at_budget(layout: Layout, budget: Budget, room: int, *, growing: bool, first: bool) -> str:
    who = "the adapter" if first else "the phase"
    mean = layout.total_rank / len(layout)
    has = f"mean rank {mean:.4g}" if budget.kind == "total_rank" else budget.unit(budget.spent(layout))
    said = f"{who} starts at {has}, " + ("which is the budget" if room == 0 else f"and its budget is {budget}")
    if not first:
        return f"{said}; give this phase another budget than the one before it"
    if not growing:
        return f"{said}; start from r={2 * math.ceil(mean)}, or lower the budget"
    return f"{said}; start from r={max(1, round(mean / 4))}" if mean > 1 else f"{said}; raise it"
