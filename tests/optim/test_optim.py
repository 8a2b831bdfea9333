from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import KINDS, Embedder, inputs_of, lora, loss_of, randomise, same, snapshot, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor as TransformersAdafactor

from rankflow.errors import OptimizerError
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.optim.handlers import find_handler
from rankflow.optim.introspection import innermost
from rankflow.optim.moments import Moments
from rankflow.plans.ops import Drop, Grow, Keep, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon


class Lion(Optimizer):
    """Sign of an interpolated average (arXiv 2302.06675), with the one state tensor all implementations share."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_((0.9 * m + 0.1 * p.grad).sign(), alpha=group["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, fused=True),
    "adam_amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-3, amsgrad=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-3),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    "rmsprop_momentum": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9),
    "rmsprop_centered": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-3, initial_accumulator_value=0.1),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-3),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
    "asgd_averaging": lambda ps: torch.optim.ASGD(ps, lr=1e-2, t0=0),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-3),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "lion": lambda ps: Lion(ps, lr=1e-3),
    "muon": lambda ps: torch.optim.Muon(ps, lr=1e-3),
    # Clipping and scaling by the size of the whole parameter are off: they see how many directions there are
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-6, eps=(None, 1e3), d=1e9),
    "transformers_adafactor": lambda ps: TransformersAdafactor(
        ps, lr=1e-3, scale_parameter=False, relative_step=False, clip_threshold=1e9
    ),
    "transformers_adafactor_beta1": lambda ps: TransformersAdafactor(
        ps, lr=1e-3, scale_parameter=False, relative_step=False, clip_threshold=1e9, beta1=0.9
    ),
}
MATRICES_ONLY = {"muon"}


def make(name: str, model: nn.Module) -> Optimizer:
    return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])


def train(model, optimizer, kind="linear", steps=3, first=10, surgeon: Surgeon | None = None) -> None:
    for i in range(first, first + steps):
        loss_of(model, kind, seed=i).backward()
        if surgeon is not None:
            surgeon.ramps.before_step()
        optimizer.step()
        if surgeon is not None:
            surgeon.ramps.after_step()
        optimizer.zero_grad()


def orthogonal(r: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q


def mixing(r: int, seed: int = 0) -> Tensor:
    """An invertible, not orthogonal matrix."""
    return orthogonal(r, seed) @ torch.diag(torch.linspace(0.5, 2, r, dtype=torch.float64)) @ orthogonal(r, seed + 1)


def assert_steps_are_sane(model, optimizer) -> None:
    for p in model.parameters():
        if p.requires_grad:
            assert torch.isfinite(p).all()
    for entries in optimizer.state.values():
        for value in entries.values():
            assert not isinstance(value, Tensor) or torch.isfinite(value).all()


# -- every handler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_every_kind_of_op(name, kind):
    if (name in MATRICES_ONLY and kind == "conv") or (kind not in ("linear", "conv") and name in ("adamw_foreach",)):
        pytest.skip("takes matrices only, or adds nothing")
    model = lora(kind)
    optimizer = make(name, model)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=3)
    names = list(surgeon.layout)
    free = [n for n in names if surgeon.layout[n].min_rank == 0]
    train(model, optimizer, kind)
    plans = [
        {n: [Grow(1)] for n in names},
        {n: [Refactor(mixing(5)[:4], mixing(5).inverse()[:, :4])] for n in names},
        {n: [Keep((3, 0, 2))] for n in names},
        {n: [Drop()] for n in free[1:2]},
        {n: [Grow(2)] for n in free[1:2]},
        {n: [Drop(), Grow(2)] for n in free[:1]},
    ]
    for i, ops in enumerate(plans):
        surgeon.apply(RankPlan(ops), step=i)
        train(model, optimizer, kind, steps=5 if i in (1, 5) else 1, surgeon=surgeon)
        assert_steps_are_sane(model, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removing_directions_that_never_were_anything_changes_nothing(name):
    """Directions whose row of A and column of B are zero have zero gradients for ever: a run that loses them and a run
    that keeps them are the same run."""
    plain = lora("linear", r=6, lora_alpha=9)
    with torch.no_grad():
        for site in Adapter(plain).sites.values():
            site.A[[1, 4]] = 0
            site.B[:, [1, 4]] = 0
    cut = copy.deepcopy(plain)
    runs = []
    for model, resized in ((plain, False), (cut, True)):
        optimizer = make(name, model)
        surgeon = Surgeon(Adapter(model), optimizer)
        train(model, optimizer)
        if resized:
            surgeon.apply(RankPlan({n: [Keep((0, 2, 3, 5))] for n in surgeon.layout}))
        train(model, optimizer, steps=5, first=20, surgeon=surgeon)
        runs.append([s.b().detach() @ s.a().detach() for s in surgeon.adapter.sites.values()])
    tolerance = 2e-3 if name == "muon" else 1e-10  # Muon iterates in bfloat16
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keeping_everything_is_bit_identical(name):
    model = lora("linear", dtype=torch.float32)
    optimizer = make(name, model)
    for i in range(3):
        loss_of(model, "linear", seed=i, dtype=torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    surgeon = Surgeon(Adapter(model), optimizer)
    before = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for s in optimizer.state.values()]
    surgeon.apply(RankPlan({n: [Keep((0, 1, 2, 3))] for n in surgeon.layout}))
    after = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"] if p in optimizer.state]
    if "adafactor" not in name:
        assert same(after, before)
        return
    for one, other in zip(after, before, strict=True):  # factored again from the spread-out form
        for key in one:
            torch.testing.assert_close(torch.as_tensor(one[key]), torch.as_tensor(other[key]), rtol=1e-6, atol=0)


def averages(model: nn.Module, beta1: float, beta2: float, seeds: range) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Adam's averages of the gradients of a model that stands still, computed from scratch."""
    sites = Adapter(model).sites
    out = {n: {r: (torch.zeros_like(p), torch.zeros_like(p)) for r, p in s.tensors().items()} for n, s in sites.items()}
    for seed in seeds:
        model.zero_grad()
        loss_of(model, "linear", seed=seed).backward()
        for n, s in sites.items():
            for r, p in s.tensors().items():
                m, v = out[n][r]
                assert p.grad is not None
                out[n][r] = (beta1 * m + (1 - beta1) * p.grad, beta2 * v + (1 - beta2) * p.grad**2)
    model.zero_grad()
    return out


