"""Squeeze: what it keeps against dense SVDs, how it gets to its budget, and what it measures."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import World, run

from rankflow.errors import ConfigError
from rankflow.observe.averages import Running
from rankflow.plans.budget import Budget
from rankflow.plans.ops import Drop, Grow, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.methods.squeeze import Squeeze
from rankflow.policies.observation import Observation, Signal

ONCE = When(20, 100).resolve(60)  # one event, at step 20
EVENTS = When(10, 10).resolve(60)


def squeeze(amount: float | None = 10, when: When = ONCE, kind="total_rank", **settings) -> Squeeze:
    return Squeeze(budget=None if amount is None else Budget(kind, amount), when=when, **settings)


def decided(policy: Squeeze, world: World, *, upto: int = 20) -> RankPlan:
    state = policy.init(world.layout)
    for step in range(1, upto + 1):
        obs = world.observe(policy.listen(step), step)
        state = policy.observe(state, obs, step)
    return policy.decide(state, obs, world.layout, upto)


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", ["keep", "balanced"])
@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_every_module_becomes_its_own_best_approximation(gauge, allocate):
    world = World((4, 5, 3, 4))
    before = {name: world.delta(name) for name in world.layout}
    world.apply(decided(squeeze(9, gauge=gauge, allocate=allocate), world))
    assert world.layout.total_rank == 9
    for name, slot in world.layout.items():
        assert torch.allclose(world.delta(name), truncated(before[name], slot.rank), atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 10), st.floats(0.1, 10))
def test_no_other_ranks_of_that_total_keep_more_energy(ranks, amount, stretch):
    world = World(ranks)
    world.factors["m0"] = (world.factors["m0"][0] * stretch, world.factors["m0"][1])
    amount = min(amount, sum(ranks))
    values = [torch.linalg.svdvals(world.delta(name)).square() for name in world.layout]
    best = max(
        sum(float(v[:k].sum()) for v, k in zip(values, pick, strict=True))
        for pick in itertools.product(*(range(r + 1) for r in ranks))
        if sum(pick) == amount
    )
    world.apply(decided(squeeze(amount), world))
    kept = sum(float(world.delta(name).square().sum()) for name in world.layout)
    assert world.layout.total_rank == amount
    assert kept == pytest.approx(best, rel=1e-5)


def test_modules_whose_rank_stays_are_left_alone():
    world = World((4, 1, 4))
    plan = decided(squeeze(7, allocate="uniform"), world)
    assert set(plan.ops) == {"m0", "m2"}
    assert "2 of 3 modules change, for total rank 7" in plan.reason


def test_uniform_gives_one_rank_and_deals_out_what_is_left_over():
    world = World((6, 6, 6, 2))
    world.apply(decided(squeeze(13, allocate="uniform"), world))
    assert list(world.layout.ranks.values()) == [4, 4, 3, 2]


def test_a_module_without_energy_may_leave_and_one_with_a_minimum_may_not():
    world = World((2, 2, 2))
    world.factors["m1"] = (world.factors["m1"][0], 1e-9 * world.factors["m1"][1])
    plan = decided(squeeze(3), world)
    assert plan.ops["m1"] == (Drop(),)
    kept = World((2, 2, 2), min_rank=1)
    kept.apply(decided(squeeze(3), kept))
    assert list(kept.layout.ranks.values()) == [1, 1, 1]


def test_limits_that_the_present_ranks_break_are_mended():
    world = World((6, 6, 1), max_rank=4)
    world.apply(decided(squeeze(9, allocate="uniform"), world))
    assert list(world.layout.ranks.values()) == [4, 4, 1]
    small = World((1, 6, 6), min_rank=3)
    plan = decided(squeeze(9), small)
    (grow,) = plan.ops["m0"]
    assert isinstance(grow, Grow)
    assert plan.apply_to(small.layout).total_rank == 9


def test_a_fresh_adapter_is_cut_to_one_that_still_learns():
    world = World((4,) * 4, zero_b=True)
    world.apply(decided(squeeze(8), world))
    assert list(world.layout.ranks.values()) == [2, 2, 2, 2]
    for a, b in world.factors.values():
        assert not b.any()
        assert torch.linalg.matrix_rank(a) == 2
        assert float(a.norm(dim=1).min()) > 0.1


def test_directions_that_a_cannot_give_are_grown():
    world = World((4, 4))
    a, b = world.factors["m0"]
    world.factors["m0"] = (a[:1].repeat(4, 1), 0 * b)
    plan = decided(squeeze(6, allocate="uniform"), world)
    refactor, grow = plan.ops["m0"]
    assert isinstance(refactor, Refactor)
    assert isinstance(grow, Grow)
    assert (refactor.N.shape[0], grow.n) == (1, 2)
    world.apply(plan)
    assert not world.factors["m0"][1].any()


@pytest.mark.parametrize(("optimizer", "rewarm"), [("carry", 0), ("reset", 7)])
def test_what_becomes_of_the_optimizer_is_in_the_plan(optimizer, rewarm):
    plan = decided(squeeze(optimizer=optimizer, rewarm=7), World((4, 4, 4)))
    assert (plan.state, plan.rewarm) == (optimizer, rewarm)


# -- the way down -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "totals"),
    [
        ("constant", [6] * 6),
        ("linear", [41, 34, 27, 20, 13, 6]),
        ("cubic", [30, 18, 11, 7, 6, 6]),
        ("halving", [48, 24, 24, 12, 12, 6]),
    ],
)
def test_the_total_follows_its_curve_to_the_exact_budget(shape, totals):
    world = World((8,) * 6)
    policy = squeeze(6, EVENTS, shape=shape)
    policy.check(world.layout)
    seen = []
    state = policy.init(world.layout)
    for step in range(1, 61):
        if policy.when.due(step):
            plan = policy.decide(state, world.observe(policy.listen(step), step), world.layout, step)
            world.apply(plan)
            state = policy.decided(state, plan, world.layout, step)
            seen.append(world.layout.total_rank)
        world.train(step)
    assert seen == totals


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=2, max_size=5),
    st.floats(0.05, 1),
    st.sampled_from(["constant", "linear", "cubic", "cosine", "halving"]),
    st.sampled_from(["global", "uniform"]),
    st.integers(3, 30),
)
def test_any_budget_it_accepts_is_met_exactly(ranks, share, shape, allocate, every):
    world = World(ranks)
    amount = max(1, round(share * sum(ranks)))
    policy = squeeze(amount, When(every, every).resolve(60), shape=shape, allocate=allocate)
    policy.check(world.layout)
    run(world, policy, range(1, 61))
    assert world.layout.total_rank == amount


def test_a_budget_in_bytes_is_never_passed_and_used_up_to_one_direction():
    world = World((6,) * 6)
    policy = squeeze(1200, EVENTS, "size")
    policy.check(world.layout)
    run(world, policy, range(1, 61))
    assert 1200 - 24 * 4 < world.layout.bytes <= 1200


@pytest.mark.parametrize("shape", ["constant", "linear", "cubic", "cosine", "halving"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_all_cuts_together_keep_the_energy_asked_for(shape, share):
    world = World((8,) * 4)
    before = {name: world.delta(name) for name in world.layout}
    policy = squeeze(None, EVENTS, energy=share, shape=shape)
    policy.check(world.layout)
    state = policy.init(world.layout)
    for step in policy.when.events:  # no training between: what is lost is lost by the cuts
        world.apply(policy.decide(state, world.observe(policy.listen(step), step), world.layout, step))
    for name, delta in before.items():
        rank = world.layout[name].rank
        energy = torch.linalg.svdvals(delta).square()
        assert float(energy[:rank].sum() / energy.sum()) >= share - 1e-12
        if shape == "constant":  # one cut: no smaller rank would do
            assert float(energy[: rank - 1].sum() / energy.sum()) < share


def test_energy_leaves_alone_what_has_learnt_nothing_yet():
    assert not decided(squeeze(None, energy=0.5), World((4, 4), zero_b=True))


# -- what is measured -------------------------------------------------------------------------------------------------


def averages(world: World, weights: dict[int, float], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of z z^T and d d^T over the 40 tokens of each step, for the factors as they are."""
    grams = {step: world.signals(name, step) for step in weights}
    tokens = 40 * sum(weights.values())
    s_a, s_b = (sum(w * grams[step][s] for step, w in weights.items()) / tokens for s in (Signal.S_A, Signal.S_B))
    return s_a, s_b


