"""GoRA: its rule against one worked out here, on numbers and on a live model, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import base_of, lora, same
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, same_weights, tiny_llama, token_batches, weights
from synthetic import World
from torch import Tensor

import rankflow
from rankflow.config.load import load_policy
from rankflow.errors import AdapterError, ConfigError, PlanError
from rankflow.lora.adapter import Adapter
from rankflow.observe.study import run_study
from rankflow.plans.allocate import allocate, proportional
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limit, Limits
from rankflow.policies.methods.gora import Gora
from rankflow.policies.observation import Observation, Signal
from rankflow.training.ledger import Ledger

ANY = {"*": {"min": 0, "max": 16}}


def scored(world: World, scores: dict[str, float]) -> Observation:
    records = {}
    for name, score in scores.items():
        a, b = world.factors[name]
        records[name] = {Signal.A: a, Signal.B: b, Signal.WEIGHT_SCORE: torch.tensor(score, dtype=torch.float64)}
    return Observation(0, records, "gradients")


def ranks_of(policy: Gora, world: World, scores: list[float]) -> dict[str, int]:
    obs = scored(world, {f"m{i}": score for i, score in enumerate(scores)})
    return policy.decide({}, obs, world.layout, 0).apply_to(world.layout).ranks


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "divisor"), [("sqrt", math.sqrt), ("linear", lambda size: size), ("none", lambda size: 1)]
)
def test_ranks_are_what_the_paper_rounds_to_where_that_meets_its_budget(features, divisor):
    """r = round(a S / f(in + out)), a the share of all importance and S the sum of r_ref f(in + out) over modules."""
    sizes = [22, 22, 24, 24]  # of World's modules
    scores = {"sqrt": [3.0, 0.9, 1.6, 2.6], "linear": [3.2, 1.0, 1.6, 2.8], "none": [3.1, 1.3, 1.6, 2.0]}[features]
    total = sum(4 * divisor(size) for size in sizes)
    published = [round(score / sum(scores) * total / divisor(size)) for score, size in zip(scores, sizes, strict=True)]
    assert sum(published) == 16
    world = World((4,) * 4, zero_b=True)
    policy = Gora(budget=Budget("total_rank", 16), features=features)
    assert list(ranks_of(policy, world, scores).values()) == published
    assert len(set(published)) > 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(0.01, 1e3), min_size=2, max_size=8),
    st.floats(0.05, 1),
    st.integers(0, 2),
    st.integers(6, 20),
)
def test_ranks_are_rounded_multiples_of_the_weights_that_spend_the_budget(weights, share, low, high):
    layout = Layout({f"m{i}": Slot(4, 20, 30, 1.0, low, high) for i in range(len(weights))})
    total = max(1, low * len(weights), round(share * high * len(weights)))
    given_weights = {f"m{i}": w for i, w in enumerate(weights)}
    budget = Budget("total_rank", total)
    ranks = allocate(proportional(given_weights, layout, budget), layout, budget)
    assert sum(ranks.values()) == total
    # There is a c with |r - c w| <= 1/2 wherever limits do not hold r where it is
    least = max((r - 0.5) / given_weights[n] for n, r in ranks.items() if r > low) if total > low * len(weights) else 0
    most = min(((r + 0.5) / given_weights[n] for n, r in ranks.items() if r < high), default=math.inf)
    assert least <= most * (1 + 1e-4)


def test_a_budget_of_parameters_is_spent_to_less_than_one_direction():
    world = World((4,) * 6, zero_b=True)
    policy = Gora(budget=Budget("max_params", 500))
    ranks = ranks_of(policy, world, [1, 2, 3, 4, 5, 6])
    spent = world.layout.with_ranks(ranks).params
    assert 500 - 24 < spent <= 500
    assert ranks["m5"] > ranks["m0"]


def test_without_a_budget_the_ranks_there_are_are_spread_anew():
    ranks = ranks_of(Gora(), World((4, 4, 4, 4), zero_b=True), [1.0, 1.0, 1.0, 9.0])
    assert sum(ranks.values()) == 16
    assert ranks["m3"] == max(ranks.values()) > 4


def test_limits_clip_and_what_is_clipped_goes_to_the_others():
    world = World((4,) * 4, zero_b=True)
    world.layout = Limits((Limit("*", 2, 6),)).apply(world.layout)
    policy = Gora(budget=Budget("total_rank", 16))
    assert ranks_of(policy, world, [1e-6, 1e-6, 1.0, 100.0]) == {"m0": 2, "m1": 2, "m2": 6, "m3": 6}


def test_nothing_to_go_by_is_said_and_changes_nothing():
    world = World((4, 4), zero_b=True)
    plan = Gora().decide({}, scored(world, dict.fromkeys(world.layout, 0.0)), world.layout, 0)
    assert not plan
    assert "every score is zero" in plan.reason
    obs = scored(world, {"m0": 1.0})  # backward never came to m1
    plan = Gora(budget=Budget("total_rank", 8)).decide({}, obs, world.layout, 0)
    assert plan.apply_to(world.layout).ranks == {"m0": 8, "m1": 0}
    assert "1 modules are worth nothing" in plan.reason


def test_equal_scores_of_equal_modules_give_equal_ranks_and_a_lone_module_gets_everything():
    assert ranks_of(Gora(features="none"), World((2, 6, 4), zero_b=True), [1.0] * 3) == {"m0": 4, "m1": 4, "m2": 4}
    assert ranks_of(Gora(budget=Budget("total_rank", 7)), World((1,), zero_b=True), [1e-30]) == {"m0": 7}


def test_ops_are_growth_and_whole_directions():
    world = World((4, 4, 4), zero_b=True)
    policy = Gora(budget=Budget("total_rank", 12), features="none")
    plan = policy.decide({}, scored(world, {"m0": 8.0, "m1": 4.0, "m2": 0.0}), world.layout, 0)
    assert plan.to_json()["ops"] == {"m0": [{"op": "grow", "n": 4, "init": "zero_b"}], "m2": [{"op": "drop"}]}
    plan = policy.decide({}, scored(world, {"m0": 6.0, "m1": 4.0, "m2": 2.0}), world.layout, 0)
    assert plan.to_json()["ops"] == {
        "m0": [{"op": "grow", "n": 2, "init": "zero_b"}],
        "m2": [{"op": "keep", "idx": [0, 1]}],
    }


# -- a live model -----------------------------------------------------------------------------------------------------


def gradients(kind: str, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every adapted weight of the base model and the mean of its gradients, dense, ``[out, in]``."""
    base = base_of(kind)
    named = {name: base.get_submodule(name).weight for name in Adapter(lora(kind)).sites}
    for weight in named.values():
        weight.requires_grad_(True)
    sums = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for batch in batches:
        found = torch.autograd.grad(base(**batch).loss, list(named.values()))
        for name, gradient in zip(named, found, strict=True):
            sums[name] += gradient / len(batches)
    turned = kind == "conv1d_transformers"
    return {n: (w.detach().T, sums[n].T) if turned else (w.detach(), sums[n]) for n, w in named.items()}


