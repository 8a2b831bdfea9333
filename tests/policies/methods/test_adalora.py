"""AdaLoRA and ElaLoRA: scores worked out in float64 from the formulas, decisions from them, runs on a live model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loops import Run, tiny_llama, token_batches
from peft import PeftModel

from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies._sensitivity import follow, observe_triplets, triplet_scores
from rankflow.policies.methods.adalora import AdaLora
from rankflow.policies.methods.elalora import ElaLora
from rankflow.policies.observation import Observation, Signal

PARTS = ((Signal.A, Signal.GRAD_A), (Signal.B, Signal.GRAD_B), (Signal.GATE, Signal.GATE_GRAD))


def layout(ranks: dict[str, int], **limits) -> Layout:
    return Layout({n: Slot(r, 6, 5, 1.0, max_rank=8, **limits) for n, r in ranks.items()})


def record(r: int, seed: int, size: float = 1.0) -> dict[Signal, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {Signal.A: (r, 6), Signal.B: (5, r), Signal.GATE: (r,)}
    return {
        signal: size * torch.randn(shape, generator=random)
        for value, shape in shapes.items()
        for signal in (value, dict(PARTS)[value])
    }


def by_hand(records: list[dict[Signal, torch.Tensor]], beta1: float, beta2: float) -> torch.Tensor:
    """Eqs. 8 to 10 of arXiv 2303.10512, entry by entry, in float64."""
    total = torch.zeros(records[0][Signal.GATE].shape, dtype=torch.float64)
    for (w, g), mean in zip(PARTS, (lambda t: t.mean(1), lambda t: t.mean(0), lambda t: t), strict=True):
        i = u = torch.zeros_like(records[0][w], dtype=torch.float64)
        for seen in records:
            s = (seen[w].double() * seen[g].double()).abs()
            i = beta1 * i + (1 - beta1) * s
            u = beta2 * u + (1 - beta2) * (s - i).abs()
        total += mean(i * u)
    return total


def test_scores_are_the_papers():
    records = [record(3, seed) for seed in range(5)]
    state = {}
    for step, seen in enumerate(records):
        state = observe_triplets(state, Observation(step, {"m": seen}), 0.85, 0.7)
    torch.testing.assert_close(triplet_scores(state)["m"], by_hand(records, 0.85, 0.7), rtol=1e-5, atol=1e-9)


def test_a_step_that_is_not_finite_counts_for_nothing():
    records = [record(3, seed) for seed in range(2)]
    bad = {**record(3, 9), Signal.GRAD_A: torch.full((3, 6), torch.nan)}
    state = {}
    for seen in (records[0], bad, records[1]):
        state = observe_triplets(state, Observation(1, {"m": seen}), 0.85, 0.85)
    torch.testing.assert_close(triplet_scores(state)["m"], by_hand(records, 0.85, 0.85), rtol=1e-5, atol=1e-9)


def test_scores_follow_their_directions():
    state = observe_triplets({}, Observation(1, {"m": record(4, 1)}), 0.85, 0.85)
    before = triplet_scores(state)["m"]
    after = triplet_scores(follow(state, RankPlan({"m": (Keep((3, 1)), Grow(1))})))["m"]
    torch.testing.assert_close(after, torch.cat([before[[3, 1]], torch.zeros(1, dtype=torch.float64)]))


def test_adalora_keeps_the_directions_of_highest_score_over_all_modules():
    before = layout({"a": 3, "b": 3})
    policy = AdaLora(budget=Budget("total_rank", 3), when=When(1, 1, 2), shape="constant")
    records = {"a": record(3, 1, 2.0), "b": record(3, 2)}
    state = policy.observe(policy.init(before), Observation(1, records), 1)
    plan = policy.decide(state, Observation(1, records), before, 1)
    scores = {n: by_hand([r], 0.85, 0.85) for n, r in records.items()}
    ranked = sorted(((float(s), n, i) for n, t in scores.items() for i, s in enumerate(t)), reverse=True)[:3]
    wanted = {n: tuple(sorted(i for _, m, i in ranked if m == n)) for n in before}
    kept = {n: plan.ops[n][0].idx if n in plan.ops else (0, 1, 2) for n in before if wanted[n]}  # type: ignore[union-attr]
    assert kept == {n: idx for n, idx in wanted.items() if idx}


def test_the_budget_comes_down_along_the_cubic_curve():
    before = layout({f"m{i}": 8 for i in range(5)})
    policy = AdaLora(budget=Budget("total_rank", 10), when=When(1, 1, 6))
    state, totals, now = policy.init(before), [], before
    for step in range(1, 6):
        obs = Observation(step, {n: record(s.rank, 10 * step + i) for i, (n, s) in enumerate(now.items()) if s.rank})
        state = policy.observe(state, obs, step)
        plan = policy.decide(state, obs, now, step)
        now = plan.apply_to(now)
        state = policy.decided(state, plan, now, step)
        totals.append(now.total_rank)
    assert totals == [int(10 + 30 * (1 - t / 5) ** 3) for t in range(1, 6)]  # eq. 12


@pytest.mark.parametrize("policy", [AdaLora, ElaLora])
def test_equal_scores_meet_the_budget_and_zero_ones_change_nothing(policy):
    before = layout({"a": 4, "b": 4}, min_rank=1)
    made = policy(budget=Budget("total_rank", 5), when=When(1, 1, 2))
    ones = {s: torch.ones_like(t) for s, t in record(4, 1).items()}
    state = made.observe(made.init(before), obs := Observation(1, {"a": ones, "b": ones}), 1)
    assert made.decide(state, obs, before, 1).apply_to(before).total_rank == 5
    zeros = {s: torch.zeros_like(t) for s, t in ones.items()}
    state = made.observe(made.init(before), obs := Observation(1, {"a": zeros, "b": zeros}), 1)
    plan = made.decide(state, obs, before, 1)
    assert not plan
    assert "zero" in plan.reason


def test_elalora_moves_the_weakest_directions_to_the_strongest_module():
    before = layout({"weak": 3, "middle": 3, "strong": 3}, min_rank=1)
    policy = ElaLora(move=2, when=When(1, 1, 2))
    records = {"weak": record(3, 1, 0.1), "middle": record(3, 2, 1.0), "strong": record(3, 3, 3.0)}
    state = policy.observe(policy.init(before), obs := Observation(1, records), 1)
    plan = policy.decide(state, obs, before, 1)
    assert plan.apply_to(before).ranks == {"weak": 1, "middle": 3, "strong": 5}
    best = int(by_hand([records["weak"]], 0.85, 0.85).argmax())
    assert plan.ops["weak"] == (Keep((best,)),)
    assert [type(op) for op in plan.ops["strong"]] == [Grow]  # nothing of it is dropped and grown again


def released_rule(scores: dict[str, list[float]], move: int, k: int, p: float) -> dict[str, int]:
    """What each module loses (-) and gains (+) by ElaLoRA's released code: `mask_to_target_rank` and `_b_scheduler`."""
    found = [(s, name) for name, of in scores.items() for s in sorted(of)[: min(k, len(of) - 1)]]
    b = round(move * (1 - p**3))
    change = dict.fromkeys(scores, 0)
    for _, name in sorted(found)[:b]:
        change[name] -= 1
    for _, name in sorted(found, reverse=True)[:b]:
        change[name] += 1
    return change


