"""Gates of single directions opened by a plan: the function stays, and to the optimizer the directions are new."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from helpers import KINDS, lora, loss_of, outputs, same, snapshot

from rankflow.errors import PlanError
from rankflow.lora.adapter import Adapter
from rankflow.observe.averages import Running
from rankflow.plans.ops import Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.policies.gate import Gate
from rankflow.surgery.surgeon import Surgeon


@dataclass(frozen=True, kw_only=True)
class Spread(Gate):
    """Starts at different values, one of them closed, one negative."""

    def init(self, slot, generator):
        return {"value": torch.tensor([1.5, 0.0, -0.7, 0.4])[: slot.rank if self.scope == "component" else 1].clone()}


def operated(kind: str, gate: Gate | None = None) -> tuple[torch.nn.Module, torch.optim.Optimizer, Surgeon]:
    model = lora(kind, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    surgeon = Surgeon(Adapter(model), optimizer)
    if gate is not None:
        surgeon.gates.install(gate)
    return model, optimizer, surgeon


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [1.0, 1e-5])
def test_opening_keeps_the_function_and_makes_directions_new_to_the_optimizers(kind, to):
    model, optimizer, surgeon = operated(kind, Spread())
    loss_of(model, kind).backward()
    surgeon.gates.collect()
    optimizer.step()
    optimizer.zero_grad()
    surgeon.gates.step()
    sites, wanted, values = surgeon.adapter.sites, outputs(model, kind), surgeon.gates.values()
    before = {n: (s.a().detach().clone(), s.b().detach().clone()) for n, s in sites.items()}
    seconds = {
        n: (s.a(optimizer.state[s.A]["exp_avg_sq"]), s.b(optimizer.state[s.B]["exp_avg_sq"])) for n, s in sites.items()
    }
    surgeon.apply(RankPlan({n: (Open((3, 1), to),) for n in sites}, "open"), 1)
    torch.testing.assert_close(outputs(model, kind), wanted, rtol=1e-10, atol=1e-10)
    e = float(torch.tensor(to))  # as forwards have it, in float32
    for name, site in sites.items():
        (a, b), v, (second_a, second_b) = before[name], values[name], seconds[name]
        assert torch.equal(site.a(), a)
        assert torch.equal(site.b()[..., [0, 2]], b[..., [0, 2]])
        new_b = b[..., [1, 3]] * v[[1, 3]].double() / e
        torch.testing.assert_close(site.b().detach()[..., [1, 3]], new_b, rtol=1e-12, atol=0)
        assert torch.equal(surgeon.gates.values()[name], torch.tensor([v[0], to, v[2], to]))
        # Directions 0 and 2 are the siblings of 1 and 3, as if these had just grown under a gate of e.
        ratio_a = new_b.square().sum(-2) / b[..., [0, 2]].square().sum(-2).mean(-1, keepdim=True)
        ratio_b = a[..., [1, 3], :].square().sum(-1) / a[..., [0, 2], :].square().sum(-1).mean(-1, keepdim=True)
        seed_a = second_a[..., [0, 2], :].mean(-2, keepdim=True) * ratio_a.clamp(min=0.01)[..., :, None] * to**2
        seed_b = second_b[..., [0, 2]].mean(-1, keepdim=True) * ratio_b.clamp(min=0.01)[..., None, :] * to**2
        state_a, state_b = (
            {key: view(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq")}
            for p, view in ((site.A, site.a), (site.B, site.b))
        )
        torch.testing.assert_close(state_a["exp_avg_sq"][..., [1, 3], :], seed_a.expand_as(a[..., [1, 3], :]))
        torch.testing.assert_close(state_b["exp_avg_sq"][..., [1, 3]], seed_b.expand_as(b[..., [1, 3]]))
        assert torch.equal(state_a["exp_avg_sq"][..., [0, 2], :], second_a[..., [0, 2], :])
        assert torch.equal(state_b["exp_avg_sq"][..., [0, 2]], second_b[..., [0, 2]])
        assert not bool(state_a["exp_avg"][..., [1, 3], :].any() or state_b["exp_avg"][..., [1, 3]].any())
        assert surgeon.gates._training.adam is not None
        own = surgeon.gates._training.adam.state[surgeon.gates._training.theta[name]["value"]]["exp_avg"]
        assert [bool(m) for m in own] == [True, False, True, False]


def test_an_opened_direction_ramps_up_and_its_averages_start_afresh():
    _, _, surgeon = operated("linear", Spread())
    name = next(iter(surgeon.layout))
    surgeon.apply(RankPlan({name: (Open((2,), 0.5),)}, "open"), 1)
    spans = [span for _, span in surgeon.ramps.state_dict()["young"][name]]
    assert [span > 0 for span in spans] == [False, False, True, False]
    grams = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    running = Running(grams, grams, torch.tensor([5.0, 6.0, 7.0, 8.0])).after([Open((2,), 0.5)])
    rest = [0, 1, 3]
    assert running.measured.tolist() == [5, 6, 0, 8]
    assert torch.equal(running.mean_zz[rest][:, rest], grams[rest][:, rest])
    assert not bool(running.mean_zz[2].any() or running.mean_dd[:, 2].any())


@pytest.mark.parametrize(
    ("gate", "op", "words"),
    [
        (None, Open((0,)), "opens gates, but its phase has none"),
        (Spread(scope="module"), Open((0,)), "opens gates, but its phase has none"),
        (Spread(), Open((0,), 0.0), "a finite value other than 0"),
        (Spread(), Open((0,), float("nan")), "a finite value other than 0"),
        (Spread(), Open((4,)), "component 4 but rank is 4"),
        (Spread(), Open((1, 1)), "twice"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_refused_and_changes_nothing(gate, op, words):
    model, optimizer, surgeon = operated("linear", gate)
    before = snapshot(model, optimizer)
    with pytest.raises(PlanError, match=words):
        surgeon.apply(RankPlan({next(iter(surgeon.layout)): (op,)}, "open"))
    assert same(snapshot(model, optimizer), before)


def test_under_a_gate_directions_may_be_rescaled_but_not_mixed():
    model, _, surgeon = operated("linear", Spread())
    wanted, values = outputs(model, "linear"), surgeon.gates.values()
    half = torch.eye(4, dtype=torch.float64) / 2
    surgeon.apply(RankPlan({n: (Refactor(half, 4 * half),) for n in surgeon.layout}, "balance"), 1)
    torch.testing.assert_close(outputs(model, "linear"), wanted)
    assert same(surgeon.gates.values(), values)
    mixed = half.flip(0)
    with pytest.raises(PlanError, match="mixes the directions of a module under a gate"):
        surgeon.apply(RankPlan({next(iter(surgeon.layout)): (Refactor(mixed, 4 * mixed),)}, "mix"), 1)


def test_a_gate_that_nothing_trains_costs_nothing_between_resizes(monkeypatch):
    model, optimizer, surgeon = operated("linear", Spread(trained_on="nothing"))
    values = surgeon.gates.values()
    monkeypatch.setattr(surgeon.gates._forward, "draw", lambda *_, **__: pytest.fail("drawn anew"))
    loss_of(model, "linear").backward()
    surgeon.gates.collect()
    optimizer.step()
    surgeon.gates.step()
    assert same(surgeon.gates.values(), values)
    assert not surgeon.gates.gradients


def test_opening_goes_through_json_and_a_replay():
    _, _, surgeon = operated("linear", Spread())
    name = next(iter(surgeon.layout))
    plan = RankPlan({name: (Open((2, 0), 1e-5),)}, "open")
    written = json.loads(json.dumps(plan.to_json()))
    assert RankPlan.from_json(written, plan.pack()).ops == plan.ops
    assert RankPlan.from_json(written).apply_to(surgeon.layout) == surgeon.layout == plan.apply_to(surgeon.layout)
