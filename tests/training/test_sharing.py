"""Modules that train one pair of factors together, each holding a copy, against a model whose parameters are tied."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from loops import Run, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel

import rankflow
from rankflow.errors import PlanError
from rankflow.lora.adapter import Adapter
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop, Grow, Keep, Share
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.methods.diffora import Diffora
from rankflow.policies.observation import Observation, Signal
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.checkpoint import load_state, save_state
from rankflow.training.gradients import share_gradients

QO = tuple(f"model.layers.0.self_attn.{m}_proj" for m in "qo")
TOGETHER = RankPlan({n: (Drop(), Grow(3), Share("qo")) for n in QO}, "together")
OUTER = token_batches(3, seed=7)


def operated() -> tuple[torch.nn.Module, torch.optim.Optimizer, Surgeon]:
    model = tiny_llama(dropout=0.0).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    return model, optimizer, Surgeon(Adapter(model), optimizer, warmup=0)


def copies(surgeon: Surgeon) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(s.A.detach().clone(), s.B.detach().clone()) for s in map(surgeon.adapter.sites.__getitem__, QO)]


def train(model, optimizer, surgeon: Surgeon | None, batches) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        if surgeon is not None:
            share_gradients(surgeon.adapter, surgeon.layout)
        optimizer.step()
        optimizer.zero_grad()


def test_copies_are_trained_as_tied_parameters_are():
    """Whatever state their optimizer had: it starts afresh with the pair."""
    model, optimizer, surgeon = operated()
    surgeon.apply(TOGETHER, 1)
    tied, reference, other = operated()
    other.apply(TOGETHER, 1)
    q, o = (other.adapter.sites[n].layer for n in QO)
    for part in ("lora_A", "lora_B"):
        getattr(o, part)["default"].weight = getattr(q, part)["default"].weight
    reference = torch.optim.AdamW([p for p in tied.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    train(model, optimizer, surgeon, token_batches(5))
    train(tied, reference, None, token_batches(5))
    wanted = tied.state_dict()  # under both names of what is tied
    for name, t in weights(model).items():
        torch.testing.assert_close(t, wanted[name], rtol=1e-9, atol=1e-12)
    first, second = copies(surgeon)
    assert all(map(torch.equal, first, second))
    assert all(bool(t.any()) for t in first)


def test_a_group_starts_alike_after_any_history_and_steps_alike():
    model, optimizer, surgeon = operated()
    train(model, optimizer, surgeon, token_batches(3))
    surgeon.apply(TOGETHER, 1)
    for batch in token_batches(3, seed=5):
        first, second = copies(surgeon)
        assert all(map(torch.equal, first, second))
        train(model, optimizer, surgeon, [batch])
    assert surgeon.layout[QO[0]].shared == surgeon.layout[QO[1]].shared == "qo"
    surgeon.apply(RankPlan({QO[0]: (Keep((0, 2)),)}, "alone"), 2)
    assert surgeon.layout[QO[0]].shared is None


def test_what_is_not_alike_cannot_share():
    layout = Layout({n: Slot(2, 6, size, 1.0) for n, size in (("a", 5), ("b", 5), ("c", 7))})

    def shared(*names: str, rank: int = 2) -> Layout:
        return RankPlan({n: (Drop(), Grow(rank), Share("g")) for n in names}, "x").apply_to(layout)

    assert {n: s.shared for n, s in shared("a", "b").items()} == {"a": "g", "b": "g", "c": None}
    with pytest.raises(PlanError, match="a and c share their factors but differ"):
        shared("a", "c")
    with pytest.raises(PlanError, match="a and b share their factors but differ"):
        RankPlan({"b": (Drop(), Grow(3), Share("g")), "a": (Share("g"),)}, "x").apply_to(layout)
    plan = RankPlan({n: (Drop(), Grow(2), Share("g")) for n in "ab"}, "x")
    written = json.loads(json.dumps(plan.to_json()))
    assert RankPlan.from_json(written, plan.pack()).to_json() == plan.to_json()
    assert RankPlan.from_json(written).apply_to(layout) == plan.apply_to(layout)
    assert Layout.from_json(shared("a", "b").to_json()) == shared("a", "b")


# -- DiffoRA ----------------------------------------------------------------------------------------------------------


def decided(values: dict[str, float], layout: Layout, **options) -> Layout:
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, share="share", **options)
    records = {
        n: {Signal.GATE: torch.tensor([v]), Signal.A: torch.ones(2, 6), Signal.B: torch.ones(5, 2)}
        for n, v in values.items()
    }
    return policy.decide({}, Observation(1, records), layout, 1).apply_to(layout)


NAMES = [f"layers.{i}.{m}" for i in range(2) for m in ("q", "k", "v", "up")]
LAYOUT = Layout({n: Slot(2, 6, 9 if n.endswith("up") else 5, 1.0, max_rank=8) for n in NAMES})
VALUES = dict(zip(NAMES, [0.1, 0.2, 0.9, 0.3, 0.1, 0.2, 0.3, 0.9], strict=True))


def test_unselected_modules_of_a_layer_and_shape_share_a_pair_and_one_that_is_alone_leaves():
    after = decided(VALUES, LAYOUT, ratio=0.25)
    assert {n: s.shared for n, s in after.items() if s.shared} == {
        "layers.0.q": "layers.0.q",
        "layers.0.k": "layers.0.q",
        **dict.fromkeys(("layers.1.q", "layers.1.k", "layers.1.v"), "layers.1.q"),
    }
    assert [n for n, s in after.items() if s.rank == 0] == ["layers.0.up"]
    tied = Layout({n: dataclasses.replace(s, tie="t" if n.endswith(("q", "k")) else None) for n, s in LAYOUT.items()})
    assert not any(s.shared for n, s in decided(VALUES, tied, ratio=0.25).items() if n.startswith("layers.0"))


def test_copies_count_in_the_budget():
    after = decided(VALUES, LAYOUT, ratio=0.25, budget=Budget("total_rank", 30))
    assert after.total_rank == 30
    assert len({after[f"layers.1.{m}"].rank for m in "qkv"}) == 1


POLICY = {
    "phases": [
        {
            "policy": "diffora",
            "until": 6,
            "when": {"start": 4, "every": 9},
            "params": {"warmup": 1, "ratio": 0.2, "share": "share"},
        },
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 0}},
}


def pairs(run: Run) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, slot in run.flow.layout.items():
        if slot.shared:
            groups.setdefault(slot.shared, []).append(name)
    return groups


def prefer_mlp(run: Run) -> Run:
    """Whatever the search says: the first module of the feed-forward part is what stays in every layer."""
    for name, theta in run.flow._gates._training.theta.items():
        theta["logit"].data.fill_(3.0 if name.endswith("up_proj") else 0.0)
    return run


def test_a_search_that_shares_ends_in_a_plain_lora_whose_copies_are_equal(tmp_path):
    run = prefer_mlp(Run(POLICY, 9, outer_batches=OUTER).until(3)).until(9)
    run.flow.finish()
    assert pairs(run) == {
        f"model.layers.{i}.self_attn.q_proj": [f"model.layers.{i}.self_attn.{m}_proj" for m in "qo"] for i in range(2)
    }
    sites = run.flow._adapter.sites
    for first, second in pairs(run).values():
        assert torch.equal(sites[first].A, sites[second].A)
        assert torch.equal(sites[first].B, sites[second].B)
        assert bool(sites[first].B.any())
    probe = token_batches(1, seed=4)[0]
    with torch.no_grad():
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path).eval()
        torch.testing.assert_close(loaded(**probe).logits, run.model.eval()(**probe).logits)


@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_run_that_shares_ends_where_an_uninterrupted_one_does(tmp_path, stop):
    def begun() -> Run:
        return prefer_mlp(Run(POLICY, 9, outer_batches=OUTER).until(3))

    whole, part = begun().until(9), begun().until(stop)
    part.model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    save_state(part.flow, tmp_path)
    rankflow.restore(model := tiny_llama(), tmp_path)
    again = Run(POLICY, 9, model=model, outer_batches=OUTER, state=load_state(tmp_path))
    again.optimizer.load_state_dict(part.optimizer.state_dict())
    again.scheduler.load_state_dict(part.scheduler.state_dict())
    assert same_weights(weights(whole.model), weights(again.until(9).model))
    assert pairs(again) == pairs(whole) != {}


def test_under_the_gates_of_a_later_phase_nothing_is_shared():
    first = {**POLICY["phases"][0]}
    later = {"phases": [first, {"policy": "sora", "when": {"start": 8, "every": 2}}], "limits": {"*": {"min": 0}}}
    run = prefer_mlp(Run(later, 9, outer_batches=OUTER).until(3)).until(5)
    assert pairs(run)
    run.until(7)
    assert not pairs(run)
