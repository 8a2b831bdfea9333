"""What every policy owes its controller. Policies, their settings and policy files are found by listing them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from synthetic import AVERAGED, World, enter, occasions, run, run_phases

from rankflow.config.load import load_policy, shipped
from rankflow.config.registry import policy_class, policy_names
from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.idleness import late_phases
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.observation import Observation
from tests.config.test_load import START

RANKS = (4, 4, 6, 4, 3, 4)  # total 25
BUDGETS = (Budget("total_rank", 40), Budget("total_rank", 15), Budget("max_params", 300), None)
EXTRA = {  # settings that are numbers and change what a policy does
    "bayesian_lora": [{"gate_init": -0.5, "diagonal": True}],
    "increlora": [{"advance": True}, {"advance": True, "rescale": "official", "grow_init": "grad"}],
    "squeeze": [{"energy": 0.8}],
}


def choices(hint: Any) -> list[Any]:
    """The words that a setting may have."""
    if get_origin(hint) is Annotated:
        return choices(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [c for part in get_args(hint) for c in choices(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def world_for(policy: Policy, ranks: Iterable[int] = RANKS, **options: Any) -> World:
    """A fresh adapter for a policy that comes before the first step, a trained one for the others."""
    return World(ranks, **{"zero_b": policy.first_only, **options})


def feasible(policy: Policy) -> bool:
    try:
        policy.check(World(RANKS).layout)
    except ConfigError:
        return False
    return True


def variants() -> list[Any]:
    found = []
    for name in policy_names():
        cls = policy_class(name)
        own = cls().when.resolve(60)
        when = When(10, 10).resolve(60) if own.events else own  # some are never due
        hints = get_type_hints(cls, include_extras=True)
        settings: list[dict[str, Any]] = [{}, *EXTRA.get(name, [])]
        settings += [{f.name: word} for f in fields(cls) for word in choices(hints[f.name]) if word != f.default]
        for setting in settings:
            able = [p for b in BUDGETS if feasible(p := cls(budget=b, when=when, **setting))]
            assert able, f"{name} with {setting} can do nothing here"
            tried = able[: 1 if setting else None]  # every budget at the defaults, every setting with one of them
            found += [pytest.param(p, id="-".join([name, *map(str, setting.values()), str(p.budget)])) for p in tried]
    return found


every_policy = pytest.mark.parametrize("policy", variants())
STEPS = range(1, 61)


def cloned(state):
    return {key: value.clone() for key, value in state.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def written(plans: list[RankPlan]) -> list[Any]:
    return [(plan.to_json(), plan.pack().tolist()) for plan in plans]


@every_policy
def test_the_same_input_gives_the_same_plan_and_is_left_alone(policy):
    world = world_for(policy)
    state = enter(world, policy)
    for step, obs, asked in occasions(world, policy, range(1, 21), learns=False):
        before, seen = cloned(state), {n: cloned(dict(record)) for n, record in obs.items()}
        once, again = policy.observe(state, obs, step), policy.observe(state, obs, step)
        assert same(once, again)
        if asked:
            kept = cloned(once)
            plans = [policy.decide(once, obs, world.layout, step) for _ in range(2)]
            assert written(plans[:1]) == written(plans[1:])
            assert same(once, kept)
        assert same(state, before)
        assert all(same(dict(obs[n]), seen[n]) for n in seen)
        state = once


@every_policy
def test_state_is_tensors_that_go_through_a_file_at_any_step(policy):
    straight, broken = world_for(policy), world_for(policy)
    plans = run(straight, policy, STEPS), run(broken, policy, STEPS, through_disk=True)
    assert written(plans[0]) == written(plans[1])
    assert straight.layout == broken.layout


@every_policy
def test_limits_hold_and_the_budget_is_met_by_the_last_event(policy):
    limits = Limits((Limit("*", 1, 8), Limit("m2", 2, 7)))
    world = world_for(policy)
    world.layout = limits.apply(world.layout)
    policy.check(world.layout)
    run(world, policy, STEPS)  # every plan is checked against limits as it is applied
    if policy.budget is not None:
        dearest = max(policy.budget.cost(slot) for slot in world.layout.values())
        left = policy.budget.amount - policy.budget.spent(world.layout)
        assert left >= 0
        if policy.meets_budget:
            assert left == 0 if dearest == 1 else left < dearest


@every_policy
def test_nothing_is_heard_that_was_not_declared_nor_after_the_last_event(policy):
    heard = [policy.listen(step) for step in STEPS]
    studied = [study.signals for study in policy.studies]
    assert frozenset().union(*heard, *studied) <= policy.needs
    assert not policy.listen(61)


@every_policy
@pytest.mark.parametrize("score", [0.0, 1.0], ids=["zero", "equal"])
def test_scores_that_tell_nothing_end_in_a_plan_or_in_a_reason(policy, score):
    world = world_for(policy, scores=lambda name, step: score, **({"zero_b": True} if score == 0 else {}))
    world.install(policy.gate)
    state, plan = policy.init(world.layout), None
    for step, obs, asked in occasions(world, policy, range(31, 61), learns=False):  # the last event is at 60
        state, bad = policy.heard(state, obs, step)
        assert bad is None
        if asked:
            plan = policy.decide(state, obs, world.layout, step)
    plan = plan if plan is not None else policy.decide(state, Observation(60), world.layout, 60)
    assert plan.reason
    assert all(bool(value.isfinite().all()) for value in state.values())
    world.apply(plan)


@every_policy
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_reaches_no_policy(policy, bad):
    world = world_for(policy)
    world.install(policy.gate)
    state = policy.init(world.layout)
    for step, obs, _ in occasions(world, policy, range(51, 61), learns=False):
        hit = {(n, s): v.double() * bad for n, record in obs.items() for s, v in record.items() if s not in AVERAGED}
        for place, value in [*hit.items()][-1:]:
            after, found = policy.heard(state, obs.replaced({place: value}), step)
            assert found == f"{place[0]}: {place[1].value}"
            assert after is state
        state, found = policy.heard(state, obs, step)
        assert found is None


@every_policy
@pytest.mark.parametrize("ranks", [(1,) * 6, (0, 4, 0, 4, 6, 4), (12, 1, 0, 1, 1, 1)], ids=str)
def test_any_ranks_can_be_decided_on(policy, ranks):
    world = world_for(policy, ranks)
    try:
        policy.check(world.layout)
    except ConfigError:
        pytest.skip("not from these ranks")
    run(world, policy, STEPS)
    assert world.layout.total_rank > 0


@every_policy
def test_tied_modules_stay_together(policy):
    world = world_for(policy, (4,) * 6)
    try:
        policy.check(world.layout)
    except ConfigError:
        pytest.skip("not from these ranks")
    world.layout = Limits(ties=(("m0", "m1"), ("m4", "m5"))).apply(world.layout)
    run(world, policy, STEPS)
    assert world.layout["m0"].rank == world.layout["m1"].rank
    assert world.layout["m4"].rank == world.layout["m5"].rank


@every_policy
def test_buckets_hold_from_the_first_change_on(policy):
    world = world_for(policy, (4,) * 6)
    world.layout = Limits(buckets=(1, 2, 4, 8)).apply(world.layout)
    try:
        policy.check(world.layout)
    except ConfigError:
        pytest.skip("not from these ranks")
    run(world, policy, STEPS)
    assert set(world.layout.ranks.values()) <= {0, 1, 2, 4, 8}


# -- the end of a run -----------------------------------------------------------------------------------------------

RUNS = (10, 100, 1000)


def alone(policy: Policy) -> list[list[tuple[str, Policy, Any]]]:
    """Lifecycles of a policy: by itself, before a plain LoRA that is too short to train much, and after one, unless it
    has a start of its own."""
    hold = policy_class("hold")()
    after = [[("hold", hold, "30%"), ("last", policy, None)]] if policy.when == When() else []
    return [[("all", policy, None)], [("first", policy, "95%"), ("hold", hold, None)], *after]


def lives() -> list[Any]:
    """Every shipped file, and every policy with no `when` of its own, with every budget that it takes."""
    found = [pytest.param(load_policy(name), id=name) for name in sorted(shipped())]
    for name in policy_names():
        able = [cls(budget=b) for cls in [policy_class(name)] for b in BUDGETS]
        able = [p for p in able if feasible(replace(p, when=p.when.resolve(100)))]
        assert able, f"{name} can do nothing here"
        found += [pytest.param(Lifecycle(tuple(f)), id=f"{name}-{f[0][0]}-{p.budget}") for p in able for f in alone(p)]
    return found


@pytest.mark.parametrize("total_steps", RUNS)
@pytest.mark.parametrize("life", lives())
def test_what_was_decided_last_is_trained_for_some_time(life, total_steps):
    ranks = RANKS if life.source == "" else (START.get(Path(life.source).stem, 2),) * 6
    _, phases = life.resolve(total_steps, World(ranks, max_rank=64).layout)
    for phase in phases:
        policy, events = phase.policy, phase.policy.when.events
        if not policy.resizes or (policy.name == "sora" and policy.budget is None):
            continue  # nothing that trains changes: LISA's layers, and gates that SoRA has closed
        assert not events or total_steps - events[-1] >= total_steps / 10
        assert events or policy.studies or policy.name == "hold"
    assert not late_phases(phases, total_steps)


@pytest.mark.parametrize("total_steps", RUNS)
@pytest.mark.parametrize(("before", "after"), [(8, 4), (16, 4), (32, 4), (16, 1), (12, 5)])
@pytest.mark.parametrize("first", [0, 0.4])
def test_squeeze_trains_equally_long_at_every_rank_of_its_ladder(total_steps, before, after, first):
    squeeze = policy_class("squeeze")(budget=Budget("total_rank", 6 * after))
    begin = round(first * total_steps)
    hold = [("hold", policy_class("hold")(), begin)] if begin else []
    _, phases = Lifecycle((*hold, ("squeeze", squeeze, None))).resolve(total_steps, World((before,) * 6).layout)
    policy = phases[-1].policy
    state, stages, since = policy.init(World((before,) * 6).layout), [], begin
    ladder = [before]
    for step in [*policy.when.events, total_steps]:
        if step > since:
            stages.append(step - since)
        since = step
        if step < total_steps:
            ladder.append(int(policy.target(state, step).amount) // 6)
    assert ladder[0] == before
    assert ladder[-1] == after
    assert all(a == max(after, b // 2) for b, a in pairwise(ladder)), "one halving at each event"
    assert len(set(stages[:-1])) <= 1
    assert abs(stages[-1] - stages[0]) <= len(stages)  # it takes up what rounding leaves


def test_a_stop_that_is_written_is_kept_and_said_where_it_is_the_last_step():
    layout = World(RANKS).layout
    for written in ({"stop": 101}, {"start": 100}, {"start": "50%", "stop": 101}):
        life = load_policy({"policy": "rigl", "when": {"every": "10%", **written}})
        _, phases = life.resolve(100, layout)
        assert phases[0].policy.when.events[-1] == 100
        assert len(late_phases(phases, 100)) == 1
    _, phases = load_policy({"policy": "rigl", "when": {"start": "80%", "every": "5%"}}).resolve(100, layout)
    assert list(phases[0].policy.when.events) == [80, 85, 90, 95]
    assert not late_phases(phases, 100)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("total_steps", [60, 100, 400])
def test_a_shipped_file_meets_its_budgets_from_the_rank_it_is_meant_for(name, total_steps):
    world = world_for(load_policy(name).policies[0][1], (START.get(name, 2),) * 12, max_rank=32)
    world.layout, phases = load_policy(name).resolve(total_steps, world.layout)
    plans = run_phases(world, phases, total_steps)
    assert all(plan.reason for made in plans.values() for plan in made)
    assert all(slot.rank >= 1 for slot in world.layout.values() if slot.min_rank)
    assert world.layout.total_rank > 0


def test_a_phase_is_checked_against_what_the_one_before_leaves():
    layout = World((2,) * 6).layout

    def life(first: float, second: float) -> Lifecycle:
        return load_policy(
            {
                "phases": [
                    {"policy": "increlora", "until": "50%", "budget": {"mean_rank": first}},
                    {"policy": "squeeze", "budget": {"mean_rank": second}},
                ]
            }
        )

    life(6, 3).resolve(100, layout)
    with pytest.raises(ConfigError, match=r"phases\[1\] \(squeeze\): squeeze only lowers ranks"):
        life(3, 6).resolve(100, layout)
