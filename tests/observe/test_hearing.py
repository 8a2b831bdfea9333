"""Modules that no gradient reaches rank last, frozen ones are let be, and the last that trains stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rankflow
from rankflow.plans.last_direction import spare_last
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop, Keep, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.observation import Observation

TOWERS = ["vision1", "vision2"]  # first in order, so that no tie goes against them
NAMES = [*TOWERS, "text1", "text2"]


class Two(nn.Module):
    """Text goes through `text1` and `text2`, an image, where there is one, through the others."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.text1(x))
        if image is not None:
            h = h + self.vision2(torch.tanh(self.vision1(image)))
        return self.text2(h)


def two(frozen: tuple[str, ...] = (), trained: bool = False, r: int = 4) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=r, lora_alpha=2 * r, target_modules=NAMES))  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        if trained and "lora_B" in name and any(tower in name for tower in TOWERS):
            nn.init.normal_(p, std=3.0)
        if any(f in name for f in frozen):
            p.requires_grad_(False)
    return model


POLICIES: dict[str, dict[str, Any]] = {
    "adalora": {"budget": {"mean_rank": 2}},
    "bayesian_lora": {"budget": {"mean_rank": 2}, "params": {"mu": 0.0, "gate_lr": 0.05}},
    "elalora": {"params": {"move": 2}},
    "increlora": {"budget": {"mean_rank": 6}},
    "rigl": {"params": {"rate": 0.5}},
    "sora": {"budget": {"mean_rank": 2}, "params": {"lam": 0.0}},
    "squeeze-loss": {"budget": {"mean_rank": 2}, "params": {"metric": "loss", "shape": "linear"}},
    "squeeze-outputs": {"budget": {"mean_rank": 2}, "params": {"metric": "outputs", "shape": "linear"}},
}


def run(
    policy: Any,
    model: Any,
    steps: int = 18,
    *,
    images: Any = lambda step: False,
    zeros: bool = False,
    kind: Any = torch.optim.Adam,
) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if isinstance(policy, str):
        file = {"policy": policy.partition("-")[0], "limits": {"*": {"min": 1, "max": 8}}, **POLICIES[policy]}
        policy = {**file, "when": {"start": 3, "every": 3, "stop": "90%"}}
    random = torch.Generator().manual_seed(1)
    for p in optimizer.param_groups[0]["params"] if zeros else ():
        p.grad = torch.zeros_like(p)
    flow = rankflow.attach(model, optimizer, policy, total_steps=steps)
    for step in range(1, steps + 1):
        x, image = torch.randn(2, 6, 8, generator=random)
        (model(x, image if images(step) else None) - x.sin()).square().mean().backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad(set_to_none=not zeros)
    flow.finish()
    return flow


def ranks(flow: Any) -> dict[str, int]:
    return {name.rpartition(".")[2]: rank for name, rank in flow.layout.ranks.items()}