@pytest.mark.parametrize("seed", range(3))
def test_elalora_moves_what_the_released_rule_moves_at_every_event(seed):
    now = Layout({f"m{i}": Slot(2 + (i + seed) % 4, 6, 5, 1.0, min_rank=1, max_rank=40) for i in range(7)})
    policy = ElaLora(when=When(20, 10, 75))
    state, moves = policy.init(now), []
    sizes = torch.rand(7, generator=torch.Generator().manual_seed(seed)) + 0.2
    for step in policy.when.events:
        records = {n: record(s.rank, 100 * step + i + seed, float(sizes[i])) for i, (n, s) in enumerate(now.items())}
        state = policy.observe(state, obs := Observation(step, records), step)
        scores = {name: of.tolist() for name, of in triplet_scores(state).items()}
        change = released_rule(scores, move=4, k=2, p=(step - 10) / (75 - 10))
        plan = policy.decide(state, obs, now, step)
        after = plan.apply_to(now)
        assert {n: after[n].rank - now[n].rank for n in now} == change
        for name, ops in plan.ops.items():
            if change[name] < 0:
                lost = sorted(scores[name])[: -change[name]]
                assert ops == (Keep(tuple(i for i, s in enumerate(scores[name]) if s not in lost)),)
        moves.append(sum(c for c in change.values() if c > 0))
        now, state = after, policy.decided(state, plan, after, step)
    assert moves[0] > moves[-1]
    assert len(moves) == 6


@pytest.mark.parametrize("policy", [AdaLora, ElaLora])
def test_a_frozen_module_neither_loses_nor_gains(policy):
    before = layout({"seen": 4, "frozen": 4, "other": 4}, min_rank=1)
    before = Layout({n: replace(slot, trainable=n != "frozen") for n, slot in before.items()})
    settings = {"move": 1} if policy is ElaLora else {}
    made = policy(budget=Budget("total_rank", 8), when=When(1, 1, 2), **settings)
    obs = Observation(1, {"seen": record(4, 1), "other": record(4, 2, 0.1)})
    plan = made.decide(made.observe(made.init(before), obs, 1), obs, before, 1)
    after = plan.apply_to(before)
    assert after.total_rank == 8
    assert after["frozen"].rank == 4