@pytest.mark.parametrize("exact", ["permutation", "mixing"])
def test_moments_are_those_of_a_run_that_had_the_new_factors_all_along(exact):
    """With a learning rate of 0 the model stands still, so the averages can be had again from the new factors."""
    model = lora("linear")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0, amsgrad=True)
    train(model, optimizer, steps=4)
    surgeon = Surgeon(Adapter(model), optimizer)
    if exact == "permutation":
        N = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]] * torch.tensor([[1.0], [-1], [1], [-1]])
        M = N.mT
    else:
        N = mixing(4)
        M = N.inverse()
    before = worst_ratio(optimizer, 0.9, 0.999)
    surgeon.apply(RankPlan({n: [Refactor(N, M)] for n in surgeon.layout}))
    expected = averages(model, 0.9, 0.999, range(10, 14))
    for n, site in surgeon.adapter.sites.items():
        for role, p in site.tensors().items():
            m, v = expected[n][role]
            state = optimizer.state[p]
            torch.testing.assert_close(state["exp_avg"], m, rtol=1e-10, atol=1e-14)
            if exact == "permutation":  # v is not raised but where |m| / sqrt(v) was above 1 already
                least = (m / (1 - 0.9**4)).square() * (1 - 0.999**4)
                torch.testing.assert_close(state["exp_avg_sq"], torch.maximum(v, least), rtol=1e-10, atol=1e-18)
            assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()
    assert worst_ratio(optimizer, 0.9, 0.999) <= max(1.0, before) * (1 + 1e-9)


def worst_ratio(optimizer: Optimizer, beta1: float, beta2: float) -> float:
    """The largest |m| / sqrt(v), bias-corrected, anywhere."""
    worst = 0.0
    for state in optimizer.state.values():
        t = float(state["step"])
        m, v = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
        worst = max(worst, float(torch.where(m == 0, 0, m.abs() / v.sqrt().clamp(min=1e-300)).max()))
    return worst


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), steps=st.integers(1, 4))
def test_no_refactorisation_makes_a_step_larger_or_a_centred_variance_negative(seed, k, steps):
    generator = torch.Generator().manual_seed(seed)
    N, M = (torch.randn(s, generator=generator, dtype=torch.float64) * 3 for s in ((k, 4), (4, k)))
    for name in ("adamw", "rmsprop_centered"):
        model = lora("embedding", dtype=torch.float32)
        optimizer = make(name, model)
        surgeon = Surgeon(Adapter(model), optimizer)
        for i in range(steps):
            loss_of(model, "embedding", seed=seed + i, dtype=torch.float32).backward()
            optimizer.step()
            optimizer.zero_grad()
        before = worst_ratio(optimizer, 0.9, 0.999) if name == "adamw" else None
        surgeon.apply(RankPlan({n: [Refactor(N, M)] for n in surgeon.layout}))
        if before is not None:
            assert worst_ratio(optimizer, 0.9, 0.999) <= max(1.0, before) * (1 + 1e-5)
        else:
            for state in optimizer.state.values():
                assert (state["square_avg"] - state["grad_avg"].square() >= 0).all()
        loss_of(model, "embedding", seed=seed, dtype=torch.float32).backward()
        optimizer.step()
        assert_steps_are_sane(model, optimizer)


