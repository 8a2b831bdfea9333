"""CoLoRA against dense gradients along the path, and its rank map against a bisection, both worked out here."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import base_of, lora, loss_of, randomise, same, snapshot, wrap
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loops import Run, resumed, same_weights, tiny_llama, token_batches, trained, weights
from peft import LoraConfig
from synthetic import World
from torch import Tensor, nn
from torch.nn import functional as F

import rankflow
from rankflow.config.load import load_policy
from rankflow.errors import AdapterError, ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.observe.study import run_study
from rankflow.plans.allocate import even
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.ops import Drop, Grow, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.methods.colora import CoLora
from rankflow.policies.observation import Observation, Signal

KINDS = ["linear", "conv1d_transformers", "embedding", "conv"]


def path_scores(model: nn.Module, policy: CoLora, batches: list[Any], loss_fn: Any) -> dict[str, float]:
    """What the policy's own study hears."""
    (study,) = policy.studies
    observed = run_study(study, Adapter(model), model, batches, loss_fn)
    return {name: float(score) for name, score in observed.gather(Signal.PATH_SCORE).items()}


# -- the score ------------------------------------------------------------------------------------------------------


class DensePath:
    """The base model with its adapted weights W + p DeltaW as dense leaves."""

    def __init__(self, kind: str, model: nn.Module):
        self.kind, self.base = kind, base_of(kind)
        self.deltas: dict[str, Tensor] = {}
        for name, site in Adapter(model).sites.items():
            delta = (site.scaling * site.b() @ site.a()).detach()
            if kind == "conv1d_transformers" or site.kind == "embedding":
                delta = delta.T
            self.deltas[name] = delta.reshape(self.base.get_submodule(name).weight.shape)

    def gradients(self, point: float, seed: int) -> dict[str, Tensor]:
        leaves = {
            name: (self.base.get_submodule(name).weight.detach() + point * delta).requires_grad_()
            for name, delta in self.deltas.items()
        }
        parameters = {f"{name}.weight": leaf for name, leaf in leaves.items()}
        call = partial(torch.func.functional_call, self.base, parameters)
        loss = loss_of(lambda x: call((x,)), self.kind, seed=seed)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("points", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_dense_gradients_along_the_path(kind: str, points: int):
    model = lora(kind, lora_dropout=0.0 if kind == "conv" else 0.3).train()
    seeds = [3, 4, 5]
    heard = path_scores(
        model, CoLora(points=points, batches=3), [*seeds, 6], lambda m, seed: loss_of(m, kind, seed=seed)
    )
    dense = DensePath(kind, model)
    expected = dict.fromkeys(dense.deltas, 0.0)
    for seed in seeds:
        path = [dense.gradients(1 - k / points, seed) for k in range(points)]
        for name, delta in dense.deltas.items():
            mean = torch.stack([gradients[name] for gradients in path]).mean(0)
            expected[name] += float((delta * mean).abs().sum()) / len(seeds)
    assert list(heard) == list(expected)
    assert heard == pytest.approx(expected, rel=1e-10)
    assert min(heard.values()) > 0


def test_scores_of_half_precision_are_close_to_those_of_full():
    model, exact = lora("linear", dtype=torch.bfloat16), lora("linear")
    heard, expected = (
        path_scores(m, CoLora(points=3), [3], lambda m, seed: loss_of(m, "linear", seed=seed)) for m in (model, exact)
    )
    assert heard == pytest.approx(expected, rel=0.1)


class Pyramid(nn.Module):
    """One convolution at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding="valid", bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).square().sum() + self.conv(x[..., :6, :7]).sin().sum()


def test_a_module_that_is_called_twice_is_scored_as_one():
    torch.manual_seed(0)
    base = Pyramid()
    weight = base.conv.weight.detach().clone()
    model = wrap(base, LoraConfig(r=2, target_modules=["conv"]), autocast_adapter_dtype=False)
    randomise(model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    heard = path_scores(model, CoLora(points=4), [x], lambda m, x: m(x))["conv"]
    site = Adapter(model).sites["conv"]
    delta = (site.scaling * site.b() @ site.a()).detach().reshape(weight.shape)
    total = torch.zeros_like(delta)
    for point in (1, 0.75, 0.5, 0.25):
        w = (weight + point * delta).requires_grad_()
        loss = F.conv2d(x, w, stride=2).square().sum() + F.conv2d(x[..., :6, :7], w, stride=2).sin().sum()
        total += torch.autograd.grad(loss, w)[0] / 4
    assert heard == pytest.approx(float((delta * total).abs().sum()), rel=1e-10)


class Quadratic(nn.Module):
    """A linear layer whose DeltaW, gradients and inputs are all positive, so that no term of the score cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        nn.init.uniform_(self.lin.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).square().sum() / 2


def test_the_signed_terms_add_up_to_the_change_of_the_loss_to_first_order_in_the_step():
    torch.manual_seed(1)
    model = wrap(Quadratic(), LoraConfig(r=2, target_modules=["lin"]), autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p))
    x = torch.rand(6, 5, dtype=torch.float64)
    with torch.no_grad():
        there = float(model(x))
        with model.disable_adapter():
            change = there - float(model(x))
    errors = [path_scores(model, CoLora(points=n), [x], lambda m, x: m(x))["lin"] - change for n in (5, 10, 20, 40)]
    assert errors[0] > 0  # the sum starts at the target, where this loss is steepest
    for coarse, fine in itertools.pairwise(errors):
        assert fine == pytest.approx(coarse / 2, rel=1e-9)