@pytest.mark.parametrize("policy", ["adalora", "elalora"])
def test_a_run_really_changes_tensors_and_ends_as_plain_lora(policy, tmp_path):
    budget = {"budget": {"mean_rank": 2}} if policy == "adalora" else {"budget": {"mean_rank": 4}}
    life = {
        "phases": [
            {"policy": policy, "until": 10, "when": {"start": 3, "every": 3}, "params": {"window": 2}, **budget},
            {"policy": "squeeze", "budget": {"mean_rank": 1}, "when": {"start": 11, "every": 5}},
        ],
        "limits": {"*": {"min": 1, "max": 8}},
    }
    run = Run(life, 12, model=tiny_llama(r=4)).until(9)
    assert run.flow.layout.total_rank == (20 if policy == "adalora" else 40)
    assert len(set(run.flow.layout.ranks.values())) > 1
    for name, site in run.flow._adapter.sites.items():
        assert site.A.shape[0] == run.flow.layout.ranks[name]
        assert run.optimizer.state[site.A]["exp_avg"].shape == site.A.shape
    run.until(12)
    run.flow.finish()
    assert run.flow.layout.total_rank == 10
    probe = token_batches(1, seed=4)[0]
    with torch.no_grad():
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path).eval()
        torch.testing.assert_close(loaded(**probe).logits, run.model.eval()(**probe).logits)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="adalora comes down to a budget"):
        AdaLora(when=When(1, 1, 5, 9)).check(layout({"a": 2}))
    with pytest.raises(ConfigError, match="adalora only lowers ranks"):
        AdaLora(budget=Budget("total_rank", 9), when=When(1, 1, 5, 9)).check(layout({"a": 2}))


@pytest.mark.parametrize("policy", [AdaLora, ElaLora])
def test_a_module_that_trains_without_a_gradient_goes_first(policy):
    before = layout({"seen": 4, "unheard": 4, "other": 4}, min_rank=1)
    settings = {"move": 3} if policy is ElaLora else {}
    budget = Budget("total_rank", 12 if policy is ElaLora else 9)
    made = policy(budget=budget, when=When(1, 1, 2), **settings)
    zeros = {s: torch.zeros_like(t) if "grad" in s.value else t for s, t in record(4, 3).items()}
    obs = Observation(1, {"seen": record(4, 1), "unheard": zeros, "other": record(4, 2, 0.1)})
    after = made.decide(made.observe(made.init(before), obs, 1), obs, before, 1).apply_to(before)
    assert after["unheard"].rank < min(after["seen"].rank, after["other"].rank)
    assert after.total_rank == budget.amount


@pytest.mark.parametrize("policy", [AdaLora(), ElaLora()])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_penalty_is_the_papers_where_lengths_are_1_but_for_its_diagonal(policy, seed):
    random = torch.Generator().manual_seed(seed)
    A, B = torch.randn(4, 9, generator=random), torch.randn(7, 4, generator=random)
    papers = 0.0
    for rows in (A.double(), B.double().T):
        gram = rows @ rows.T
        papers += float(sum(gram[i, j] ** 2 for i in range(4) for j in range(4) if i != j)) ** 0.5
    assert float(policy.penalty(A, B)) == pytest.approx(0.1 / 2 * papers, rel=1e-6)
    unit = [torch.nn.functional.normalize(t, dim=d) for t, d in ((A, 1), (B, 0))]
    one = torch.eye(4, dtype=torch.float64)
    a, b = (t.double() for t in unit)
    papers = float((a @ a.T - one).norm() + (b.T @ b - one).norm())
    assert float(policy.penalty(*unit)) == pytest.approx(0.1 / 2 * papers, rel=1e-5)


@pytest.mark.parametrize("start", [0.0, 0.02])
@pytest.mark.parametrize("policy", ["adalora", "elalora"])
def test_the_penalty_alone_makes_no_direction_longer(policy, start):
    """Under Adam, which steps by the learning rate however small the gradient is: what is 0 stays 0."""
    model = tiny_llama(r=4, dropout=0.0)
    for n, p in model.named_parameters():
        if "lora_B.default" in n:
            p.data = start * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    life = {"policy": policy, "when": {"start": 39, "every": 1, "stop": 40}, "params": {"orth": 0.5}}
    run = Run(life | ({"budget": {"mean_rank": 3}} if policy == "adalora" else {}), 40, model=model)
    sites = [site for site in run.flow._adapter.sites.values() if site.present]

    def spectral() -> torch.Tensor:
        return torch.stack([torch.linalg.matrix_norm(s.scaling * s.b() @ s.a(), 2) for s in sites]).detach()

    before, optimizer = spectral(), torch.optim.Adam([p for s in sites for p in (s.A, s.B)], lr=5e-3)
    term = run.flow._phases.policy.penalty
    for _ in range(38):
        optimizer.zero_grad()
        torch.stack([term(s.a(), s.b()) for s in sites]).mean().backward()
        optimizer.step()
    assert (spectral() <= before).all()
    run.flow.detach()