def batches_of(n: int, length: int = 6) -> list[dict[str, Tensor]]:
    return [{"input_ids": b["input_ids"][:, :length], "labels": b["labels"][:, :length]} for b in token_batches(n)]


@pytest.mark.parametrize("kind", ["linear", "conv1d_transformers"])
def test_a_live_model_gets_the_ranks_that_its_dense_gradients_say(kind):
    model = lora(kind, trained=False)
    batches = batches_of(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        before = model(**batches[0]).logits
    flow = rankflow.attach(model, optimizer, {"policy": "gora", "limits": ANY}, total_steps=4, batches=batches)
    dense = gradients(kind, batches)
    importance = {n: float((w * g).abs().mean()) / math.sqrt(sum(w.shape)) for n, (w, g) in dense.items()}
    low, high, expected = 0.0, 1e12, {}
    while sum(expected.values()) != 4 * len(dense):  # bisect c in r = round(c w), clipped, until the ranks add up
        c = (low + high) / 2
        expected = {n: min(16, *dense[n][0].shape, math.floor(c * w + 0.5)) for n, w in importance.items()}
        low, high = (c, high) if sum(expected.values()) < 4 * len(dense) else (low, c)
    assert flow.layout.ranks == expected
    assert len(set(expected.values())) > 2
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before), "B = 0 before and after"
    for site in Adapter(model).sites.values():
        assert not site.present or not site.B.any()


