"""Schedule-free optimizers, whose parameter is an average y = (1 - beta) z + beta x of an iterate z and of its own
average x, against the method worked out by hand with x and z kept apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import lora, loss_of, outputs, same
from loops import GROW_THEN_SQUEEZE, Run, resumed, same_weights, trained
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.errors import OptimizerError
from rankflow.lora.adapter import Adapter
from rankflow.optim.moments import Moments
from rankflow.plans.ops import Drop, Grow, Keep, Op, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.trainer import RankFlowCallback
from tests.optim.test_optim import mixing, orthogonal
from tests.training.test_trainer import default_weights, trainer

schedulefree = pytest.importorskip("schedulefree")

LR, BETA, BETA2, DECAY, WARMUP = 1e-2, 0.8, 0.9, 0.1, 3
MAKE: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "sgd": lambda ps: schedulefree.SGDScheduleFree(ps, lr=LR, momentum=BETA, weight_decay=DECAY, warmup_steps=WARMUP),
    "adamw": lambda ps: schedulefree.AdamWScheduleFree(
        ps, lr=LR, betas=(BETA, BETA2), weight_decay=DECAY, warmup_steps=WARMUP, foreach=False
    ),
    "adamw_foreach": lambda ps: schedulefree.AdamWScheduleFree(
        ps, lr=LR, betas=(BETA, BETA2), weight_decay=DECAY, warmup_steps=WARMUP
    ),
    "radam": lambda ps: schedulefree.RAdamScheduleFree(ps, lr=LR, betas=(BETA, BETA2), weight_decay=DECAY),
}
PLANS: dict[str, Sequence[Op]] = {
    "grow": (Grow(2),),
    "shrink": (Keep((3, 0)),),
    "refactor": (Refactor(mixing(4)[:3], mixing(4).inverse()[:, :3]),),
    "all": (Refactor(mixing(4)[:3], mixing(4).inverse()[:, :3]), Keep((2, 0)), Grow(2)),
}


def made(name: str, model: nn.Module) -> Any:
    optimizer = MAKE[name]([p for p in model.parameters() if p.requires_grad])
    optimizer.train()
    return optimizer


def steps_of(model: nn.Module, optimizer: Optimizer, steps: int, first: int, surgeon: Surgeon | None = None) -> None:
    for i in range(first, first + steps):
        loss_of(model, "linear", seed=i).backward()
        if surgeon is not None:
            surgeon.ramps.before_step()
        optimizer.step()
        if surgeon is not None:
            surgeon.ramps.after_step()
        optimizer.zero_grad()


class ByHand:
    """The method as the paper has it, in float64, for the factors of one model."""

    def __init__(self, model: nn.Module, adam: bool):
        self.surgeon, self.adam, self.k, self.weights = Surgeon(Adapter(model), warmup=0), adam, 0, 0.0
        self.model = model
        self.z = {key: p.detach().clone() for key, p in self.parameters().items()}
        self.x = {key: t.clone() for key, t in self.z.items()}
        self.v = {key: torch.zeros_like(t) for key, t in self.z.items()}
        self.young: dict[str, tuple[int, int]] = {}  # module -> the first young direction, and steps it has taken

    def parameters(self) -> dict[tuple[str, str], nn.Parameter]:
        sites = self.surgeon.adapter.sites
        return {(n, role): p for n, s in sites.items() for role, p in s.tensors().items()}

    def y(self, key: tuple[str, str]) -> Tensor:
        return (1 - BETA) * self.z[key] + BETA * self.x[key]

    def step(self, seed: int, warmup: int = 0) -> None:
        for key, p in self.parameters().items():
            p.data.copy_(self.y(key))
        self.model.zero_grad()
        loss_of(self.model, "linear", seed=seed).backward()
        self.k += 1
        lr = LR * min(1.0, self.k / WARMUP)
        self.weights += lr**2
        c = lr**2 / self.weights
        for key, p in self.parameters().items():
            g = p.grad
            assert g is not None
            if self.adam:
                self.v[key] = BETA2 * self.v[key] + (1 - BETA2) * g**2
                g = g / ((self.v[key] / (1 - BETA2**self.k)).sqrt() + 1e-8)
            z = self.z[key] - lr * (g + DECAY * self.y(key))
            x = (1 - c) * self.x[key] + c * z
            scale = torch.ones_like(z)
            if key[0] in self.young:
                start, age = self.young[key[0]]
                (scale if key[1] == "A" else scale.T)[start:] = min(1.0, (age + 1) / warmup)
            self.z[key] += scale * (z - self.z[key])
            self.x[key] += scale * (x - self.x[key])
        for key, p in self.parameters().items():
            p.data.copy_(self.y(key))
        self.young = {n: (start, age + 1) for n, (start, age) in self.young.items()}

    def apply(self, ops: Sequence[Op]) -> None:
        self.surgeon.apply(RankPlan(dict.fromkeys(self.surgeon.layout, ops)))
        for (n, role), p in self.parameters().items():
            for held, what in ((self.z, "point"), (self.x, "point"), (self.v, "second")):
                t = held[n, role]
                t = t if role == "A" else t.T
                for op in ops:
                    if isinstance(op, Keep):
                        t = t[list(op.idx)]
                    elif isinstance(op, Refactor):
                        step = op.N if role == "A" else op.M.T
                        t = step @ t if what == "point" else (op.M.T if role == "A" else op.N) ** 2 @ t
                    elif isinstance(op, Grow):
                        new = (p.detach() if role == "A" else p.detach().T)[-op.n :]
                        t = torch.cat([t, new if what == "point" else 0 * new])
                        self.young[n] = (len(t) - op.n, 0)
                held[n, role] = (t if role == "A" else t.T).clone()


def agree(by_hand: ByHand, surgeon: Surgeon, optimizer: Any) -> None:
    """y, z, v, and in eval mode x, are those worked out by hand."""

    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one.detach(), other, rtol=1e-9, atol=1e-11)

    for n, role in by_hand.x:
        p = surgeon.adapter.sites[n].tensors()[role]
        close(p, by_hand.y((n, role)))
        close(optimizer.state[p]["z"], by_hand.z[n, role])
        if by_hand.adam:
            close(optimizer.state[p]["exp_avg_sq"], by_hand.v[n, role])
    optimizer.eval()
    for (n, role), x in by_hand.x.items():
        close(surgeon.adapter.sites[n].tensors()[role], x)
    optimizer.train()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw_foreach"])
def test_all_three_points_follow_a_resize_and_the_run_goes_on_from_them(name, plan):
    model = lora("linear")
    by_hand = ByHand(copy.deepcopy(model), adam=name != "sgd")
    optimizer = made(name, model)
    surgeon = Surgeon(Adapter(model), optimizer, seed_v="zero", warmup=0)
    for i in range(5):
        steps_of(model, optimizer, 1, i)
        by_hand.step(i)
    agree(by_hand, surgeon, optimizer)
    surgeon.apply(RankPlan(dict.fromkeys(surgeon.layout, PLANS[plan])))
    by_hand.apply(PLANS[plan])
    agree(by_hand, surgeon, optimizer)
    for i in range(5, 9):
        steps_of(model, optimizer, 1, i, surgeon)
        by_hand.step(i, warmup=1)
    agree(by_hand, surgeon, optimizer)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_young_directions_move_slowly_at_all_three_points(name, steps):
    """Grown before the first step, too, when there is no z yet."""
    model = lora("linear")
    by_hand = ByHand(copy.deepcopy(model), adam=name != "sgd")
    optimizer = made(name, model)
    surgeon = Surgeon(Adapter(model), optimizer, seed_v="zero", warmup=4)
    for i in range(steps):
        steps_of(model, optimizer, 1, i)
        by_hand.step(i)
    surgeon.apply(RankPlan({n: [Grow(2)] for n in surgeon.layout}))
    by_hand.apply([Grow(2)])
    for i in range(steps, steps + 6):
        steps_of(model, optimizer, 1, i, surgeon)
        by_hand.step(i, warmup=4)
        agree(by_hand, surgeon, optimizer)
    assert not surgeon.ramps


@pytest.mark.parametrize("name", MAKE)
def test_another_basis_is_the_same_run(name):
    """A rotation under SGD, signed exchange of directions under what steps entry by entry: the very same functions, in
    training and in evaluation."""
    N = orthogonal(4) if name == "sgd" else torch.eye(4).double()[[2, 0, 3, 1]] * torch.tensor([[1.0], [-1], [1], [-1]])
    ends = []
    for turned in (False, True):
        model = lora("linear")
        optimizer = made(name, model)
        surgeon = Surgeon(Adapter(model), optimizer)
        steps_of(model, optimizer, 6, 0)
        if turned:
            surgeon.apply(RankPlan({n: [Refactor(N, N.mT)] for n in surgeon.layout}))
        steps_of(model, optimizer, 6, 10)
        seen = [outputs(model, "linear").detach()]
        optimizer.eval()
        ends.append([*seen, outputs(model, "linear").detach()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ends[0][0], ends[0][1])


@pytest.mark.parametrize("plan", ["shrink", "refactor"])
@pytest.mark.parametrize("name", MAKE)
def test_a_resize_in_eval_mode_is_the_same_resize(name, plan):
    """All three points are mapped alike, so it makes no difference which of them the parameter is at the moment."""
    ends = []
    for mode in ("train", "eval"):
        model = lora("linear")
        optimizer = made(name, model)
        surgeon = Surgeon(Adapter(model), optimizer)
        steps_of(model, optimizer, 6, 0)
        if mode == "eval":
            optimizer.eval()
        surgeon.apply(RankPlan(dict.fromkeys(surgeon.layout, PLANS[plan])))
        optimizer.train()
        steps_of(model, optimizer, 3, 10)
        ends.append([*(p.detach() for p in surgeon.adapter.parameters()), *(s["z"] for s in optimizer.state.values())])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_growth_changes_neither_the_trained_function_nor_the_averaged_one(name, mode):
    model = lora("linear")
    optimizer = made(name, model)
    surgeon = Surgeon(Adapter(model), optimizer)
    steps_of(model, optimizer, 6, 0)

    def functions() -> list[Tensor]:
        seen = []
        for switch in (optimizer.train, optimizer.eval):
            switch()
            seen.append(outputs(model, "linear").detach())
        getattr(optimizer, mode)()
        return seen

    before = functions()
    surgeon.apply(RankPlan({n: [Grow(2)] for n in surgeon.layout}))
    for one, other in zip(functions(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_fold_of_a_gate_takes_the_iterate_along():
    z, value = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.5, 0.0, 2.0])
    folded = Moments("A", points={"z": z}).over(value).points["z"]
    assert torch.equal(folded, z * value[:, None])


@pytest.mark.parametrize("name", MAKE)
def test_modules_leave_come_back_and_start_where_they_are(name):
    model = lora("linear")
    optimizer = made(name, model)
    surgeon = Surgeon(Adapter(model), optimizer)
    steps_of(model, optimizer, 4, 0)
    a, b = list(surgeon.layout)[:2]
    surgeon.apply(RankPlan({a: [Drop()], b: [Drop(), Grow(3)]}))
    steps_of(model, optimizer, 1, 5, surgeon)
    surgeon.apply(RankPlan({a: [Grow(2)]}))
    site = surgeon.adapter.sites[a]
    for p in (site.A, site.B):
        assert "z" not in optimizer.state.get(p, {}) or torch.equal(optimizer.state[p]["z"], p)
    trained_points = outputs(model, "linear").detach()
    optimizer.eval()
    optimizer.train()
    torch.testing.assert_close(outputs(model, "linear").detach(), trained_points, rtol=1e-12, atol=1e-12)
    steps_of(model, optimizer, 3, 6, surgeon)
    assert all(torch.isfinite(p).all() for p in surgeon.adapter.parameters())


@pytest.mark.parametrize("mode", ["resize", "mask"])
@pytest.mark.parametrize("name", ["sgd", "adamw_foreach"])
def test_a_run_grows_squeezes_and_resumes_bit_for_bit(name, mode, tmp_path: Path):
    def make(parameters: list[nn.Parameter]) -> Any:
        optimizer = MAKE[name](parameters)
        optimizer.train()
        return optimizer

    policy = {**GROW_THEN_SQUEEZE, "mode": mode}
    whole = Run(policy, 20, make=make, scheduled=False).until(20)
    assert whole.flow.layout.total_rank == 20
    for stop in (7, 15):
        first = Run(policy, 20, make=make, scheduled=False).until(stop)
        second = resumed(first, policy, 20, tmp_path / str(stop), make=make, scheduled=False).until(20)
        assert same_weights(trained(whole.model), trained(second.model))


def test_masked_directions_stay_zero_and_end_as_resized_ones_do():
    ends = []
    for mode in ("resize", "mask"):
        run = Run(
            {**GROW_THEN_SQUEEZE, "mode": mode},
            20,
            make=lambda ps: (o := MAKE["adamw"](ps), o.train())[0],
            scheduled=False,
        ).until(20)
        run.flow.finish()
        ends.append(trained(run.model))
    for one, other in zip(ends[0].values(), ends[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_trainers_schedule_free_optimizer_resumes_bit_for_bit(tmp_path: Path):
    options = {
        "optim": "schedule_free_adamw",
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    whole = trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), **options)
    whole.train()
    flow = RankFlowCallback(GROW_THEN_SQUEEZE)
    again = trainer(tmp_path, flow, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert flow.flow is not None
    assert flow.flow.layout.total_rank == 20
    assert same_weights(default_weights(whole.model), default_weights(again.model))


def test_relatives_with_other_state_are_refused_by_name():
    model = lora("linear")
    optimizer = schedulefree.AdamWScheduleFreeReference([p for p in model.parameters() if p.requires_grad], lr=LR)
    optimizer.train()
    steps_of(model, optimizer, 1, 0)
    surgeon = Surgeon(Adapter(model), optimizer)
    before = {id(p): dict(s) for p, s in optimizer.state.items()}
    with pytest.raises(OptimizerError, match="AdamWScheduleFreeReference keeps"):
        surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    assert all(same(s, before[id(p)]) for p, s in optimizer.state.items())
