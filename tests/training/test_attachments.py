"""Runs that nobody finished: dropped, interrupted or lost, the model can be attached to again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from tiny import batch, loss, tiny
from torch import nn
from transformers import TrainerCallback

import rankflow
from rankflow.errors import AdapterError, ConfigError
from rankflow.policies.gate import Gate
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.methods.sora import SoraGate
from rankflow.training.trainer import RankFlowCallback
from tests.contracts.test_nothing_lost import AVERAGES, HELD_OUT, Told, phases
from tests.gating.test_gates import Noisy
from tests.training.test_controller import hooks_on
from tests.training.test_trainer import trainer

ADVANCE = {
    "policy": "increlora",
    "budget": {"mean_rank": 4},
    "when": {"start": 1, "every": 2},
    "params": {"score_fraction": 1.0, "window": 1, "advance": True},
}
RUNS: dict[str, Any] = {
    "no gate": phases(Told(signals=AVERAGES), until=9),
    "sora": phases(Told(kind=SoraGate(start="randn"), signals=AVERAGES), until=9),
    "noise": phases(Told(kind=Noisy()), until=9),
    "held out": phases(Told(kind=Gate(scope="module", trained_on="outer")), until=9),
    "advance": ADVANCE,
}


def begin(model: nn.Module, policy: Any, **options: Any) -> tuple[rankflow.Controller, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    given = {"loss_fn": loss, "batches": HELD_OUT, "outer_batches": HELD_OUT, **options}
    return rankflow.attach(model, optimizer, policy, total_steps=8, **given), optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, flow: rankflow.Controller | None, at: int = 0) -> None:
    loss(model, batch(at)).backward()
    if flow is not None:
        flow.before_step()
    optimizer.step()
    if flow is not None:
        flow.after_step()
    optimizer.zero_grad()


def output(model: nn.Module) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        out = model.eval()(batch(7)[0])
    model.train(training)
    return out


@pytest.mark.parametrize("kind", RUNS)
def test_a_dropped_run_falls_silent_and_the_model_can_be_attached_to_again(kind: str):
    model = tiny()
    flow, optimizer = begin(model, RUNS[kind])
    for at in range(2):
        step(model, optimizer, flow, at)
    before = output(model)
    ranks = flow.layout.ranks
    gone = weakref.ref(flow)
    del flow
    gc.collect()
    assert gone() is None
    assert torch.equal(output(model), before)
    assert hooks_on(model) == 0
    model.train()
    torch.testing.assert_close(model(batch(7)[0]), model(batch(7)[0]), rtol=0, atol=0)  # without noise
    step(model, optimizer, None)  # whoever goes on without it trains at the ranks there are
    before = output(model)
    with pytest.warns(UserWarning, match="dropped without finish"):
        again, optimizer = begin(model, "hold")
    assert again.layout.ranks == ranks
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)
    assert type(model.base_model.model.first.lora_A["default"]) is nn.Linear
    step(model, optimizer, again)
    again.finish()
    assert hooks_on(model) + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_somebody_has_is_in_the_way_until_it_is_detached(kind: str):
    model = tiny()
    flow, optimizer = begin(model, RUNS[kind])
    step(model, optimizer, flow)
    with pytest.raises(ConfigError, match=r"step 1 of 8.*rankflow\.detach\(model\)"):
        begin(model, "hold")
    with pytest.raises(ConfigError, match="managed by a run"):
        begin(model.base_model, "hold")  # the same adapter, named by another module around it
    step(model, optimizer, flow)  # it goes on
    before = output(model)
    rankflow.detach(model)
    rankflow.detach(model)
    assert not flow.attached
    assert hooks_on(model) == 0
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)
    again, _ = begin(model, "hold")
    flow.finish()
    assert again.attached
    with pytest.raises(AdapterError, match="nobody"):
        rankflow.detach(model, "nobody")


def test_an_exception_in_a_with_block_leaves_the_way_free():
    model = tiny()
    flow, optimizer = begin(model, RUNS["sora"])

    def work() -> None:
        with flow:
            step(model, optimizer, flow)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    begin(model, "hold")


def test_neither_model_nor_run_is_kept_alive_and_copies_are_under_no_run(tmp_path: Path):
    model = tiny()
    flow, optimizer = begin(model, "hold")
    twin = copy.deepcopy(model)
    read = pickle.loads(pickle.dumps(model))
    for other in (twin, read):
        begin(other, "hold")[0].finish()
    gone = weakref.ref(model), weakref.ref(flow)
    del model, flow, optimizer
    gc.collect()
    assert [there() for there in gone] == [None, None]


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_trainer_that_was_interrupted_makes_way_for_the_next(tmp_path: Path):
    interrupted = trainer(tmp_path / "a", RankFlowCallback(ADVANCE), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    callback = RankFlowCallback("hold")
    run = trainer(tmp_path / "b", callback, model=interrupted.model, max_steps=4)
    run.train()
    assert run.state.global_step == 4
    assert callback.flow is not None
    assert callback.flow.layout.total_rank > 10  # as far as the other had come
    again = trainer(tmp_path / "c", RankFlowCallback("hold"), model=interrupted.model, max_steps=2)
    again.train()


def test_an_optimizer_that_outlives_its_run_steps_as_if_there_had_been_none():
    model, plain = tiny(), tiny()
    flow, optimizer = begin(model, Lifecycle((("told", Told(), None),)))
    del flow
    gc.collect()
    other = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 1e-2)
    for at in range(2):
        step(model, optimizer, None, at)
        step(plain, other, None, at)
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])
