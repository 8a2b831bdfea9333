"""`step: held`: other ranks leave the length of the model's steps as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from peft import LoraConfig, get_peft_model
from tiny import MASKED, Tiny, resumed, save, tiny
from torch import nn

import rankflow
from rankflow import ConfigError, load_policy

SHRINKS: dict[str, Any] = {
    "policy": "squeeze",
    "step": "held",
    "budget": {"mean_rank": 1},
    "when": {"start": 4, "every": 4, "stop": 9},
}


def factors(run: Tiny) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_" in n}


def moves(policy: Any, optimizer: Any, **options: Any) -> dict[str, torch.Tensor]:
    """How far the first step moves every factor."""
    run = Tiny(policy, 10, **options)
    run.flow.detach()
    run.optimizer = optimizer([p for p in run.model.parameters() if p.requires_grad])
    run.flow = rankflow.attach(run.model, run.optimizer, policy, total_steps=10, loss_fn=lambda m, b: tiny_loss(m, b))
    before = factors(run)
    run.step()
    return {n: (t - before[n]).double() for n, t in factors(run).items()}


def tiny_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


@pytest.mark.parametrize(
    ("optimizer", "power"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-2), 0.5),
        (lambda p: torch.optim.SGD(p, lr=1e-1), 0.5),
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), 0.5),
        (lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0), 0.0),
        (lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw"), 0.5),
    ],
    ids=["adamw", "sgd", "adafactor", "muon", "muon as adamw"],
)
def test_updates_follow_the_root_of_the_mean_rank(optimizer: Any, power: float):
    free = moves({"policy": "hold", "step": "free"}, optimizer)
    held = moves({"policy": "hold", "step": "held", "rate_for": 12}, optimizer)  # of modules of rank 3
    for name, move in free.items():
        torch.testing.assert_close(held[name], 4**power * move, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(("rate_for", "times"), [(12, 1.0), (0.75, 0.5)])
def test_a_cap_never_makes_steps_longer(rate_for: float, times: float):
    def adamw(p: Any) -> Any:
        return torch.optim.AdamW(p, lr=1e-2, weight_decay=0)

    free = moves({"policy": "hold", "step": "free"}, adamw)
    capped = moves({"policy": "hold", "rate_for": rate_for}, adamw)
    for name, move in free.items():
        torch.testing.assert_close(capped[name], times * move, rtol=1e-3, atol=2e-7)


def test_weight_decay_of_muon_is_not_scaled():
    def muon(decay: float) -> Any:
        return lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=decay, adjust_lr_fn="match_rms_adamw")

    policy = {"policy": "hold", "step": "held", "rate_for": 12}
    without, decayed = moves(policy, muon(0.0)), moves(policy, muon(0.5))
    start = factors(Tiny("hold", 10))
    for name, move in without.items():
        torch.testing.assert_close(decayed[name], move - 0.005 * start[name].double(), rtol=1e-3, atol=2e-7)


def test_nothing_is_touched_where_the_rank_is_that_of_the_rate():
    free, held = Tiny("hold", 6), Tiny({"policy": "hold", "step": "held", "rate_for": 3}, 6)
    assert not held.flow._surgeon.ramps
    for run in (free, held):
        run.until(6)
    assert all(torch.equal(a, b) for a, b in zip(factors(free).values(), factors(held).values(), strict=True))


def test_the_step_is_as_long_after_a_cut_as_before_it():
    width, steps = 64, 30
    g = torch.Generator().manual_seed(0)
    wanted = torch.randn(width, width, generator=g) / width**0.5
    batches = [torch.randn(64, width, generator=g) for _ in range(steps)]

    def ratio(step: str, rank: int) -> float:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(width, width, bias=False))
        nn.init.zeros_(base[0].weight)
        model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
        layer = model.base_model.model[0]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        policy = {
            "policy": "squeeze",
            "step": step,
            "budget": {"mean_rank": rank},
            "when": {"start": 15, "every": 99, "stop": 16},
        }
        moved, before = [], layer.get_delta_weight("default").detach().clone()
        with rankflow.attach(model, optimizer, policy if rank < 16 else "hold", total_steps=steps) as flow:
            for x in batches:
                (model(x) - x @ wanted.T).square().mean().backward()
                flow.before_step()
                optimizer.step()
                after = layer.get_delta_weight("default").detach().clone()
                moved.append(float((after - before).norm()))
                flow.after_step()
                optimizer.zero_grad()
                before = layer.get_delta_weight("default").detach().clone()
        return sum(moved[16:26]) / sum(moved[5:15])

    uncut = ratio("free", 16)  # steps grow as training goes on
    assert ratio("free", 4) < 0.7 * uncut
    assert 0.75 * uncut < ratio("held", 4) < 1.3 * uncut


@pytest.mark.parametrize("policy", [SHRINKS, {**MASKED, "step": "held"}], ids=["resized", "masked"])
@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_run_ends_where_it_would_have(policy: Any, at: int, tmp_path: Path):
    whole = Tiny(policy, 12)
    whole.until(12)
    first = Tiny(policy, 12)
    first.until(at)
    save(first, tmp_path)
    again = resumed(tmp_path, policy, 12)
    assert again.flow._surgeon.ramps.rate_rank == whole.flow._surgeon.ramps.rate_rank
    again.until(12)
    assert same(factors(again), factors(whole))


def test_what_the_rate_is_for_is_the_last_budget_and_is_recorded():
    flow = Tiny(SHRINKS, 12).flow
    assert flow.ledger.events[0]["rate_for"] == 1.0
    assert "rate_for" not in Tiny("hold", 12).flow.ledger.events[0]
    start = load_policy({"policy": "gora", "step": "held", "budget": {"mean_rank": 2}})
    layout = flow.layout
    assert start.rate_rank(*start.resolve(12, layout)) is None  # given out before anything trains


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_for": 0, "step": "held"},
        {"rate_for": -1, "step": "held"},
        {"step": "fast"},
        {"rate_for": 4, "step": "free"},
    ],
)
def test_what_means_nothing_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        load_policy({"policy": "squeeze", "budget": {"mean_rank": 2}, **wrong})


def test_dora_s_magnitudes_step_as_they_did():
    def magnitudes(policy: Any) -> list[torch.Tensor]:
        run = Tiny(policy, 6, model=tiny(use_dora=True))
        run.step()
        return [p.detach() for n, p in run.model.named_parameters() if "magnitude" in n]

    free, held = magnitudes("hold"), magnitudes({"policy": "hold", "step": "held", "rate_for": 12})
    assert free
    assert all(torch.equal(a, b) for a, b in zip(free, held, strict=True))