@pytest.mark.parametrize("how", ["none", "zeros", "trained before"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_no_gradient_reaches_ranks_last(policy: str, how: str):
    found = ranks(run(policy, two(trained=how == "trained before"), zeros=how == "zeros"))
    assert max(found[name] for name in TOWERS) < min(found["text1"], found["text2"])
    if policy != "increlora":
        assert {found[name] for name in TOWERS} == {1}


@pytest.mark.parametrize("policy", ["adalora", "elalora", "rigl"])
def test_a_frozen_module_loses_nothing(policy: str):
    found = ranks(run(policy, two(frozen=("vision1",))))
    assert found["vision1"] >= 4
    assert found["vision2"] == 1


@pytest.mark.parametrize("policy", ["rigl", "sora", "squeeze-loss"])
def test_a_module_that_is_reached_on_some_steps_is_heard(policy: str):
    flow = run(policy, two(), images=lambda step: step == 2)  # on which nobody decides
    assert flow._hearing.reached == set(flow.layout)
    assert flow._hearing.unheard(flow.layout) == frozenset()


@pytest.mark.parametrize("policy", ["adalora", "elalora", "increlora", "squeeze-loss"])  # which listen on many steps
def test_no_gradient_on_some_steps_is_a_gradient_of_zero_there(policy: str):
    runs = [
        run(policy, two(), zeros=zeros, images=lambda step: step % 5 == 2, kind=torch.optim.SGD)
        for zeros in (False, True)
    ]
    plans = [[(e["step"], e["plan"]["ops"]) for e in flow.ledger.events if e["event"] == "resize"] for flow in runs]
    assert plans[0] == plans[1] != []


@dataclass(frozen=True, kw_only=True)
class Everything(Policy):
    """Takes out, or freezes, all that trains."""

    how: Any

    def decide(self, state: Any, obs: Observation, layout: Layout, step: int) -> RankPlan:
        return RankPlan({n: (self.how,) for n, s in layout.items() if s.rank and "text" in n and s.trainable}, "all go")


@pytest.mark.parametrize("how", [Drop(), Train(False)])
def test_no_policy_takes_out_everything_that_trains(how: Any):
    model = two()
    with pytest.warns(UserWarning, match="every module that trains") as said:
        flow = run(Everything(when=When(3, 3), how=how), model, 12)
    assert len(said) == 1
    assert sum(ranks(flow)[n] > 0 for n in ("text1", "text2")) >= 1
    assert "the last that train" in next(e["reason"] for e in flow.ledger.events if e["event"] == "resize")


def test_sora_that_closes_everything_keeps_one_direction_that_trains():
    policy = {
        "policy": "sora",
        "limits": {"*": {"min": 0}},
        "when": {"start": 3, "every": 3},
        "params": {"lam": 10, "gate_lr": 1.0, "remove_after": 0},
    }
    with pytest.warns(UserWarning, match="every module that trains"):
        found = ranks(run(policy, two()))
    assert found["vision1"] == found["vision2"] == 0
    assert sum(found.values()) == 1


def test_a_checkpoint_keeps_what_was_heard():
    model = two()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    policy = {"policy": "rigl", "when": {"start": 9, "every": 9}}
    flow = rankflow.attach(model, optimizer, policy, total_steps=20)
    x = torch.ones(2, 8)
    model(x, x).sum().backward()
    flow.before_step()
    optimizer.step()
    flow.after_step()
    state = flow.state_dict()
    flow.detach()
    again = rankflow.attach(model, optimizer, policy, total_steps=20, state=state)
    assert again._hearing.state_dict() == state["hearing"] != {"reached": [], "had": []}
    again.detach()


# -- the rule itself --------------------------------------------------------------------------------------------------


def layout(**limits: Any) -> Layout:
    return Layout({n: Slot(4, 8, 8, 1.0, max_rank=8, **limits) for n in ("a", "b", "c")})


def sizes(name: str) -> Tensor:
    return torch.tensor({"a": [1.0, 2.0, 9.0, 3.0], "b": [1.0, 5.0, 4.0, 2.0], "c": [9.0, 9.0, 9.0, 10.0]}[name])


@pytest.mark.parametrize(
    ("live", "limits", "kept"),
    [
        ("ab", {}, {"a": Keep((2,))}),
        ("b", {}, {"b": Keep((1,))}),
        ("", {}, {"c": Keep((3,))}),
        ("ab", {"buckets": (2, 4)}, {"a": Keep((2, 3))}),
        ("ab", {"tie": "all"}, {"a": Keep((2,)), "b": Keep((1,)), "c": Keep((3,))}),
    ],
)
def test_the_largest_direction_of_what_is_live_stays(live: str, limits: dict[str, Any], kept: dict[str, Keep]):
    before = layout(**limits)
    plan, spared = spare_last(RankPlan(dict.fromkeys(before, (Drop(),)), "gone"), before, set(live), sizes)
    assert spared in kept
    assert {n: ops[0] for n, ops in plan.ops.items() if not isinstance(ops[0], Drop)} == kept
    plan.apply_to(before)


def test_a_plan_that_leaves_something_live_stays_as_it_is():
    plan = RankPlan({"a": (Drop(),), "c": (Drop(),)})
    assert spare_last(plan, layout(), {"a", "b"}, sizes) == (plan, None)
    assert spare_last(plan, layout(), {"a"}, sizes)[1] == "a"