def test_the_mean_is_taken_before_the_absolute_value():
    """Gradients that cancel over batches count for nothing, however large each is."""
    model = lora("linear", trained=False)
    batches = batches_of(4)
    dense = gradients("linear", batches)
    flow = rankflow.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "hold", total_steps=1)
    study = Gora(rows=1000, batches=4).studies[0]
    observed = run_study(study, flow._adapter, model, batches)
    for name, (weight, gradient) in dense.items():
        score = observed[name][Signal.WEIGHT_SCORE]
        torch.testing.assert_close(score, (weight * gradient).abs().mean(), rtol=1e-9, atol=0)
    each = [gradients("linear", [batch]) for batch in batches]
    apart = sum((w * g).abs().mean() for w, g in (one[name] for one in each)) / 4
    assert apart > 1.2 * score, "these batches do not disagree, so nothing is shown"


def test_kept_directions_stay_bit_for_bit_and_random_state_too():
    model = tiny_llama(r=4)
    before, rng = weights(model), torch.get_rng_state()
    run = Run({"policy": "gora", "limits": ANY}, 3, model=model, batches=token_batches(2))
    assert torch.equal(rng, torch.get_rng_state())
    after = weights(model)
    for name, new in after.items():
        old = before[name]
        keep = min(len(new), len(old)) if "lora_A" in name else min(new.shape[1], old.shape[1])
        assert torch.equal(new[:keep], old[:keep]) if "lora_A" in name else torch.equal(new[:, :keep], old[:, :keep])
    assert run.flow.layout.total_rank == 40
    assert run.flow.version == 1
    assert run.flow.ledger.layout() == run.flow.layout
    run.until(3)


def test_directions_of_the_gradient():
    """A sketch with as many rows as tokens spans the gradient's row space; A's rows are its leading directions."""
    model = lora("linear", trained=False)
    batch = batches_of(1, length=3)  # 8 tokens that predict another: gradients of rank 8 at most
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = {"policy": "gora", "budget": {"mean_rank": 2}, "limits": {"*": {"min": 2, "max": 2}},
              "params": {"init_a": "grad"}}  # fmt: skip
    flow = rankflow.attach(model, optimizer, policy, total_steps=2, batches=batch)
    for name, (_, gradient) in gradients("linear", batch).items():
        site = flow._adapter.sites[name]
        unit = site.A.detach() / site.A.detach().norm(dim=1, keepdim=True)
        Vh = torch.linalg.svd(gradient, full_matrices=False)[2]
        rank = int(torch.linalg.matrix_rank(gradient))
        assert float((unit - unit @ Vh[:rank].T @ Vh[:rank]).abs().max()) < 1e-8, "outside the gradient's row space"
        assert float(torch.linalg.svdvals(gradient @ unit.T)[0] / torch.linalg.svdvals(gradient)[0]) > 0.9
        torch.testing.assert_close(site.A.norm(dim=1).detach(), torch.full((2,), 3**-0.5, dtype=torch.float64))
        assert not site.B.any()


def test_an_embedding_starts_from_zero_a_and_is_fresh_too():
    base, batch = base_of("embedding"), torch.arange(12).reshape(3, 4)
    weight = base.emb.weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(base(batch).square().sum(), [weight])
    model = lora("embedding", trained=False)
    loss = lambda m, b: m(b).square().sum()  # noqa: E731
    study = Gora(rows=100).studies[0]
    observed = run_study(study, Adapter(model), model, [batch], loss)
    torch.testing.assert_close(observed["emb"][Signal.WEIGHT_SCORE], (weight * gradient).abs().mean().detach())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    flow = rankflow.attach(
        model, optimizer, {"policy": "gora", "limits": {"*": {"min": 1}}}, total_steps=2, batches=[batch], loss_fn=loss
    )
    assert flow.layout.total_rank == 8


# -- its place in a run -----------------------------------------------------------------------------------------------

