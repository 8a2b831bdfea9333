"""IncreLoRA: its rule against one worked out here, its schedule, and its options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel
from synthetic import World, enter, occasions, run

import rankflow
from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limits
from rankflow.plans.ops import Grow, Keep, Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.gate import Gate
from rankflow.policies.methods.increlora import IncreLora
from rankflow.policies.observation import Observation, Signal
from rankflow.training.checkpoint import load_state, save_state


def increlora(amount: float = 40, when: When | None = None, kind="total_rank", **settings) -> IncreLora:
    return IncreLora(budget=Budget(kind, amount), when=when or When(10, 10).resolve(60), **settings)


def scored(step: int, scores: dict[str, float | torch.Tensor], signal: Signal = Signal.DELTA_SCORE) -> Observation:
    return Observation(step, {n: {signal: torch.as_tensor(s, dtype=torch.float64)} for n, s in scores.items()})


# -- the rule ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1e3), min_size=6, max_size=6), min_size=10, max_size=30),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_who_grows_is_what_the_published_recursion_says(record, beta1, beta2):
    """I and U of eqs. 5-7, on recorded scores, in plain floats; then the three modules of greatest I U."""
    world = World((1,) * 6)
    last = len(record)
    policy = increlora(when=When(last, last).resolve(last), top_k=3, beta1=beta1, beta2=beta2, window="all")
    state = policy.init(world.layout)
    i, u = [0.0] * 6, [0.0] * 6
    for t, scores in enumerate(record, 1):
        state = policy.observe(state, scored(t, {f"m{k}": s for k, s in enumerate(scores)}), t)
        for k, s in enumerate(scores):
            i[k] = beta1 * i[k] + (1 - beta1) * s
            u[k] = beta2 * u[k] + (1 - beta2) * abs(s - i[k])
    for k in range(6):
        assert state[f"m{k}"][:2].tolist() == pytest.approx([i[k], u[k]], rel=1e-12, abs=1e-300)
    plan = policy.decide(state, Observation(last), world.layout, last)
    final = [float(f"{a * b:.5e}") for a, b in zip(i, u, strict=True)]
    if not any(a * b for a, b in zip(i, u, strict=True)):
        assert not plan
        assert "all scores are zero" in plan.reason
        return
    assert set(plan.ops) == {f"m{k}" for k in sorted(range(6), key=lambda k: (-final[k], k))[:3]}


def test_a_score_that_settles_loses_its_claim():
    """U of a constant score goes to 0: what is certain need not grow (the other wavers, and is smaller)."""
    policy, world = increlora(top_k=1), World((1, 1))
    state = policy.init(world.layout)
    for t in range(1, 61):
        state = policy.observe(state, scored(t, {"m0": 5.0, "m1": 1.0 + t % 2}), t)
    assert list(policy.decide(state, Observation(60), world.layout, 60).ops) == ["m1"]


def test_experts_are_blocks_of_one_delta():
    policy, layout = increlora(), Layout({"e": Slot(1, 4, 6, 1.0, kind="experts", experts=3), "l": Slot(1, 12, 6, 1.0)})
    per_expert = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # each over sqrt(6 * 4)
    whole = per_expert.sum() * math.sqrt(6 * 4) / math.sqrt(6 * 12)
    state = policy.observe(policy.init(layout), scored(1, {"e": per_expert, "l": whole}), 1)
    assert torch.allclose(state["e"], state["l"], rtol=1e-12)


def test_old_scores_do_not_decide():
    policy, world = increlora(), World((1, 1, 1))
    state = policy.observe(policy.init(world.layout), scored(10, {"m0": 9.0, "m1": 1.0, "m2": 1.0}), 10)
    assert "no finite score since the last event" in policy.decide(state, Observation(20), world.layout, 20).reason
    state = policy.observe(state, scored(15, {"m1": 1.0}), 15)
    plan = policy.decide(state, Observation(20), world.layout, 20)
    assert "2 modules had no finite score" in plan.reason


# -- budget and cadence -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=6),
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_left_to_itself_it_meets_any_budget_it_accepts_exactly(ranks, more, grow_by, every, seed):
    world = World(ranks, scores=lambda name, step: abs(math.sin(seed * step + len(name) * int(name[1:]))) + 0.1)
    room = sum(s.max_rank - s.rank for s in world.layout.values())
    amount = world.layout.total_rank + min(more, room)
    policy = increlora(amount, When(every, every).resolve(60), grow_by=grow_by)
    policy.check(world.layout)
    plans = run(world, policy, range(1, 61))
    assert world.layout.total_rank == amount
    sizes = [sum(op.n for ops in plan.ops.values() for op in ops if isinstance(op, Grow)) for plan in plans]
    assert sum(sizes) == amount - sum(ranks)
    assert max(sizes[:-1], default=0) <= math.ceil((amount - sum(ranks)) / len(plans) / grow_by) * grow_by


def test_growth_stops_at_the_budget_and_says_so():
    world = World((1,) * 4)
    plans = run(world, increlora(9, top_k=2), range(1, 61))
    totals = [sum(op.n for ops in p.ops.values() for op in ops if isinstance(op, Grow)) for p in plans]
    assert totals == [4, 1, 0, 0, 0, 0]
    assert "budget of total rank 9 is reached" in plans[-1].reason


def test_budgets_in_parameters_come_within_one_direction():
    world = World((1,) * 4)
    policy = increlora(500, kind="max_params")
    policy.check(world.layout)
    run(world, policy, range(1, 61))
    assert 500 - 24 < world.layout.params <= 500


def test_tied_modules_grow_together_to_the_exact_budget():
    world = World((1,) * 6)
    world.layout = Limits(ties=(("m0", "m1"),)).apply(world.layout)
    run(world, increlora(28), range(1, 61))
    assert world.layout.total_rank == 28
    assert world.layout["m0"].rank == world.layout["m1"].rank


def test_a_module_that_left_can_come_back():
    world = World((0, 8, 8), max_rank=8)
    run(world, increlora(20), range(1, 61))
    assert world.layout["m0"].rank == 4


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (IncreLora(when=When(10, 10).resolve(60)), "give it one, e.g. budget"),
        (increlora(5), "only grows, but the adapter already has total rank 6 of a budget of total rank 5"),
        (increlora(99), "limits allow only total rank 0 to total rank 60"),
        (increlora(when=When(90).resolve(60)), "no due step"),
        (increlora(40, top_k=2, grow_by=2), "6 events of top_k 2 times grow_by 2 add total rank 24, but total rank 34"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(policy, words):
    with pytest.raises(ConfigError, match=words):
        policy.check(World((1,) * 6).layout)


# -- listening --------------------------------------------------------------------------------------------------------


def listened(policy: IncreLora, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if policy.listen(step)]


def test_it_listens_in_windows_only():
    when = When(100, 100).resolve(1000)
    assert listened(increlora(when=when, window=3, score_fraction=1), 1000)[:6] == [98, 99, 100, 198, 199, 200]
    assert listened(increlora(when=when, window=20, score_fraction=0.1), 1000) == [
        s for s in range(1, 1001) if (s - 1) % 100 >= 90
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 30), st.integers(1, 200), st.floats(0.01, 1), st.sampled_from(["all", 1, 7, 20])
)
def test_scored_steps_stay_within_their_share_of_the_run(start, every, stop, fraction, window):
    policy = increlora(when=When(start, every, stop).resolve(200), window=window, score_fraction=fraction)
    events = policy.when.events
    heard = listened(policy, 200)
    assert set(events) <= set(heard)
    assert len(heard) <= max(fraction * 200, len(events))


def test_the_published_cadence_is_every_step_until_the_last_event():
    policy = increlora(when=When(30, 10, 70).resolve(100), window="all", score_fraction=1)
    assert listened(policy, 100) == list(range(1, 61))
    assert policy.notes == ()


def test_a_shortened_window_is_said():
    policy = increlora(when=When(10, 10).resolve(100))
    (note,) = policy.notes
    assert "scores 1 steps before each of 10 events, not 20 steps" in note


def test_the_sampled_score_is_asked_for_by_its_own_signal():
    policy, world = increlora(score="sampled"), World((1,) * 4)
    assert policy.listen(10) == {Signal.DELTA_SCORE_SAMPLED}
    state = policy.observe(policy.init(world.layout), scored(1, {"m0": 1.0}), 1)
    assert not state["m0"][:3].any()
    run(world, policy, range(1, 61))
    assert world.layout.total_rank == 40


# -- what growth does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", ["preserve", "official"])
def test_growth_keeps_the_function_or_shrinks_it_as_the_released_code(rescale):
    world = World((2, 4))
    before = {name: world.delta(name) for name in world.layout}
    policy = increlora(10, When(10, 100).resolve(60), rescale=rescale)
    state = policy.init(world.layout)
    state = policy.observe(state, world.observe(policy.listen(10), 10), 10)
    world.apply(policy.decide(state, world.observe(policy.listen(10), 10), world.layout, 10))
    assert world.layout.total_rank == 10
    for name, old in ("m0", 2), ("m1", 4):
        factor = 1.0 if rescale == "preserve" else old / world.layout[name].rank
        assert torch.allclose(world.delta(name), factor * before[name], atol=1e-14)


def test_rescaling_keeps_the_balance_of_the_factors_and_fits_experts():
    policy = increlora(8, rescale="official")
    layout = Layout({"e": Slot(2, 4, 6, 1.0, kind="experts", experts=3), "gone": Slot(0, 4, 6, 1.0)})
    state = policy.observe(policy.init(layout), scored(60, {"e": torch.ones(3)}), 60)
    plan = policy.decide(state, Observation(60), layout, 60)
    refactor, grow = plan.ops["e"]
    assert isinstance(refactor, Refactor)
    assert isinstance(grow, Grow)
    assert refactor.N.shape == refactor.M.shape == (3, 2, 2)
    assert torch.equal(refactor.N, refactor.M)
    assert [type(op) for op in plan.ops["gone"]] == [Grow]
    assert plan.apply_to(layout).total_rank == 8


def test_gradient_directions_are_asked_for_at_the_event_and_used_where_there_are_any():
    policy, world = increlora(12, When(10, 100).resolve(60), grow_init="grad"), World((1, 1, 1))
    assert policy.listen(10) == {Signal.DELTA_SCORE, Signal.SKETCH}
    assert policy.listen(9) == {Signal.DELTA_SCORE}
    obs = world.observe(policy.listen(10), 10)
    records = {name: dict(obs[name]) for name in obs}
    records["m1"].pop(Signal.SKETCH)
    obs = Observation(10, records)
    plan = policy.decide(policy.observe(policy.init(world.layout), obs, 10), obs, world.layout, 10)
    inits = {name: op.init for name, ops in plan.ops.items() for op in ops if isinstance(op, Grow)}
    assert inits == {"m0": "grad", "m1": "zero_b", "m2": "grad"}


# -- orthogonality ----------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_paper_s_and_off_unless_asked_for():
    assert increlora().penalty is None
    penalty = increlora(orth=0.1).penalty
    assert penalty is not None
    world = World((3, 2))
    mean = sum(float(penalty(a, b)) for a, b in world.factors.values()) / 2
    total = 0.0
    for a, b in world.factors.values():
        for gram in (a @ a.T, b.T @ b):
            total += math.sqrt(sum((float(g) - (i == j)) ** 2 for i, row in enumerate(gram) for j, g in enumerate(row)))
    assert mean == pytest.approx(0.1 * total / (2 * 2), rel=1e-6)


def test_the_penalty_s_gradient_is_finite_at_zero_and_at_its_minimum():
    penalty = increlora(orth=1.0).penalty
    assert penalty is not None
    a = torch.eye(3, 8).requires_grad_()
    b = torch.zeros(5, 3).requires_grad_()
    for grad in torch.autograd.grad(penalty(a, b), (a, b)):
        assert bool(grad.isfinite().all())
    experts = penalty(torch.randn(4, 3, 8), torch.randn(4, 5, 3))
    assert experts.shape == ()


# -- advance learning -------------------------------------------------------------------------------------------------

E = float(torch.tensor(1e-5))  # as forwards have it, in float32


def reserved(world: World) -> dict[str, int]:
    return {n: int((world.value(n) != 1).sum()) for n in world.theta}


def test_every_module_learns_what_it_would_gain_next_in_advance():
    policy, world = increlora(20, advance=True), World((1, 2, 0, 3), max_rank=4)
    enter(world, policy)
    assert reserved(world) == {"m0": 2, "m1": 2, "m3": 1}  # m3 has room for one, m2 is not in the adapter
    assert torch.equal(world.value("m1"), torch.tensor([1.0, 1.0, 1e-5, 1e-5]))
    assert not World((1,) * 4).theta
    assert increlora(40).gate is None
    assert policy.gate == Gate(trained_on="nothing")
    assert "on top of limits and budget" in policy.notes[-1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=6),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from(["auto", 1, 2]),
    st.integers(1, 9),
)
def test_reserves_grow_into_the_very_ranks_that_there_would_be_without_and_no_event_moves_the_function(
    ranks, more, grow_by, top_k, seed
):
    def scores(name: str, step: int) -> float:
        return abs(math.sin(seed * step + len(name) * int(name[1:]))) + 0.1

    plain, world = World(ranks, scores=scores), World(ranks, scores=scores)
    amount = world.layout.total_rank + min(more, sum(s.max_rank - s.rank for s in world.layout.values()))
    options = {"grow_by": grow_by, "top_k": top_k, "when": When(6, 6).resolve(60)}
    run(plain, increlora(amount, **options), range(1, 61))
    policy = increlora(amount, **options, advance=True)
    state = enter(world, policy)
    for step, obs, asked in occasions(world, policy, range(1, 61)):
        state = policy.observe(state, obs, step)
        if not asked:
            continue
        held, before = reserved(world), {n: world.delta(n) for n in world.layout}
        rows = {n: a for n, (a, _) in world.factors.items()}
        plan = policy.decide(state, obs, world.layout, step)
        world.apply(plan)
        state = policy.decided(state, plan, world.layout, step)
        now = reserved(world)
        for name, ops in plan.ops.items():
            opened = [i for op in ops if isinstance(op, Open) and op.to == 1 for i in op.idx]
            bare = len(rows[name]) - held[name]
            assert opened == list(range(bare, bare + len(opened)))
            assert torch.equal(world.factors[name][0][: bare + len(opened)], rows[name][: bare + len(opened)])
            left = any(isinstance(op, Keep) for op in ops)  # some of the reserve, and e times what that had learnt
            assert torch.allclose(world.delta(name), before[name], rtol=1e-12, atol=1e-2 if left else 1e-12)
        assert sum(s.rank for s in world.layout.values()) - sum(now.values()) <= amount
        assert all(now[n] in (0, *range(1, grow_by + 1)) for n in now)
    world.apply(policy.leave(state, world.layout))
    assert world.layout.ranks == plain.layout.ranks
    assert not any(reserved(world).values())


def test_reserves_leave_with_the_last_growth_or_with_the_phase():
    policy, world = increlora(8, advance=True), World((1, 1))
    run(world, policy, range(1, 61))
    assert world.layout.total_rank == 8
    world = World((1, 1))
    state = enter(world, policy)
    assert world.layout.total_rank == 6
    plan = policy.decide(state, Observation(60), world.layout, 60)  # nothing was ever heard
    assert plan.reason == "no finite score since the last event; nothing grows"
    assert plan.apply_to(world.layout).total_rank == 2
    assert policy.leave(state, world.layout).apply_to(world.layout).total_rank == 2


def test_limits_count_directions_without_the_reserve():
    world = World((2, 2), max_rank=6)
    world.layout = Limits(buckets=(2, 4, 6)).apply(world.layout)
    policy = increlora(10, advance=True, grow_by=1)
    enter(world, policy)
    assert reserved(world) == {"m0": 2, "m1": 2}  # what one growth amounts to here
    run(world, policy, range(1, 61))
    assert sorted(world.layout.ranks.values()) == [4, 6]
    odd = World((3, 2))
    odd.layout = Limits(buckets=(2, 4, 8)).apply(odd.layout)
    enter(odd, increlora(12, advance=True))
    assert reserved(odd) == {"m0": 0, "m1": 2}  # m0 could not go back to the 3 that it has


def test_the_released_rescaling_counts_no_reserve():
    policy, world = increlora(4, When(60, 60).resolve(60), rescale="official", advance=True), World((2,))
    state = enter(world, policy)
    before = world.delta("m0")
    state = policy.observe(state, world.observe(policy.listen(60), 60), 60)
    world.apply(policy.decide(state, world.observe(policy.listen(60), 60), world.layout, 60))
    assert torch.allclose(world.delta("m0"), 0.5 * before, atol=1e-14)


ADVANCING = {
    "phases": [
        {
            "policy": "increlora",
            "until": "80%",
            "budget": {"mean_rank": 4},
            "when": {"start": 3, "every": 3},
            "params": {"window": 2, "score_fraction": 1.0, "advance": True, "reserve_gate": 0.01},
        },
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 1, "max": 8}},
}


def test_a_reserve_is_trained_as_published_and_opens_with_the_rows_it_has_learnt():
    """DeltaW = s B (A * E) in every module, E = 1 for two directions and e for the two in reserve, all of it trained by
    an Adam of this test, in float64; new directions ramp up over ten steps."""
    model, published = (tiny_llama(r=r, dropout=0.0).double() for r in (2, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    policy = {**ADVANCING["phases"][0], "when": {"start": 14, "every": 2}}
    policy = {**policy, "params": {**policy["params"], "reserve_gate": 1e-5}}
    del policy["until"]
    flow = rankflow.attach(model, optimizer, policy, total_steps=20)
    mine, theirs = Adapter(model).sites, Adapter(published).sites
    adam: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}
    gate = torch.tensor([1.0, 1.0, E, E], dtype=torch.float64)
    for name, site in theirs.items():
        site.A.data.copy_(mine[name].A)
        site.B.data.copy_(mine[name].B)
        assert not bool(site.B[:, 2:].any())
        adam |= {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in (site.A, site.B)}
        site.layer.scaling["default"] = flow.layout[name].scaling
        site.layer.lora_A["default"].register_forward_hook(lambda module, args, z: z * gate)
    for t, batch in enumerate(token_batches(13), 1):
        model(**batch).loss.backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
        published(**batch).loss.backward()
        ramp = torch.tensor([1.0, 1.0, min(1.0, t / 10), min(1.0, t / 10)], dtype=torch.float64)
        with torch.no_grad():
            for p, (m, v) in adam.items():
                assert p.grad is not None
                m.mul_(0.9).add_(0.1 * p.grad)
                v.mul_(0.999).add_(0.001 * p.grad.square())
                step = 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                p -= step * (ramp[:, None] if len(p) == 4 else ramp)
                p.grad = None
    for name, site in theirs.items():
        for role in ("A", "B"):
            torch.testing.assert_close(getattr(mine[name], role), getattr(site, role), rtol=1e-7, atol=1e-10)
        assert float(site.B.detach()[:, 2:].abs().max()) > 1e-4  # it has learnt
    raw = {n: (s.A.detach().clone(), s.B.detach().clone()) for n, s in mine.items()}
    surgeon, probe = flow._surgeon, token_batches(1)[0]
    before = model.eval()(**probe).logits.detach()
    name = next(iter(mine))
    surgeon.apply(RankPlan({name: (Open((2, 3)), Grow(2), Open((4, 5), 1e-5))}, "as growth does"), 14)
    torch.testing.assert_close(model(**probe).logits.detach(), before, rtol=1e-12, atol=1e-13)
    assert torch.equal(mine[name].A[:4], raw[name][0])
    torch.testing.assert_close(mine[name].B[:, 2:4], E * raw[name][1][:, 2:], rtol=1e-12, atol=0)
    assert torch.equal(mine[name].B[:, :2], raw[name][1][:, :2])
    flow.detach()


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 9, 10])
def test_a_resumed_run_with_reserves_ends_where_an_uninterrupted_one_does(tmp_path, stop):
    whole = Run(ADVANCING, 12).until(12)
    part = Run(ADVANCING, 12).until(stop)
    part.model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    save_state(part.flow, tmp_path)
    rankflow.restore(model := tiny_llama(), tmp_path)
    again = Run(ADVANCING, 12, model=model, state=load_state(tmp_path))
    again.optimizer.load_state_dict(part.optimizer.state_dict())
    again.scheduler.load_state_dict(part.scheduler.state_dict())
    part.flow.detach()
    again.until(12)
    assert same_weights(weights(whole.model), weights(again.model))
    assert whole.flow.layout == again.flow.layout
    whole.flow.finish()
    again.flow.finish()
    assert whole.flow.layout == again.flow.layout


def test_ranks_are_those_of_the_budget_once_growth_is_over_and_files_are_plain_lora_all_the_way(tmp_path):
    run = Run(ADVANCING, 12)
    assert run.flow.layout.ranks == dict.fromkeys(run.flow.layout, 4)  # two, and two in reserve
    probe = run.batches[0]
    for stop in range(1, 13):
        run.until(stop)
        run.model.save_pretrained(tmp_path / str(stop), selected_adapters=["default"])
        base = tiny_llama().unload()  # of the same seed
        loaded = PeftModel.from_pretrained(base, tmp_path / str(stop))
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**probe).logits, run.model.eval()(**probe).logits)
        run.model.train()
    values = {stop: e for e in run.flow.ledger.events if (stop := e["step"]) is not None and e["event"] == "resize"}
    assert values[9]["total_rank"] == 40 == run.flow.layout.total_rank
    assert not run.flow._gates
    run.flow.finish()
    assert run.flow.layout.total_rank == 40


def test_a_run_that_ends_early_leaves_no_reserve_behind_and_one_that_is_given_up_keeps_what_it_computes():
    run = Run(ADVANCING, 12).until(4)
    grown = run.flow.layout.total_rank - sum(int((v != 1).sum()) for v in run.flow._gates.values().values())
    run.flow.finish()
    assert run.flow.layout.total_rank == grown
    run = Run(ADVANCING, 12).until(4)
    before, wanted = run.flow.layout, run.model.eval()(**run.batches[0]).loss
    run.flow.detach()
    torch.testing.assert_close(run.model(**run.batches[0]).loss, wanted)
    assert run.flow.layout == before