@pytest.mark.parametrize("name", ["rmsprop_momentum", "rmsprop_centered", "transformers_adafactor_beta1"])
def test_buffers_of_updates_keep_their_size_when_factors_are_rescaled(name):
    """A' = 10 A, B' = B / 10: what divides by the gradient's size would have made the same updates."""
    model = lora("linear")
    optimizer = make(name, model)
    optimizer.param_groups[0]["eps"] = 0.0 if "rmsprop" in name else (0.0, 0.0)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    key = "momentum_buffer" if "rmsprop" in name else "exp_avg"
    before = [s[key].clone() for s in optimizer.state.values()]
    eye = torch.eye(4, dtype=torch.float64)
    surgeon.apply(RankPlan({n: [Refactor(10 * eye, eye / 10)] for n in surgeon.layout}))
    for old, state in zip(before, optimizer.state.values(), strict=True):
        torch.testing.assert_close(state[key], old, rtol=1e-4, atol=1e-8)


def test_factored_moments_follow_the_map_in_factored_form():
    model = lora("linear")
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    N = mixing(4)[:3]
    M = mixing(4).inverse()[:, :3]
    site = next(iter(surgeon.adapter.sites.values()))
    a, b = dict(optimizer.state[site.A]), dict(optimizer.state[site.B])
    surgeon.apply(RankPlan({site.name: [Refactor(N, M)]}))
    row = (M**2).mT @ a["row_var"]
    torch.testing.assert_close(optimizer.state[site.A]["row_var"], row * (a["col_var"].mean() / a["row_var"].mean()))
    torch.testing.assert_close(optimizer.state[site.A]["col_var"], a["col_var"] * row.mean() / a["row_var"].mean())
    col = b["col_var"] @ (N**2).mT
    torch.testing.assert_close(optimizer.state[site.B]["row_var"], b["row_var"] * col.mean() / b["row_var"].mean())
    assert optimizer.state[site.B]["col_var"].shape == (1, 3)


def products(model: nn.Module) -> list[Tensor]:
    return [s.b().detach() @ s.a().detach() for s in Adapter(model).sites.values()]


SIGNED = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]] * torch.tensor([[1.0], [-1], [1], [-1]], dtype=torch.float64)
SCALED = torch.diag(torch.tensor([8.0, 0.5, 3, 0.01], dtype=torch.float64)) @ SIGNED


@pytest.mark.parametrize(
    ("name", "N"),
    [
        *((name, SIGNED) for name in ("adamax", "adadelta", "asgd_averaging", "rprop")),
        # These know how long a step is in units of the parameter, so they take the same one in any units
        *((name, SCALED) for name in ("adadelta", "rprop")),
    ],
)
def test_what_steps_entry_by_entry_goes_on_as_if_its_directions_had_always_been_written_so(name, N):
    plain = lora("linear")
    other = copy.deepcopy(plain)
    runs = []
    for model, resized in ((plain, False), (other, True)):
        optimizer = make(name, model)
        surgeon = Surgeon(Adapter(model), optimizer)
        train(model, optimizer, steps=4)
        for group in optimizer.param_groups:
            group |= {"eps": 0.0} if name == "adadelta" else {"step_sizes": (0.0, 1e9)} if name == "rprop" else {}
        if resized:
            surgeon.apply(RankPlan({n: [Refactor(N, N.inverse())] for n in surgeon.layout}))
        train(model, optimizer, steps=5, first=20)
        runs.append(products(model))
        if name == "asgd_averaging":
            means = [(optimizer.state[s.A]["ax"], optimizer.state[s.B]["ax"]) for s in surgeon.adapter.sites.values()]
            runs[-1] += [b @ a for a, b in means]
            assert not same(runs[-1][0], runs[-1][len(means)])
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-10 * float(one.abs().max()))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-30, 1.0, 1e30]), dtype=st.sampled_from(["32", "64", "16"]))
def test_no_finite_state_becomes_another_however_directions_are_mixed(seed, size, dtype):
    generator = torch.Generator().manual_seed(seed)
    N, M = (torch.randn(s, generator=generator, dtype=torch.float64) * size for s in ((3, 4), (4, 3)))
    number = {"32": torch.float32, "64": torch.float64, "16": torch.bfloat16}[dtype]
    for factor in ("A", "B"):
        for name in ("adamax", "adadelta", "asgd", "rprop"):
            p = nn.Parameter(torch.randn((4, 5) if factor == "A" else (5, 4), generator=generator).to(number))
            optimizer = OPTIMIZERS[name]([p])
            p.grad = torch.randn(p.shape, generator=generator).to(number)
            optimizer.step()
            state, group = optimizer.state[p], optimizer.param_groups[0]
            handler = find_handler(optimizer)
            assert handler is not None
            for key in handler.keys:  # of any size that fits
                state[key][0] *= min(torch.finfo(number).max, 1e120) / state[key][0].abs().max().clamp(min=1)
            new = handler.store(
                handler.load(factor, state, group, lambda t: t).refactor(N, M), state, group, lambda t: t
            )
            assert {k for k, v in new.items() if not torch.isfinite(v).all()} == set()
            assert all(new[k].dtype == number and new[k].numel() == 15 for k in handler.keys)
            if name == "adamax":  # the optimizer divides one by the other
                m = (new["exp_avg"].double().abs() / (1 - 0.9)).clamp(max=torch.finfo(number).max)
                assert (m <= new["exp_inf"].double() * (1 + 1e-2) + 1e-37).all()
            if name == "rprop":
                assert ((new["step_size"] >= 0.99e-6) & (new["step_size"] <= 50)).all()