def test_an_adapter_that_has_learnt_nothing_scores_zero():
    model = lora("linear", trained=False)
    heard = path_scores(model, CoLora(points=3), [3, 4], lambda m, seed: loss_of(m, "linear", seed=seed))
    assert set(heard.values()) == {0.0}


def test_a_study_of_the_path_leaves_no_trace():
    model = lora("linear", lora_dropout=0.2).train()
    before = snapshot(model)
    path_scores(model, CoLora(points=3), [3, 4], lambda m, seed: loss_of(m, "linear", seed=seed))
    assert same(snapshot(model), before)


# -- from contributions to ranks ------------------------------------------------------------------------------------


def bisected(contribution: dict[str, float], layout: Layout, budget: Budget) -> dict[str, int] | None:
    """The formula of the docstring, for the alpha that meets the budget; None where no alpha does."""

    def rank(slot: Slot, c: float, alpha: float) -> int:
        delta = min(1.0, alpha * c / max(contribution.values()))
        m, n = slot.in_features, slot.out_features
        full = m * n / (m + n)
        half_up = math.floor(delta * full + 0.5)  # round(), half to even, would break ties between modules
        return max(slot.min_rank, min(slot.max_rank, round(full), half_up))

    def ranks(alpha: float) -> dict[str, int]:
        return {name: rank(slot, contribution[name], alpha) for name, slot in layout.items()}

    low, high = 0.0, 1e6
    for _ in range(200):
        alpha = (low + high) / 2
        spent = budget.spent(layout.with_ranks(ranks(alpha)))
        if spent == budget.amount:
            return ranks(alpha)
        low, high = (alpha, high) if spent < budget.amount else (low, alpha)
    return None


shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))
contributions = st.floats(0.001, 1).map(lambda c: float(f"{c:.4g}"))


@given(st.lists(st.tuples(shapes, contributions), min_size=2, max_size=8), st.integers(0, 1), st.data())
@settings(deadline=None, max_examples=50)
def test_ranks_are_those_of_a_bisection_wherever_that_meets_the_budget(modules, low, data):
    layout = Layout({f"m{i}": Slot(1, *shape, 1.0, min_rank=low) for i, (shape, _) in enumerate(modules)})
    most = sum(slot.max_rank for slot in layout.values())
    budget = Budget("total_rank", data.draw(st.integers(len(modules), most)))
    scores = {f"m{i}": c for i, (_, c) in enumerate(modules)}
    sums = [c * m * n for (m, n), c in modules]
    ranks = decided(CoLora(budget=budget), layout, sums).ranks
    assert sum(ranks.values()) == budget.amount
    expected = bisected(scores, layout, budget)
    assume(expected is not None)
    assert ranks == expected


