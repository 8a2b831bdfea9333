"""RigL on directions: its rule against one worked out here, constant budgets, hostile input, a real run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import lora
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, resumed, same_weights, tiny_llama, weights
from synthetic import World, run

from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.ops import Drop, Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.methods.rigl import RigL
from rankflow.policies.observation import Observation, Signal
from rankflow.surgery.surgeon import Surgeon

EVENTS = When(10, 10).resolve(60)  # 10, 20, ..., 60; they end at step 61


def rigl(budget: Budget | None = None, when: When = EVENTS, **params) -> RigL:
    return RigL(budget=budget, when=when, **params)


def decided(policy: RigL, world: World, step: int = 10, obs: Observation | None = None) -> RankPlan:
    obs = world.observe(policy.listen(step), step) if obs is None else obs
    return policy.decide(policy.observe(policy.init(world.layout), obs, step), obs, world.layout, step)


def with_sketches(world: World, sketches: dict[str, torch.Tensor], step: int = 10) -> Observation:
    seen = world.observe(rigl().needs - {Signal.SKETCH}, step)
    return Observation(
        step,
        {n: {**seen[n], **({Signal.SKETCH: sketches[n]} if n in sketches else {})} for n in seen},
    )


def kept_and_grown(plan: RankPlan, layout: Layout) -> dict[str, tuple[tuple[int, ...], int]]:
    """Module -> (directions that stay, how many are new)."""
    found = {}
    for name, slot in layout.items():
        stay, new = tuple(range(slot.rank)), 0
        for op in plan.ops.get(name, ()):
            if isinstance(op, Keep):
                stay = op.idx
            elif isinstance(op, Drop):
                stay = ()
            elif isinstance(op, Grow):
                new += op.n
        found[name] = (stay, new)
    return found


# -- the rule ---------------------------------------------------------------------------------------------------------


def outside(rows: np.ndarray) -> np.ndarray:
    """The dense projector on what is orthogonal to `rows`."""
    return np.eye(rows.shape[1]) - np.linalg.pinv(rows) @ rows


def expected(world: World, share: float, step: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """What the rule says, with dense projectors: the n weakest directions against all candidates for n places."""
    sizes, sketches, rows = [], {}, {}
    for name, (a, b) in world.factors.items():
        for i in range(len(a)):
            outer = world.layout[name].scaling * np.outer(b[:, i].numpy(), a[i].numpy())
            sizes.append((np.linalg.norm(outer), name, i))
        rows[name], sketches[name] = a.numpy(), world.signals(name, step)[Signal.SKETCH].numpy()
    n = round(share * len(sizes))
    dropped = {(name, i) for _, name, i in sorted(sizes)[:n]}
    candidates = []
    for name, a in rows.items():
        kept = [i for i in range(len(a)) if (name, i) not in dropped]
        strengths = np.linalg.svd(sketches[name] @ outside(a), compute_uv=False)
        room = min(a.shape[1] - len(a), len(strengths))
        candidates += [(s, name, None) for s in strengths[:room]]
        for i in set(range(len(a))) - set(kept):
            candidates.append(
                (np.linalg.norm(sketches[name] @ outside(a[kept]) @ a[i]) / np.linalg.norm(a[i]), name, i)
            )
    gone = {name: sum(who == name for who, _ in dropped) for name in rows}
    room = {name: world.layout[name].max_rank - len(a) + gone[name] for name, a in rows.items()}
    won: list = []
    for candidate in sorted(candidates, key=lambda c: -c[0]):
        if len(won) < n and sum(who == candidate[1] for _, who, _ in won) < room[candidate[1]]:
            won.append(candidate)
    again = {(name, i) for _, name, i in won if i is not None}
    return {
        name: (
            tuple(i for i in range(len(a)) if (name, i) not in dropped - again),
            sum(who == name and i is None for _, who, i in won),
        )
        for name, a in rows.items()
    }


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.sampled_from([0.1, 0.3, 0.6, 1.0]),
    st.sampled_from([10, 40]),
)
def test_who_moves_where_is_what_the_rule_says(ranks, rate, step):
    world = World(ranks)
    plan = decided(rigl(rate=rate), world, step)
    share = rate * (1 - (step - 10) / (61 - 10))
    assert kept_and_grown(plan, world.layout) == expected(world, share, step)


@pytest.mark.parametrize(("fade", "half"), [("linear", 0.5), ("cosine", 0.5), ("linear", 0.9), ("cosine", 0.9)])
def test_the_share_decays_from_the_first_event_to_the_end_of_the_events(fade, half):
    when = When(100, 10, 300).resolve(1000)
    world = World((4,) * 25)
    t = int(100 + half * 200)
    share = {"linear": 1 - half, "cosine": (1 + math.cos(math.pi * half)) / 2}[fade]
    for step, moving in ((100, 40), (t, round(0.4 * share * 100))):
        assert decided(rigl(when=when, rate=0.4, fade=fade), world, step).reason.startswith(f"{moving} weakest ")


def test_new_rows_lie_where_the_gradient_is_largest_outside_the_rows_that_were_there():
    world = World((4, 4, 4))
    plan = decided(rigl(rate=0.5), world)
    for name, ops in plan.ops.items():
        for op in ops:
            if isinstance(op, Grow):
                a = world.factors[name][0].numpy()
                sketch = world.signals(name, 10)[Signal.SKETCH].numpy()
                _, s, v = np.linalg.svd(sketch @ outside(a))
                assert op.init == "grad"
                got = op.sketch.numpy()
                assert np.allclose(got.T @ got, v[: op.n].T @ np.diag(s[: op.n] ** 2) @ v[: op.n], atol=1e-9)
                assert np.abs(got @ a.T).max() < 1e-9
    assert any(isinstance(op, Grow) for ops in plan.ops.values() for op in ops)


def test_scaling_counts_in_a_direction_s_size():
    world = World((4, 4))  # scalings 0.5 and 1.5
    world.factors = dict.fromkeys(world.factors, (torch.randn(4, 12).double(), torch.randn(12, 4).double()))
    world.layout = Layout({n: replace(s, in_features=12, out_features=12) for n, s in world.layout.items()})
    world.weights = {n: torch.zeros(12, 12).double() for n in world.layout}
    a, b = world.factors["m0"]
    world.factors = {n: (a, b / b.norm(dim=0) / a.norm(dim=1)) for n in world.factors}  # all of one size, but for s
    # No gradient where m0 is, so nothing of it is left untouched
    plan = decided(rigl(rate=0.5), world, obs=with_sketches(world, {n: torch.eye(12).double() for n in world.layout}))
    stays = kept_and_grown(plan, world.layout)
    assert stays["m1"][0] == (0, 1, 2, 3)


def test_a_dropped_direction_that_wins_again_is_left_untouched():
    """All the gradient lies along the weakest direction: nothing else has a claim to its place."""
    world = World((3, 3))
    a, b = world.factors["m0"]
    b[:, 1] *= 1e-9
    world.factors["m1"][1].mul_(100)
    zero = torch.zeros(4, world.layout["m1"].in_features, dtype=torch.float64)
    pointing = torch.outer(torch.ones(4).double(), a[1])
    plan = decided(rigl(rate=0.17), world, obs=with_sketches(world, {"m0": pointing, "m1": zero}))
    assert not plan
    assert "none of the 1 weakest directions would do better elsewhere" in plan.reason
    other = decided(rigl(rate=0.17), world, obs=with_sketches(world, {"m0": zero[:, :1].expand(4, 12), "m1": zero + 1}))
    assert kept_and_grown(other, world.layout) == {"m0": ((0, 2), 0), "m1": ((0, 1, 2), 1)}


def test_where_no_gradient_is_nothing_moves():
    world = World((4, 0, 4), zero_b=True)
    zero = {n: torch.zeros(4, s.in_features, dtype=torch.float64) for n, s in world.layout.items()}
    assert not decided(rigl(rate=1.0), world, obs=with_sketches(world, zero))


def test_where_all_is_equal_modules_lose_evenly():
    world = World((4,) * 4, zero_b=True)
    sketches = {}
    for name, (a, b) in world.factors.items():
        unit = torch.eye(a.shape[1], dtype=torch.float64)
        world.factors[name], sketches[name] = (unit[:4], b), unit[4:]
    plan = decided(rigl(rate=0.25), world, obs=with_sketches(world, sketches))
    assert kept_and_grown(plan, world.layout) == dict.fromkeys(world.layout, ((0, 1, 2), 1))


# -- the budget -------------------------------------------------------------------------------------------------------

worlds = st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any)


@settings(max_examples=40, deadline=None)
@given(worlds, st.floats(0.05, 1), st.integers(1, 15), st.booleans())
def test_the_total_rank_is_the_same_after_every_event(ranks, rate, every, lowest):
    world = World(ranks, min_rank=0)
    low = [min(r, int(lowest)) for r in ranks]
    entries = tuple(Limit(n, low[i], 8) for i, n in enumerate(world.layout))
    world.layout = Limits(entries).apply(world.layout)
    policy = rigl(when=When(every, every).resolve(60), rate=rate)
    policy.check(world.layout)
    totals = [world.layout.total_rank]
    apply = world.apply

    def watched(plan):
        apply(plan)
        totals.append(world.layout.total_rank)

    world.apply = watched
    plans = run(world, policy, range(1, 61))
    assert set(totals) == {sum(ranks)}
    assert len(plans) == len(policy.when.events)


@settings(max_examples=40, deadline=None)
@given(worlds, st.floats(0.05, 1), st.integers(1, 9), st.sampled_from(["max_params", "size"]))
def test_other_budgets_are_never_passed_and_kept_within_one_direction(ranks, rate, every, kind):
    world = World(ranks)
    spent = world.layout.params if kind == "max_params" else world.layout.bytes
    policy = rigl(Budget(kind, spent), When(every, every).resolve(60), rate=rate)
    policy.check(world.layout)
    dearest = max(policy.budget.cost(slot) for slot in world.layout.values())
    state = policy.init(world.layout)
    for step in range(1, 61):
        obs = world.observe(policy.listen(step), step)
        if policy.when.due(step):
            state = policy.observe(state, obs, step)
            world.apply(policy.decide(state, obs, world.layout, step))
            assert spent - dearest < policy.budget.spent(world.layout) <= spent
        world.train(step)


def test_a_budget_above_what_there_is_is_filled_at_the_first_event():
    world = World((2, 2, 2))
    policy = rigl(Budget("total_rank", 12))
    policy.check(world.layout)
    world.apply(decided(policy, world))
    assert world.layout.total_rank == 12


def test_limits_that_change_in_mid_run_are_met_with_the_best_that_there_is():
    world = World((6, 4, 2))
    world.factors["m0"][1][:, 0] = 0  # the smallest
    world.layout = Limits((Limit("m0", 0, 4),)).apply(world.layout)
    plan = decided(rigl(rate=0.01), world)
    assert kept_and_grown(plan, world.layout)["m0"][0] == (1, 2, 3, 4)
    assert plan.apply_to(world.layout).total_rank == 12


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (rigl(Budget("total_rank", 11)), "gives none up, but the adapter has total rank 12 and its budget is total ra"),
        (rigl(Budget("total_rank", 99)), "limits allow only total rank 0 to total rank 28"),
        (rigl(when=When(90).resolve(60)), "no due step"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(policy, words):
    with pytest.raises(ConfigError, match=words):
        policy.check(World((4, 4, 4)).layout)


# -- modules that leave, stand still, show nothing --------------------------------------------------------------------


def test_a_module_that_left_competes_with_what_it_was_last_worth():
    world = World((1, 3))
    world.factors["m0"][1].mul_(1e-9)
    policy = rigl(rate=0.25)
    weak, strong = (k * torch.ones(4, 1).double() for k in (1.0, 5.0))
    state = policy.init(world.layout)

    def event(step, *sketches):
        nonlocal state
        obs = with_sketches(world, dict(zip(world.layout, sketches, strict=True)), step)
        state = policy.observe(state, obs, step)
        plan = policy.decide(state, obs, world.layout, step)
        world.apply(plan)
        return plan

    event(10, weak * torch.eye(12)[:1].double(), strong * torch.eye(10)[:1].double())
    assert world.layout.ranks == {"m0": 0, "m1": 4}
    event(20, torch.zeros(4, 12), 0.9 * strong * torch.eye(10)[1:2].double())  # m0 is not observed
    assert world.layout.ranks == {"m0": 0, "m1": 4}
    plan = event(30, torch.zeros(4, 12), 1e-3 * torch.ones(4, 10).double())
    assert world.layout.ranks == {"m0": 1, "m1": 3}
    (back,) = plan.ops["m0"]
    assert (back.n, back.init) == (1, "zero_b")


def test_a_module_that_left_and_is_frozen_stays_away():
    world = World((0, 4))
    policy = rigl(rate=0.5)
    state = {**policy.init(world.layout), "strengths/m0": torch.tensor([1e9], dtype=torch.float64)}
    world.layout = Layout({n: replace(s, trainable=n != "m0") for n, s in world.layout.items()})
    obs = world.observe(policy.needs, 10)
    plan = policy.decide(policy.observe(state, obs, 10), obs, world.layout, 10)
    assert plan.apply_to(world.layout).ranks == {"m0": 0, "m1": 4}


def test_what_was_never_measured_stays_away_unless_the_budget_asks_for_it():
    world = World((0, 4, 4), max_rank=6)
    assert decided(rigl(rate=0.5), world).apply_to(world.layout)["m0"].rank == 0
    assert decided(rigl(Budget("total_rank", 16)), world).apply_to(world.layout)["m0"].rank == 4


@pytest.mark.parametrize("how", ["frozen", "unreached"])
def test_a_module_that_is_frozen_or_not_reached_stands_still(how):
    world = World((4, 4, 4))
    world.factors["m1"][1].mul_(1e-9)  # the weakest by far
    seen = world.observe(rigl().needs, 10)
    records = {n: dict(seen[n]) for n in seen}
    if how == "frozen":
        world.layout = Layout({n: replace(s, trainable=n != "m1") for n, s in world.layout.items()})
    else:
        del records["m1"][Signal.SKETCH]
    plan = decided(rigl(rate=0.5), world, obs=Observation(10, records))
    assert plan.apply_to(world.layout).total_rank == 12
    assert "m1" not in plan.ops
    assert "1 modules are frozen or show no gradient" in plan.reason


def test_the_new_are_made_up_at_random_where_the_gradient_has_no_more_directions():
    world = World((2, 2))
    thin = {n: torch.eye(s.in_features, dtype=torch.float64)[:1] for n, s in world.layout.items()}
    plan = decided(rigl(Budget("total_rank", 12), rate=0.01), world, obs=with_sketches(world, thin))
    grown = [op for ops in plan.ops.values() for op in ops if isinstance(op, Grow)]
    assert sum(op.n for op in grown) == 8
    assert all(op.sketch is not None and len(op.sketch) == 1 for op in grown)


# -- the first updates of what is new ---------------------------------------------------------------------------------


def updates(seed_v: str, strength: float, steps: int = 20) -> list[float]:
    """Largest updates, in lr, of a column of B grown after 5000 AdamW steps of one constant gradient, whose entries are
    all of one size along every old row of A, and `strength` times that along the new one. No ramp."""
    model = lora("linear", trained=False)
    adapter = Adapter(model)
    site = next(iter(adapter.sites.values()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    r, width = site.A.shape
    with torch.no_grad():
        site.A.copy_(torch.eye(r, width))  # the new row is as long, and one of the other unit vectors
    gradient = torch.ones(len(site.B), width, dtype=torch.float64)  # of s DeltaW
    gradient[:, r:] = 0
    gradient[:, r] = strength
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    site.B.grad = (gradient @ site.A.T).detach()
    optimizer.step()
    kept = optimizer.state[site.B]  # what 5000 such steps leave
    kept["exp_avg"].copy_(site.B.grad * (1 - 0.9**5000))
    kept["exp_avg_sq"].copy_(site.B.grad.square() * (1 - 0.999**5000))
    for p in adapter.parameters():
        optimizer.state[p]["step"].fill_(5000.0)
    surgeon = Surgeon(adapter, optimizer, warmup=0, seed_v=seed_v)  # type: ignore[arg-type]
    surgeon.apply(RankPlan({site.name: (Grow(1, "grad", gradient[:1]),)}))
    found = []
    for _ in range(steps):
        before = site.B.detach()[:, -1].clone()
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        site.B.grad = (gradient @ site.A.T).detach()
        optimizer.step()
        found.append(float((site.B.detach()[:, -1] - before).abs().max()) / 1e-3)
    return found


def test_under_a_constant_gradient_new_directions_start_slowly_and_never_overshoot():
    """SpIEL sets m and v as if the gradient had been seen all along, so its first update is lr. The surgeon leaves m at
    0 and seeds v by the siblings: (1 - beta1^k) lr at the k-th step. State of zero overshoots from the first on."""
    seeded, naive = updates("siblings", 1.0), updates("zero", 1.0)
    assert seeded == pytest.approx([1 - 0.9**k for k in range(1, 21)], rel=0.01)
    assert naive[0] == pytest.approx(0.1 / math.sqrt(0.001), rel=0.01)  # 3.16
    assert max(naive) > 6


def test_siblings_vouch_for_gradients_like_their_own_only():
    """Where the gradient is ten times theirs, v is a hundred times too small; still less is overshot than from zero."""
    seeded, naive = updates("siblings", 10.0), updates("zero", 10.0)
    assert seeded[0] == pytest.approx(10 * 0.1 / math.sqrt(0.999 + 0.1), rel=0.01)
    assert 1 < max(seeded) < 0.9 * max(naive)


# -- a real run -------------------------------------------------------------------------------------------------------

REAL = {
    "policy": "rigl",
    "when": {"start": 4, "every": 4, "stop": 20},
    "params": {"rate": 0.4},
    "limits": {"*": {"min": 0, "max": 8}},
}


def test_a_real_run_moves_directions_at_constant_rank():
    run = Run(REAL, 20, model=tiny_llama(r=4))
    first = run.flow.layout
    totals = [run.until(step).flow.layout.total_rank for step in range(1, 21)]
    assert set(totals) == {first.total_rank}
    assert run.flow.layout != first
    assert all(math.isfinite(loss) for loss in run.losses)
    plans = [e["plan"]["ops"] for e in run.flow.ledger.events if e["event"] == "resize"]
    assert len(plans) == 4
    assert {"keep", "grow"} <= {op["op"] for plan in plans for ops in plan.values() for op in ops}


def test_a_real_run_empties_modules_and_brings_them_back():
    """All of rank 1 moves, into fewer modules; then a budget that only all modules together can spend."""
    when = {"every": 3}
    policy = {
        "phases": [
            {"policy": "rigl", "until": 10, "when": when, "params": {"rate": 1.0}},
            {"policy": "rigl", "budget": {"mean_rank": 2}, "when": when},
        ],
        "limits": {"*": {"min": 0, "max": 2}},
    }
    run = Run(policy, 14, model=tiny_llama(r=1)).until(9)
    assert run.flow.layout.total_rank == 10
    assert 0 in run.flow.layout.ranks.values()
    ops = [[op["op"] for op in ops] for e in run.flow.ledger.events if "plan" in e for ops in e["plan"]["ops"].values()]
    assert ["drop"] in ops
    assert ["drop", "grow"] in ops
    assert set(run.until(14).flow.layout.ranks.values()) == {2}


@pytest.mark.parametrize("stop", [4, 10])
def test_resume_is_bit_for_bit(tmp_path, stop):
    whole = Run(REAL, 20).until(20)
    second = resumed(Run(REAL, 20).until(stop), REAL, 20, tmp_path).until(20)
    assert second.flow.layout == whole.flow.layout
    assert same_weights(*({n: t for n, t in weights(r.model).items() if ".default." in n} for r in (whole, second)))