def assert_best_cut(world: World, refactor, name: str, rank: int, s_a: torch.Tensor, s_b: torch.Tensor) -> None:
    """With roots of the two averages, what is lost is the tail of the core's singular values, and no less can be."""
    root_a, root_b = (torch.linalg.cholesky(s).T for s in (s_a, s_b))
    sigma = torch.linalg.svdvals(root_b @ root_a.T)
    assert isinstance(refactor, Refactor)
    kept = root_b @ refactor.M @ refactor.N @ root_a.T
    error = torch.linalg.matrix_norm(root_b @ root_a.T - kept)
    assert float(error) == pytest.approx(float(sigma[rank:].norm()), rel=1e-6)


@pytest.mark.parametrize("metric", ["outputs", "loss"])
def test_data_metrics_keep_most_of_the_averages_over_their_window(metric):
    world = World((4, 4))
    policy = squeeze(4, metric=metric, window=5, memory=4, allocate="uniform")
    world.decay = policy.decay
    plan = decided(policy, world)
    assert not policy.listen(15)
    assert policy.listen(16) >= {Signal.MEAN_ZZ, Signal.MEASURED}
    assert (Signal.MEAN_DD in policy.listen(16)) == (metric == "loss")
    for name in world.layout:
        s_a, s_b = averages(world, {step: 0.75 ** (20 - step) for step in range(16, 21)}, name)
        if metric == "outputs":
            _, b = world.factors[name]
            s_b = world.layout[name].scaling ** 2 * b.T @ b
        (refactor,) = plan.ops[name]
        assert refactor.metric == metric
        assert_best_cut(world, refactor, name, 2, s_a, s_b)