@given(st.lists(contributions, min_size=2, max_size=10), st.integers(0, 60), st.sampled_from([1e-8, 0.3, 1.0, 7e9]))
@settings(deadline=None, max_examples=50)
def test_ranks_of_equal_shapes_follow_contributions_whose_unit_does_not_matter(scores, extra, unit):
    layout = Layout({f"m{i}": Slot(4, 16, 16, 1.0, min_rank=1) for i in range(len(scores))})
    budget = Budget("total_rank", min(len(scores) + extra, 16 * len(scores)))
    policy = CoLora(budget=budget)
    ranks = list(decided(policy, layout, scores).ranks.values())
    assert sum(ranks) == budget.amount
    for c, r in zip(scores, ranks, strict=True):
        assert all(r >= other for less, other in zip(scores, ranks, strict=True) if less < c)
        assert all(abs(r - other) <= 1 for equal, other in zip(scores, ranks, strict=True) if equal == c)
    assert list(decided(policy, layout, [c * unit for c in scores]).ranks.values()) == ranks


def decided(policy: CoLora, layout: Layout, scores: list[float]) -> Layout:
    return planned(policy, layout, scores).apply_to(layout)


def planned(policy: CoLora, layout: Layout, scores: list[float]) -> RankPlan:
    values = {}
    for (name, slot), score in zip(layout.items(), scores, strict=True):
        if slot.rank:
            random = torch.Generator().manual_seed(len(values))
            values[name] = {
                Signal.A: torch.randn(slot.rank, slot.in_features, generator=random),
                Signal.B: torch.randn(slot.out_features, slot.rank, generator=random),
                Signal.PATH_SCORE: torch.tensor(score, dtype=torch.float64),
            }
    return policy.decide(policy.init(layout), Observation(10, values, "contribution"), layout, 10)


def test_a_budget_of_parameters_is_met_to_less_than_one_direction():
    layout = Layout({f"m{i}": Slot(4, 10 + i, 20 - i, 1.0, min_rank=1) for i in range(6)})
    after = decided(CoLora(budget=Budget("max_params", 1000)), layout, [5, 1, 3, 2, 0, 4])
    assert 1000 - 30 < after.params <= 1000
    assert after["m4"].rank == 1


def test_contribution_is_per_weight_or_per_module_and_beta_sharpens_it():
    layout = Layout({"large": Slot(4, 40, 40, 1.0), "small": Slot(4, 10, 10, 1.0)})
    budget = Budget("total_rank", 15)
    # C of the large one is 1/4 per weight, its full rank 20 against 5: 1/4 * 20 = 1 * 5, so both get the same
    even_split = decided(CoLora(budget=Budget("total_rank", 8)), layout, [4.0, 1.0]).ranks
    assert even_split == {"large": 4, "small": 4}
    by_module = decided(CoLora(budget=budget, per="module"), layout, [4.0, 1.0]).ranks
    assert by_module == {"large": 14, "small": 1}  # 20 alpha and 1.25 alpha; 0.7 * 1.25 rounds to 1
    assert decided(CoLora(budget=budget, beta=0.0), layout, [4.0, 1.0]).ranks == {"large": 12, "small": 3}  # 20 : 5
    sharp = decided(CoLora(budget=Budget("total_rank", 5), beta=2.0), layout, [4.0, 1.0]).ranks
    assert sharp == {"large": 1, "small": 4}  # 20/16 : 5


def test_no_module_gets_more_parameters_than_it_has_weights_while_another_can_have_some():
    layout = Layout({"large": Slot(4, 40, 40, 1.0), "small": Slot(4, 10, 10, 1.0), "idle": Slot(4, 10, 10, 1.0)})

    def ranks(total: int) -> list[int]:
        return list(decided(CoLora(budget=Budget("total_rank", total)), layout, [0.1, 9.0, 0.0]).ranks.values())

    assert ranks(14) == [9, 5, 0]
    assert ranks(25) == [20, 5, 0]  # all that 1600 / 80 and 100 / 20 allow
    assert ranks(28) == [20, 8, 0]
    assert ranks(52) == [40, 10, 2]


