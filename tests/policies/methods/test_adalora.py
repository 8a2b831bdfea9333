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
    after = plan.apply_to(before)
    assert after.total_rank == before.total_rank
    assert after["weak"].rank == 1
    assert after["strong"].rank == 4
    best = int(by_hand([records["weak"]], 0.85, 0.85).argmax())
    assert plan.ops["weak"] == (Keep((best,)),)
    assert [type(op) for op in plan.ops["strong"]] == [Grow]  # nothing of it is dropped and grown again


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