# -- new directions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adadelta", "rprop"])
def test_new_directions_step_as_far_as_their_siblings_and_alone_as_far_as_any_does_at_first(name):
    key = {"adadelta": "acc_delta", "rprop": "step_size"}[name]
    model = lora("embedding")
    optimizer = make(name, model)
    train(model, optimizer, "embedding")
    surgeon = Surgeon(Adapter(model), optimizer)
    site = surgeon.adapter.sites["out"]
    before = optimizer.state[site.B][key].clone()
    surgeon.apply(RankPlan({"out": [Grow(2)]}))
    after = optimizer.state[site.B][key]
    mean = before.mean(-1) if name == "adadelta" else before.square().mean(-1).sqrt()
    torch.testing.assert_close(after, torch.cat([before, mean[:, None].expand(-1, 2)], -1))
    if name == "rprop":
        surgeon.apply(RankPlan({"out": [Drop(), Grow(1)]}))
        assert (optimizer.state[site.B][key] == 1e-3).all()


def test_the_average_of_a_young_direction_is_of_the_steps_that_it_took():
    model = lora("linear")
    optimizer = make("asgd", model)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=4)
    train(model, optimizer)
    surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    for step in range(5):
        train(model, optimizer, steps=1, first=step, surgeon=surgeon)
        for site in surgeon.adapter.sites.values():  # up to t0 the average is the parameter itself
            torch.testing.assert_close(optimizer.state[site.B]["ax"], site.B.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed_v", ["siblings", "mean", "zero"])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_second_moments_of_new_directions(kind, seed_v):
    model = lora(kind)
    optimizer = make("adamw", model)
    train(model, optimizer, kind)
    surgeon = Surgeon(Adapter(model), optimizer, seed_v=seed_v)
    site = next(iter(surgeon.adapter.sites.values()))
    a = site.a().detach().clone()
    va, vb = (f(optimizer.state[p]["exp_avg_sq"]) for f, p in ((site.a, site.A), (site.b, site.B)))
    surgeon.apply(RankPlan({site.name: [Grow(2)]}))
    new_a = site.a().detach()[..., 4:, :]
    got_a, got_b = (f(optimizer.state[p]["exp_avg_sq"]) for f, p in ((site.a, site.A), (site.b, site.B)))
    assert torch.equal(got_a[..., :4, :], va)
    assert torch.equal(got_b[..., :4], vb)
    ratio = new_a.square().sum(-1) / a.square().sum(-1).mean(-1, keepdim=True)
    mean_a, mean_b = va.mean(-2, keepdim=True), vb.mean(-1, keepdim=True)
    if seed_v == "siblings":
        want_a, want_b = 0.01 * mean_a, mean_b * ratio.clamp(min=0.01)[..., None, :]
    else:
        want_a, want_b = (mean_a, mean_b) if seed_v == "mean" else (0 * mean_a, 0 * mean_b)
    torch.testing.assert_close(got_a[..., 4:, :], want_a.expand_as(got_a[..., 4:, :]))
    torch.testing.assert_close(got_b[..., 4:], want_b.expand_as(got_b[..., 4:]))
    for f, p in ((lambda t: site.a(t)[..., 4:, :], site.A), (lambda t: site.b(t)[..., 4:], site.B)):
        assert not f(optimizer.state[p]["exp_avg"]).any()


def test_a_module_that_comes_back_starts_from_what_like_modules_have():
    model = lora("linear")
    optimizer = make("adam_amsgrad", model)
    surgeon = Surgeon(Adapter(model), optimizer)
    name, like = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    surgeon.apply(RankPlan({name: [Drop()]}))
    train(model, optimizer)
    surgeon.apply(RankPlan({name: [Grow(3)]}))
    site, other = (surgeon.adapter.sites[n] for n in (name, like))
    state, others = optimizer.state[site.B], optimizer.state[other.B]
    assert float(state["step"]) == 3
    assert state["step"] is not others["step"]
    ratio = site.A.detach().square().sum(-1) / other.A.detach().square().sum(-1).mean()
    expected = (others["exp_avg_sq"].mean() * ratio.clamp(min=0.01)).expand_as(site.B)
    torch.testing.assert_close(state["exp_avg_sq"], expected)
    assert not state["exp_avg"].any()
    train(model, optimizer, surgeon=surgeon)
    assert float(state["step"]) == float(others["step"]) == 6


@pytest.mark.parametrize("name", ["adagrad", "sgd_momentum", "adamw"])
def test_a_module_that_comes_back_alone_starts_afresh(name):
    model = lora("embedding")
    optimizer = make(name, model)
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.apply(RankPlan({"emb": [Drop()]}))
    train(model, optimizer, "embedding")
    surgeon.apply(RankPlan({"emb": [Grow(3)]}))
    site = surgeon.adapter.sites["emb"]
    if name == "adagrad":
        assert (optimizer.state[site.A]["sum"] == 0.1).all()
    else:
        assert site.A not in optimizer.state
    train(model, optimizer, "embedding", surgeon=surgeon)
    assert_steps_are_sane(model, optimizer)


@pytest.mark.parametrize("name", ["adamw", "adagrad", "transformers_adafactor_beta1"])
def test_reset_starts_state_afresh_and_ramps_every_direction(name):
    model = lora("linear")
    optimizer = make(name, model)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    site, other = list(surgeon.adapter.sites.values())[:2]
    kept = dict(optimizer.state[other.A])
    surgeon.apply(RankPlan({site.name: [Keep((1, 2))]}, state="reset", rewarm=4))
    if name == "adagrad":
        assert (optimizer.state[site.A]["sum"] == 0.1).all()
    else:
        assert site.A not in optimizer.state
    assert optimizer.state[other.A] == kept
    assert surgeon.ramps.state_dict()["young"] == {site.name: [[0, 4], [0, 4]]}


# -- refusals ---------------------------------------------------------------------------------------------------------


class Lookahead(torch.optim.AdamW):
    """AdamW with one more tensor per parameter."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow_buffer", p.detach().clone())


def test_unknown_state_is_refused_by_optimizer_and_key_or_reset_on_demand():
    model = lora("linear")
    optimizer = Lookahead([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    before = snapshot(model, optimizer)
    name = next(iter(surgeon.layout))
    plan = RankPlan({name: [Keep((0, 1))]})
    with pytest.raises(OptimizerError, match=rf"{name}.*Lookahead.*'slow_buffer'.*reset"):
        surgeon.apply(plan)
    assert same(snapshot(model, optimizer), before)
    lenient = Surgeon(surgeon.adapter, optimizer, on_unknown_state="reset", warmup=3)
    lenient.apply(plan)
    site = surgeon.adapter.sites[name]
    assert site.A not in optimizer.state
    assert lenient.ramps.state_dict()["young"] == {name: [[0, 3], [0, 3]]}
    train(model, optimizer, surgeon=lenient)
    assert_steps_are_sane(model, optimizer)


def test_an_optimizer_nobody_knows_is_fine_as_long_as_it_keeps_nothing():
    class Plain(Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    model = lora("linear")
    optimizer = Plain([p for p in model.parameters() if p.requires_grad])
    surgeon = Surgeon(Adapter(model), optimizer)
    with pytest.warns(UserWarning, match="Plain.*full speed"):
        surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    train(model, optimizer, surgeon=surgeon)
    assert_steps_are_sane(model, optimizer)


def test_stale_state_is_refused():
    model = lora("linear")
    optimizer = make("adamw_fused", model)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    name = next(iter(surgeon.layout))
    optimizer.state[surgeon.adapter.sites[name].A]["exp_avg"] = torch.zeros(9, 16)
    with pytest.raises(OptimizerError, match=rf"{name}.*exp_avg \[9, 16\].*\[4, 16\]"):
        surgeon.apply(RankPlan({name: [Keep((0,))]}))


@pytest.mark.parametrize("which", ["missing", "twice"])
def test_parameters_must_be_in_exactly_one_group(which):
    model = lora("linear")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params[:-1] if which == "missing" else params)
    if which == "twice":
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": params[-1:]})
    with pytest.raises(OptimizerError, match=r"model.layers.1.mlp.down_proj: AdamW (does not hold|holds).*B"):
        Surgeon(Adapter(model), optimizer)


def test_peft_optimizers_with_references_of_their_own_are_refused_by_name():
    model = lora("linear", dtype=torch.float32)
    riemannian = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    with pytest.raises(OptimizerError, match="RiemannianPreconditionedOptimizer"):
        Surgeon(Adapter(model), riemannian)
    lorafa = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-3)
    with pytest.raises(OptimizerError, match="LoraFAOptimizer"):
        Surgeon(Adapter(model), lorafa)


# -- groups -----------------------------------------------------------------------------------------------------------


def group_names(model, optimizer) -> list[list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]


def grouped(model: nn.Module, how: str) -> Optimizer:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if how == "one":
        return torch.optim.AdamW([p for _, p in named])
    if how == "named":
        return torch.optim.AdamW(named)
    if how == "loraplus":
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    halves = [[p for n, p in named if "layers.0" in n], [p for n, p in named if "layers.0" not in n]]
    halves[1] = [halves[1][-1], *halves[1][:-1]]  # the trained head comes first, against the model's order
    return torch.optim.AdamW([{"params": halves[0]}, {"params": halves[1], "lr": 1e-4}])


@pytest.mark.parametrize("how", ["one", "named", "loraplus", "halves"])
def test_modules_leave_and_come_back_to_their_own_places(how):
    model = lora("linear", dtype=torch.float32, modules_to_save=["lm_head"])
    optimizer = grouped(model, how)
    surgeon = Surgeon(Adapter(model), optimizer)
    first = group_names(model, optimizer)
    labels = [list(g.get("param_names", ())) for g in optimizer.param_groups]
    a, b, c, d = list(surgeon.layout)[:4]
    for ops in (
        {a: [Drop()], b: [Drop()]},
        {d: [Drop()], c: [Keep((1,))]},
        {b: [Grow(2)]},
        {c: [Drop()], a: [Grow(4)]},
        {d: [Grow(1)], c: [Grow(3)]},
    ):
        surgeon.apply(RankPlan(ops))
        names = group_names(model, optimizer)
        there = {n for group in names for n in group}
        assert names == [[n for n in group if n in there] for group in first]
        for group, label in zip(optimizer.param_groups, labels, strict=True):
            present = [n for n in label if n in there]
            assert group.get("param_names", []) == present
    assert group_names(model, optimizer) == first
    assert [list(g.get("param_names", ())) for g in optimizer.param_groups] == labels


def test_lora_plus_keeps_its_rates_for_what_grows_leaves_and_comes_back():
    """Rows of A learn at one rate, columns of B at sixteen times that, factors of embeddings at a third; under a
    schedule, too."""
    model = wrap(Embedder(), LoraConfig(r=4, target_modules=["emb", "out"]))
    randomise(model)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-3, loraplus_weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    surgeon = Surgeon(Adapter(model), optimizer, warmup=0)
    for i, ops in enumerate(
        (
            {"emb": [Grow(2)], "out": [Keep((3, 0))]},
            {"out": [Drop()]},
            {"out": [Grow(3)], "emb": [Drop()]},
            {"emb": [Grow(1)]},
        )
    ):
        surgeon.apply(RankPlan(ops))
        optimizer.zero_grad()
        loss_of(model, "embedding", dtype=torch.float32, seed=i).backward()
        old = {n: {r: p.detach().clone() for r, p in s.tensors().items()} for n, s in surgeon.adapter.sites.items()}
        optimizer.step()
        for n, roles in old.items():
            for role, before in roles.items():
                p = surgeon.adapter.sites[n].tensors()[role]
                rate = (5e-3 if n == "emb" else {"A": 1e-2, "B": 0.16}[role]) / (1 + i)
                torch.testing.assert_close(p.detach(), before - rate * (p.grad + 0.1 * before), rtol=1e-4, atol=1e-6)
        scheduler.step()


@pytest.mark.parametrize("how", ["one", "named", "loraplus"])
def test_a_new_surgeon_puts_a_module_that_left_before_it_where_the_model_has_it(how):
    model = lora("linear", dtype=torch.float32, modules_to_save=["lm_head"])
    first = group_names(model, grouped(model, how))
    left = list(Adapter(model).layout())[1:3]
    Surgeon(Adapter(model)).apply(RankPlan({n: [Drop()] for n in left}))
    optimizer = grouped(model, how)
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.apply(RankPlan({n: [Grow(2)] for n in reversed(left)}))
    assert group_names(model, optimizer) == first
    if how == "named":
        assert [g["param_names"] for g in optimizer.param_groups] == first


def test_frozen_modules_outside_the_optimizer_stay_outside():
    model = lora("linear")
    adapter = Adapter(model)
    a, b = list(adapter.sites.values())[:2]
    for p in a.tensors().values():
        p.requires_grad_(False)
    optimizer = make("adagrad", model)
    surgeon = Surgeon(adapter, optimizer)
    surgeon.apply(RankPlan({a.name: [Keep((0, 1))], b.name: [Drop()]}))
    surgeon.apply(RankPlan({a.name: [Drop()]}))
    surgeon.apply(RankPlan({a.name: [Grow(2)], b.name: [Grow(2)]}))
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert [id(s.A) in held for s in (a, b)] == [False, True]
    train(model, optimizer)


def test_a_module_comes_back_into_a_group_that_was_added_later():
    model = lora("linear")
    optimizer = make("adamw", model)
    surgeon = Surgeon(Adapter(model), optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    name = list(surgeon.layout)[2]
    first = group_names(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    surgeon.apply(RankPlan({name: [Drop()]}))
    surgeon.apply(RankPlan({name: [Grow(2)]}))
    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in optimizer.param_groups[0]["params"]]] == first
    assert len(optimizer.param_groups[1]["params"]) == 1


def test_group_options_schedulers_and_wrappers_stay():
    from accelerate import Accelerator

    model = lora("linear", dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert innermost(wrapped) is optimizer
    surgeon = Surgeon(Adapter(model), wrapped)
    group, params = optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    for i in range(4):
        loss_of(model, "linear", dtype=torch.float32).backward()
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        surgeon.apply(RankPlan({n: [Grow(1)] if i % 2 else [Keep((2, 0))] for n in surgeon.layout}))
        assert optimizer.param_groups[0] is group
        assert group["params"] is params
        assert group["lr"] == pytest.approx(0.1 / (2 + i))
    assert len(optimizer.state) == len(params)


# -- ramps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv", "experts"])
def test_updates_of_young_directions_are_scaled_and_nothing_else(kind):
    model = lora(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=4)
    surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    for step in range(6):
        loss_of(model, kind, seed=step).backward()
        expected = {}
        for n, s in surgeon.adapter.sites.items():
            scale = torch.tensor([1.0, 1.0, 1.0, 1.0, min(1.0, (step + 1) / 4)], dtype=torch.float64)
            expected[n] = (
                s.a().detach() - 0.1 * scale[:, None] * s.a(s.A.grad),
                s.b().detach() - 0.1 * scale * s.b(s.B.grad),
            )
        surgeon.ramps.before_step()
        optimizer.step()
        surgeon.ramps.after_step()
        optimizer.zero_grad()
        for n, s in surgeon.adapter.sites.items():
            torch.testing.assert_close(s.a().detach(), expected[n][0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(s.b().detach(), expected[n][1], rtol=1e-12, atol=1e-12)
        assert bool(surgeon.ramps) == (step < 2)


def test_youth_follows_directions_through_resizes():
    model = lora("linear")
    optimizer = make("adamw", model)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=8)
    name = next(iter(surgeon.layout))

    def young():
        return surgeon.ramps.state_dict()["young"].get(name)

    surgeon.apply(RankPlan({name: [Keep((0, 1)), Grow(1)]}))
    assert young() == [[0, 0], [0, 0], [0, 8]]
    train(model, optimizer, steps=2, surgeon=surgeon)
    surgeon.apply(RankPlan({name: [Keep((2, 0)), Grow(1)]}))
    assert young() == [[2, 8], [2, 0], [0, 8]]
    surgeon.apply(RankPlan({name: [Refactor(mixing(3)[:2], mixing(3).inverse()[:, :2])]}))
    assert young() == [[0, 8], [0, 8]]
    saved = surgeon.ramps.state_dict()
    train(model, optimizer, steps=7, surgeon=surgeon)
    assert young() is None
    surgeon.ramps.load_state_dict(saved, Transaction())
    assert young() == [[0, 8], [0, 8]]
    surgeon.apply(RankPlan({name: [Drop()]}))
    assert young() is None


def test_steps_that_were_not_taken_do_not_age_and_frozen_modules_neither():
    model = lora("linear")
    optimizer = make("adamw", model)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=3)
    surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    before = surgeon.ramps.state_dict()
    loss_of(model, "linear").backward()
    surgeon.ramps.before_step()
    surgeon.ramps.before_step()  # a scaler skipped the step in between
    assert surgeon.ramps.state_dict() == before
    optimizer.zero_grad()
    surgeon.ramps.before_step()
    surgeon.ramps.after_step()
    assert surgeon.ramps.state_dict() == before


def test_growth_under_adam_does_not_overshoot():
    """Under an old step count, an all-zero second moment moves new entries by about two learning rates at once."""
    largest = {}
    for seed_v, warmup in (("zero", 0), ("siblings", 10)):
        model = lora("linear")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.99))
        surgeon = Surgeon(Adapter(model), optimizer, seed_v=seed_v, warmup=warmup)
        for _ in range(100):
            train(model, optimizer, steps=1)
        surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
        moved = 0.0
        for _ in range(12):
            old = {n: s.B.detach()[:, 4].clone() for n, s in surgeon.adapter.sites.items()}
            train(model, optimizer, steps=1, surgeon=surgeon)
            for n, s in surgeon.adapter.sites.items():
                moved = max(moved, float((s.B.detach()[:, 4] - old[n]).square().mean().sqrt()))
        largest[seed_v] = moved / 1e-4
    assert largest["zero"] > 1.5
    assert largest["siblings"] < 1.1


def test_half_precision_factors_are_ramped_in_float32():
    model = lora("linear", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.25)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=3)
    name, site = next(iter(surgeon.adapter.sites.items()))
    surgeon.apply(RankPlan({name: [Grow(1)]}))
    loss_of(model, "linear", dtype=torch.bfloat16).backward()
    old, grad = site.B.detach()[:, 4].float().clone(), site.B.grad[:, 4].float()
    surgeon.ramps.before_step()
    optimizer.step()
    surgeon.ramps.after_step()
    stepped = (old.bfloat16() - (0.25 * grad).bfloat16()).float()
    torch.testing.assert_close(site.B.detach()[:, 4].float(), ((stepped - old) / 3 + old).bfloat16().float())


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_muons_step_does_not_depend_on_the_rank_of_the_day(rule):
    def steps(k: int, ramps: bool) -> dict[str, Tensor]:
        model = lora("linear", r=6, lora_alpha=9)
        options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": rule}
        optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad], **options)
        surgeon = Surgeon(Adapter(model), optimizer)
        surgeon.apply(RankPlan({n: [Keep(tuple(range(k)))] for n in surgeon.layout}))
        old = {n: s.B.detach().clone() for n, s in surgeon.adapter.sites.items()}
        train(model, optimizer, steps=1, surgeon=surgeon if ramps else None)
        return {n: s.B.detach() - old[n] * (1 - 1e-3) for n, s in surgeon.adapter.sites.items()}

    plain, held = steps(2, False), steps(2, True)
    for n, update in held.items():
        out = update.shape[0]
        ratio = math.sqrt(max(1, out / 6) / max(1, out / 2)) if rule == "original" else 1.0
        torch.testing.assert_close(update, plain[n] * ratio, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(x, y) for x, y in zip(steps(6, False).values(), steps(6, True).values(), strict=True))


def test_idle_ramps_do_nothing():
    model = lora("linear")
    surgeon = Surgeon(Adapter(model), make("adamw", model))
    assert not surgeon.ramps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgeon.ramps.before_step()
        surgeon.ramps.after_step()
    assert inputs_of("linear").shape == (3, 7)


def test_revived_directions_get_a_second_moment_of_their_own():
    """Their column of B is 0: mapped, their row of A would have none at all under an old step count."""
    torch.manual_seed(0)
    v = torch.rand(3, 5, dtype=torch.float64)
    N = torch.randn(2, 3, dtype=torch.float64)
    M = torch.randn(3, 2, dtype=torch.float64)
    M[:, 1] = 0
    moved = Moments("A", {"m": torch.zeros(3, 5, dtype=torch.float64)}, v, bounding="m").refactor(N, M)
    assert moved.second is not None
    assert torch.allclose(moved.second[0], (M.square().T @ v)[0])
    assert torch.allclose(moved.second[1], 0.01 * v.mean(0))