def test_without_any_contribution_ranks_are_even():
    layout = Layout({"a": Slot(9, 40, 40, 1.0), "b": Slot(1, 10, 10, 1.0), "c": Slot(0, 12, 30, 1.0)})
    policy = CoLora(budget=Budget("total_rank", 12))
    plan = planned(policy, layout, [0.0, 0.0, 0.0])
    assert "even" in plan.reason
    assert set(plan.apply_to(layout).ranks.values()) == {4}
    assert plan.apply_to(layout).ranks == even(layout, policy.budget)


def test_who_contributes_nothing_falls_to_its_minimum():
    layout = Limits((Limit("*", 0, 6), Limit("b", 2, 6))).apply(
        Layout({n: Slot(4, 12, 12, 1.0) for n in ("a", "b", "c", "gone")}).with_ranks({"gone": 0})
    )
    ranks = decided(CoLora(budget=Budget("total_rank", 8)), layout, [0.0, 0.0, 3.0, 0.0]).ranks
    assert ranks == {"a": 0, "b": 2, "c": 6, "gone": 0}
    # What is left when the best can have no more goes to the others, evenly
    ranks = decided(CoLora(budget=Budget("total_rank", 12)), layout, [0.0, 0.0, 3.0, 0.0]).ranks
    assert ranks == {"a": 2, "b": 2, "c": 6, "gone": 2}


@pytest.mark.parametrize("scores", [[1.0], [0.0]])
def test_a_single_module_gets_it_all(scores):
    layout = Layout({"only": Slot(1, 12, 12, 1.0)})
    assert decided(CoLora(budget=Budget("total_rank", 5)), layout, scores)["only"].rank == 5


def test_what_is_not_there_decides_nothing():
    layout = Layout({n: Slot(2, 12, 12, 1.0) for n in "ab"})
    assert not CoLora(budget=Budget("total_rank", 6)).decide({}, Observation(10), layout, 10)


def test_too_much_rank_is_cut_to_the_best_approximation_and_too_little_grows():
    world = World((6, 2, 4, 0))
    wanted = {"m0": 3, "m1": 5, "m2": 0, "m3": 2}
    policy = CoLora(budget=Budget("total_rank", 10))
    # Weights in proportion to the ranks that are wanted, as contributions per weight
    scores = {n: wanted[n] * (slot.in_features + slot.out_features) for n, slot in world.layout.items()}
    obs = Observation(
        10,
        {
            n: {**world.signals(n, 10), Signal.PATH_SCORE: torch.tensor(float(scores[n]))}
            for n in world.layout
            if world.layout[n].rank or wanted[n]
        },
    )
    plan = policy.decide({}, obs, world.layout, 10)
    ops = {n: [type(op) for op in ops] for n, ops in plan.ops.items()}
    assert ops == {"m0": [Refactor], "m1": [Grow], "m2": [Drop], "m3": [Grow]}
    before = {n: world.delta(n) for n in world.layout}
    world.apply(plan)
    assert world.layout.ranks == wanted
    u, s, v = torch.linalg.svd(before["m0"])
    torch.testing.assert_close(world.delta("m0"), u[:, :3] @ s[:3].diag() @ v[:3])
    torch.testing.assert_close(world.delta("m1"), before["m1"], rtol=0, atol=0)


# -- in a run -------------------------------------------------------------------------------------------------------


def colora(**more: Any) -> dict[str, Any]:
    return {
        "policy": "colora",
        "budget": {"mean_rank": 3},
        "limits": {"*": {"min": 1, "max": 12}},
        "when": {"start": 4, "every": 100},
        "params": {"points": 3, "batches": 2},
        **more,
    }


def test_a_run_spends_its_budget_once_and_the_cut_adapter_goes_on():
    run = Run(colora(), 8, batches=token_batches(3, seed=5)).until(8)
    run.flow.finish()
    (resize,) = [event for event in run.flow.ledger.events if event["event"] == "resize"]
    assert resize["step"] == 4
    assert "contributes most" in resize["reason"]
    layout = run.flow.layout
    assert layout.total_rank == 3 * len(layout)
    assert len(set(layout.ranks.values())) > 1