THEN_GROW = {
    "phases": [
        {"policy": "gora", "until": 1, "budget": {"mean_rank": 2}, "params": {"batches": 2}},
        {"policy": "increlora", "budget": {"mean_rank": 4}, "when": {"start": 2, "every": 2, "stop": 9}},
    ],
    "limits": {"*": {"min": 1, "max": 8}},
}


def test_a_growing_policy_goes_on_from_there():
    run = Run(THEN_GROW, 10, batches=token_batches(2))
    assert run.flow.layout.total_rank == 20
    assert len(set(run.flow.layout.ranks.values())) > 1
    run.until(10)
    assert run.flow.layout.total_rank == 40
    events = [(e["step"], e["policy"]) for e in run.flow.ledger.events if e["event"] == "resize"]
    assert events[0] == (0, "gora")
    assert {policy for step, policy in events if step} == {"increlora"}


def test_the_same_seed_gives_the_same_adapter():
    runs = [Run(THEN_GROW, 10, batches=token_batches(2), seed=3) for _ in range(2)]
    assert same_weights(*(weights(run.model) for run in runs))
    assert runs[0].flow.ledger.events[-1]["reason"] == runs[1].flow.ledger.events[-1]["reason"]


def refused(policy, model=None, **options) -> None:
    model = model if model is not None else tiny_llama(r=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        Run(policy, 10, model=model, **options)
    finally:
        assert same({n: p.detach() for n, p in model.named_parameters()}, before)


def test_what_it_refuses():
    data = {"batches": token_batches(2)}
    with pytest.raises(ConfigError, match=r"policy gora studies 16 batches .*give them with batches=\.\.\."):
        refused("gora")
    with pytest.raises(ConfigError, match=r"phases\[0\] \(gora\): it gives out ranks once.*leave `when` out"):
        refused({"policy": "gora", "when": {"every": "10%"}}, **data)
    with pytest.raises(ConfigError, match=r"phases\[1\] \(gora\): decides before the first step; put it first"):
        refused({"phases": [{"policy": "hold", "until": 2}, {"policy": "gora"}]}, **data)
    with pytest.raises(ConfigError, match="budget is total rank 500 but limits allow only"):
        refused({"policy": "gora", "budget": {"total_rank": 500}, "limits": {"*": {"max": 16}}}, **data)
    trained = tiny_llama(r=4)
    for name, p in trained.named_parameters():
        if "layers.1.mlp.up_proj.lora_B.default" in name:
            p.data[0, 0] = 1e-3
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj: neither A nor B is zero.*increlora.*squeeze") as e:
        refused("gora", trained, **data)
    assert "step 0, policy gora" in str(e.value)
    with pytest.raises(AdapterError, match="'weight_score' does not exist for DoRA layers"):
        refused("gora", tiny_llama(r=4, use_dora=True), **data)


def test_a_refused_model_can_be_attached_to_at_once():
    model = tiny_llama(r=4)
    with pytest.raises(ConfigError):
        Run("gora", 10, model=model)
    Run("gora", 10, model=model, batches=token_batches(1)).until(2)


def test_batches_that_are_not_finite_leave_the_ranks_and_say_so():
    model = tiny_llama(r=4)
    loss = lambda m, b: m(**b).loss * math.inf  # noqa: E731
    with pytest.warns(UserWarning, match="gora skips its decision: study gradients: .*weight_score is not finite"):
        run = Run("gora", 10, model=model, batches=token_batches(2), loss_fn=loss)
    assert set(run.flow.layout.ranks.values()) == {4}


def test_the_shipped_file_keeps_the_papers_limits(tmp_path):
    life = load_policy("gora")
    layout = Layout({f"m{i}": Slot(8, 64, 64, 1.0) for i in range(4)})
    limited, (phase,) = life.resolve(100, layout)
    assert {(s.min_rank, s.max_rank) for s in limited.values()} == {(4, 32)}
    assert phase.policy.budget == Budget("total_rank", 32)
    ledger = tmp_path / "run.jsonl"
    run = Run("gora", 4, model=tiny_llama(r=8), batches=token_batches(2), ledger=str(ledger))
    run.until(4).flow.finish()
    assert Ledger.read(ledger).layout() == run.flow.layout
    assert run.flow.layout.total_rank == 80
