"""An average of weights that goes through every resize of the model it is taken of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import Planted, failing
from helpers import same
from loops import GROW_THEN_SQUEEZE
from peft import PeftModel
from tiny import MASKED, Net, Tiny, batch, save, tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

import rankflow
from rankflow.lora.adapter import Adapter
from rankflow.plans.ops import Drop, Grow, Keep, Train
from rankflow.plans.plan import RankPlan
from tests.contracts.test_nothing_lost import Told, begun, cut, phases
from tests.training.test_trainer import trainer

DECAY = 0.8
EMA = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}
PLANS = {
    2: RankPlan({"first": (Keep((2, 0)), Grow(2)), "second": (Drop(),), "third": cut()}, "away"),
    4: RankPlan({"second": (Grow(2),), "third": (Grow(1), Train(False))}, "back"),
}
OPS = {(step, name): ops for step, plan in PLANS.items() for name, ops in plan.ops.items()}


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B in float64, by module."""
    sites = Adapter(model).sites
    return {n: (s.a().detach().double(), s.b().detach().double()) for n, s in sites.items() if s.present}


def by_hand(average: Any, now: dict[str, tuple[Tensor, Tensor]], step: int) -> dict[str, Any]:
    """The algebra of `PLANS`, worked out on its own: A and B of the average in the place of the model's."""
    out = {}
    for name, (A, B) in now.items():
        a, b = average.get(name, (A[:0], B[:, :0]))
        for op in OPS.get((step, name), ()):
            if isinstance(op, Keep):
                a, b = a[list(op.idx)], b[:, list(op.idx)]
            elif isinstance(op, Grow):
                a, b = torch.cat([a, A[-op.n :]]), torch.cat([b, B[:, -op.n :]], 1)
            elif not isinstance(op, Train):
                a, b = op.N @ a, b @ op.M
        out[name] = (a, b)
    return out


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        for one, other in zip(found[name], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dora", [False, True])
def test_the_average_goes_through_the_algebra_of_the_factors(dora: bool):
    run = Tiny(phases(Told(plans=PLANS), until=9), 8, model=tiny(use_dora=dora), seed=5)
    averaged = rankflow.averaged_model(run.model, run.flow, **EMA)
    want: dict[str, Any] = factors(run.model)
    for step in range(1, 8):
        run.step()
        now = factors(run.model)
        want = by_hand(want, now, step)
        assert_close(factors(averaged.module), want)
        averaged.update_parameters(run.model)
        if step == 1:
            want = now  # the first is taken as it is
        want = {n: tuple(DECAY * x + (1 - DECAY) * y for x, y in zip(want[n], now[n], strict=True)) for n in now}
        assert_close(factors(averaged.module), want)
    assert [n for n, _ in averaged.module.named_parameters()] == [n for n, _ in run.model.named_parameters()]


def test_what_is_not_resized_is_what_a_plain_averaged_model_has_bit_for_bit():
    run = Tiny(phases(Told(plans=PLANS), until=9), 8)
    averaged = rankflow.averaged_model(run.model, run.flow, **EMA)
    plain = AveragedModel(copy.deepcopy(run.model).base_model.model.last, **EMA)
    for _ in range(7):
        run.step()
        averaged.update_parameters(run.model)
        plain.update_parameters(run.model.base_model.model.last)
    mine = dict(averaged.module.base_model.model.last.named_parameters())
    assert all(torch.equal(mine[n], p) for n, p in plain.module.named_parameters())
    assert averaged.n_averaged == plain.n_averaged == 7


@pytest.mark.parametrize("case", ["gates and averages", "from gate to gate", "a module that returns"])
def test_factors_under_gates_are_averaged_as_forwards_use_them(tmp_path: Path, case: str):
    """The average of one model alone is that model, whatever its gates do and whenever it was made."""
    run = begun(case, tmp_path)
    averaged = [rankflow.averaged_model(run.model, run.flow, **EMA)]
    x, _ = batch(0)
    for step in range(1, 7):
        run.step()
        averaged.append(rankflow.averaged_model(run.model, run.flow, **EMA))
        for each in averaged:
            each.n_averaged.zero_()
            each.update_parameters(run.model)
            run.model.eval()
            with torch.no_grad():
                torch.testing.assert_close(each.eval()(x), run.model(x), msg=lambda m, s=step: f"step {s}: {m}")
            run.model.train()
    run.flow.finish()
    assert all(factors(each.module).keys() == factors(run.model).keys() for each in averaged)


def test_copies_take_no_hooks_and_no_gates_along(tmp_path: Path):
    run = begun("from gate to gate", tmp_path).until(3)
    averaged = rankflow.averaged_model(run.model, run.flow)
    hooked = [m for m in averaged.module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []
    holders = [m for m in averaged.module.modules() if "_rankflow_fitted" in m.__dict__]
    assert holders == []
    with torch.no_grad():
        assert averaged.train()(batch(0)[0]).isfinite().all()
    run.until(5)


def test_masked_runs_are_followed_made_before_and_after_room_is_there():
    run = Tiny(MASKED, 8)
    averaged = rankflow.averaged_model(run.model, run.flow, **EMA)
    for _ in range(8):
        run.step()
        averaged.update_parameters(run.model)
    assert run.flow.layout.total_rank > 12
    run.flow.finish()
    assert [p.shape for p in averaged.module.parameters()] == [p.shape for p in run.model.parameters()]


@pytest.mark.parametrize("share", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_a_step_fails_the_average_is_as_it_was(share: int):
    run = Tiny(phases(Told(plans=PLANS), until=9), 8)
    averaged = rankflow.averaged_model(run.model, run.flow, **EMA)
    run.step()
    averaged.update_parameters(run.model)
    run.backward_and_step()
    before = copy.deepcopy(averaged.state_dict())
    for at in range(11, 10**6, share):
        with failing(at):
            try:
                run.flow.after_step()
            except Planted:
                assert same(dict(averaged.state_dict()), dict(before)), at
                continue
        break
    assert at > 300
    averaged.update_parameters(run.model)


def test_a_saved_average_goes_on_as_if_never_stopped(tmp_path: Path):
    policy = phases(Told(plans=PLANS), until=9)
    whole = Tiny(policy, 8)
    first = rankflow.averaged_model(whole.model, whole.flow, **EMA)
    for step in range(1, 8):
        whole.step()
        first.update_parameters(whole.model)
        if step == 3:
            save(whole, tmp_path)
            torch.save(first.state_dict(), tmp_path / "ema.pt")
    model = tiny()
    rankflow.restore(model, tmp_path)
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    run = Tiny(policy, 8, model=model, state=kept["flow"])
    run.optimizer.load_state_dict(kept["optimizer"])
    second = rankflow.averaged_model(run.model, run.flow, **EMA)
    second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for _ in range(4):
        run.step()
        second.update_parameters(run.model)
    assert same(dict(first.state_dict()), dict(second.state_dict()))


def test_what_is_saved_of_it_is_a_plain_adapter(tmp_path: Path):
    run = Tiny(phases(Told(plans=PLANS), until=9), 8)
    averaged = rankflow.averaged_model(run.model, run.flow, **EMA)
    for _ in range(6):
        run.step()
        averaged.update_parameters(run.model)
    averaged.module.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(batch(0)[0]), averaged.eval()(batch(0)[0]))


class Update(TrainerCallback):
    def __init__(self, averaged: AveragedModel):
        self.averaged = averaged

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.averaged.update_parameters(kwargs["model"])


def test_the_trainers_run_is_followed_and_its_best_model_is_not_averaged(tmp_path: Path):
    callback = rankflow.RankFlowCallback(GROW_THEN_SQUEEZE)
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    made = trainer(tmp_path / "a", callback, load_best_model_at_end=True, **options)
    averaged = rankflow.averaged_model(made.model, callback, **EMA)
    made.add_callback(Update(averaged))
    made.train()
    assert averaged.n_averaged == 20
    other = rankflow.RankFlowCallback(GROW_THEN_SQUEEZE)
    plain = trainer(tmp_path / "b", other, **options)
    alike = rankflow.averaged_model(plain.model, other, **EMA)
    plain.add_callback(Update(alike))
    plain.train()
    assert same(dict(averaged.state_dict()), dict(alike.state_dict()))
    assert other.flow is not None
    assert Adapter(averaged.module).layout().ranks == other.flow.layout.ranks


def test_an_average_made_before_the_trainer_resumes_gets_the_ranks_that_there_are(tmp_path: Path):
    options = {"save_strategy": "steps", "save_steps": 8}
    trainer(tmp_path, rankflow.RankFlowCallback(GROW_THEN_SQUEEZE), **options).train()
    callback = rankflow.RankFlowCallback(GROW_THEN_SQUEEZE)
    made = trainer(tmp_path, callback, **options)
    averaged = rankflow.averaged_model(made.model, callback, **EMA)
    made.add_callback(Update(averaged))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert callback.flow is not None
    assert averaged.n_averaged == 12
    assert Adapter(averaged.module).layout().ranks == callback.flow.layout.ranks