def test_a_decision_that_changes_nothing_leaves_the_run_as_it_is():
    fixed = {"*": {"min": 2, "max": 2}}
    study = colora(budget={"mean_rank": 2}, limits=fixed)
    with pytest.warns(UserWarning, match="none can change anything"):
        runs = [Run(policy, 8, batches=token_batches(3, seed=5)).until(8) for policy in (study, "hold")]
    assert same_weights(*(weights(run.model) for run in runs))
    assert runs[0].losses == runs[1].losses


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resume_is_bit_for_bit_the_run_that_was_not_stopped(tmp_path, stop):
    options: dict[str, Any] = {"batches": token_batches(3, seed=5)}
    whole = Run(colora(), 8, **options).until(8)
    second = resumed(Run(colora(), 8, **options).until(stop), colora(), 8, tmp_path, **options).until(8)
    assert second.flow.layout == whole.flow.layout
    assert same_weights(trained(second.model), trained(whole.model))
    assert second.losses == whole.losses[2 * stop :]


def test_convolutions_train_with_a_loss_of_ones_own():
    model = lora("conv", dtype=torch.float32).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = partial(loss_of, kind="conv", dtype=torch.float32)
    policy = colora(budget={"fraction": 0.8}, limits={"*": {"min": 1, "max": 6}}, when={"start": 2, "every": "100%"})
    flow = rankflow.attach(
        model, optimizer, policy, total_steps=4, batches=[3, 4], loss_fn=lambda m, seed: loss(m, seed=seed)
    )
    first = flow.layout
    for _ in range(4):
        loss(model).backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
    flow.finish()
    assert len(set(flow.layout.ranks.values())) > 1
    dearest = max(slot.params_per_rank for slot in first.values())
    assert 0.8 * first.params - dearest < flow.layout.params <= 0.8 * first.params


def test_the_shipped_lifecycle_spreads_then_grows():
    run = Run("colora_then_increlora", 20, model=tiny_llama(r=4), batches=token_batches(2, seed=5)).until(20)
    run.flow.finish()
    events = [event for event in run.flow.ledger.events if event["event"] == "resize"]
    n = len(run.flow.layout)
    assert [events[0][key] for key in ("policy", "step", "total_rank")] == ["colora", 2, 4 * n]
    assert [event["policy"] for event in events[1:]] == ["increlora"] * (len(events) - 1)
    assert run.flow.layout.total_rank == 8 * n


def test_a_disabled_adapter_at_the_event_is_not_studied():
    run = Run(colora(when={"start": 1, "every": 100}), 8, batches=token_batches(3))
    run.model(**run.batches[0]).loss.backward()
    run.optimizer.step()
    run.model.base_model.disable_adapter_layers()
    with pytest.warns(UserWarning, match="disabled"):
        run.flow.after_step()
    assert run.flow.layout.total_rank == 2 * len(run.flow.layout)


def test_a_batch_that_breaks_the_numbers_decides_nothing():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss * float("nan")

    run = Run(colora(), 8, batches=token_batches(3), loss_fn=loss).until(3)
    with pytest.warns(UserWarning, match="not finite"):
        run.step()
    assert run.flow.layout.total_rank == 2 * len(run.flow.layout)
    run.until(8)


# -- what it refuses ------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_said_at_attach():
    with pytest.raises(ConfigError, match="batches="):
        Run(colora(), 8)
    with pytest.raises(ConfigError, match="colora spends a budget"):
        Run({"policy": "colora"}, 8, batches=token_batches(1))
    with pytest.raises(ConfigError, match="limits allow only"):
        Run(colora(budget={"mean_rank": 13}), 8, batches=token_batches(1))
    with pytest.raises(ConfigError, match="no due step"):
        Run(colora(when={"start": 9, "every": 1}), 8, batches=token_batches(1))
    with pytest.raises(AdapterError, match=r"'path_score' does not exist for DoRA"):
        Run(colora(), 8, model=tiny_llama(use_dora=True), batches=token_batches(1))


def test_by_default_it_decides_once():
    ((_, policy, _),) = load_policy(CoLora(budget=Budget("mean_rank", 4))).policies
    assert list(policy.when.resolve(200).events) == [20]
    assert policy.studies[0].points[0] == 1
    assert len(policy.studies[0].points) == 10
    assert "80 passes" in CoLora(when=When(1, 1, 2)).notes[0]