def test_what_was_measured_before_an_earlier_event_counts_on_for_what_came_of_it():
    """Nothing is trained here: it is as if both windows had been heard with the factors that the first event left."""
    when = When(10, 10).resolve(20)
    world, policy = World((6, 6)), squeeze(4, when, metric="loss", window=3, memory=5, shape="linear")
    world.decay = policy.decay
    state = policy.init(world.layout)
    for step in (8, 9, 10, 18, 19, 20):
        obs = world.observe(policy.listen(step), step)
        if step == 10:
            world.apply(policy.decide(state, obs, world.layout, step))
            assert world.layout.total_rank == 8
    weights = {step: 0.8**age for age, step in enumerate((20, 19, 18, 10, 9, 8))}
    plan = policy.decide(state, obs, world.layout, 20)
    assert plan.ops
    for name, ops in plan.ops.items():
        s_a, s_b = averages(world, weights, name)
        assert torch.allclose(obs[name][Signal.MEAN_ZZ], s_a, rtol=1e-10)
        assert torch.allclose(obs[name][Signal.MEAN_DD], s_b, rtol=1e-10)
        assert_best_cut(world, ops[0], name, plan.apply_to(world.layout)[name].rank, s_a, s_b)


@pytest.mark.parametrize("metric", ["outputs", "loss"])
def test_a_module_that_saw_more_tokens_does_not_weigh_more(metric):
    policy = squeeze(6, metric=metric)
    plans = []
    for more in (1, 10):
        world = World((4, 4, 4))
        for step in range(1, 21):
            world.observe(policy.listen(step), step)
        sums = world.running["m0"]
        world.running["m0"] = Running(sums.mean_zz, sums.mean_dd, more * sums.measured)
        plans.append(policy.decide(policy.init(world.layout), world.offer(policy.listen(20), 20), world.layout, 20))
    assert plans[0].apply_to(world.layout) == plans[1].apply_to(world.layout)


def test_weights_listen_to_factors_at_the_event_alone():
    policy = squeeze()
    assert [step for step in range(1, 61) if policy.listen(step)] == [20]
    assert policy.listen(20) == {Signal.A, Signal.B}


def without(obs: Observation, name: str, *signals: Signal) -> Observation:
    return Observation(
        obs.step, {n: {s: v for s, v in r.items() if n != name or s not in signals} for n, r in obs.items()}
    )


@pytest.mark.parametrize(("allocate", "by_weights"), [("uniform", 1), ("global", 3)])
def test_a_module_that_was_not_measured_falls_back_to_weights_and_the_reason_says_so(allocate, by_weights):
    world, policy = World((4, 4, 4)), squeeze(6, metric="outputs", allocate=allocate)
    state = policy.init(world.layout)
    for step in range(1, 21):
        obs = without(world.observe(policy.listen(step), step), "m1", Signal.MEAN_ZZ, Signal.MEASURED)
        state = policy.observe(state, obs, step)
    plan = policy.decide(state, obs, world.layout, 20)
    assert f"{by_weights} modules by weights, as m1 was not measured" in plan.reason
    metrics = {name: ops[0].metric for name, ops in plan.ops.items() if isinstance(ops[0], Refactor)}
    assert sum(metric == "weights" for metric in metrics.values()) == len(metrics) - (2 if allocate == "uniform" else 0)


@pytest.mark.parametrize(("tokens", "enough"), [(0, False), (4, False), (5, True)])
def test_a_direction_with_fewer_tokens_than_its_module_has_directions_makes_it_unmeasured(tokens, enough):
    world, policy = World((4, 4)), squeeze(4, metric="outputs", allocate="uniform")
    for step in range(1, 21):
        world.observe(policy.listen(step), step)
    world.apply(RankPlan({"m0": (Grow(1),)}))
    young = world.running["m0"]
    assert young.measured[-1] == 0
    world.running["m0"] = Running(young.mean_zz + torch.eye(5), young.mean_dd, young.measured.clamp(min=tokens))
    plan = policy.decide(policy.init(world.layout), world.offer(policy.listen(20), 20), world.layout, 20)
    assert ("m0 was not measured enough" in plan.reason) != enough


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "limits", "words"),
    [
        (squeeze(None), {}, "needs a budget, .* or params.energy, and not both"),
        (squeeze(4, energy=0.9), {}, "needs a budget, .* or params.energy, and not both"),
        (squeeze(4, When(90).resolve(60)), {}, "no due step"),
        (squeeze(25), {}, "only lowers ranks, but the adapter has total rank 24 and its budget is total rank 25"),
        (squeeze(11), {"min_rank": 2}, "limits allow only total rank 12 to"),
        (squeeze(20), {"max_rank": 3}, "limits allow only total rank 0 to total rank 18"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(policy, limits, words):
    with pytest.raises(ConfigError, match=words):
        policy.check(World((4,) * 6, **limits).layout)


def test_an_event_with_nothing_to_do_says_so():
    world = World((2, 2))
    plan = decided(squeeze(4), world)
    assert not plan
    assert "the adapter is within total rank 4 already" in plan.reason
