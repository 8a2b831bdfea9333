"""Settings under which nothing can change are known before the first step, for every policy there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import tiny_llama
from tiny import Tiny

import rankflow
from rankflow.config.load import load_policy, shipped
from rankflow.config.registry import policy_names
from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.plan import RankPlan
from rankflow.policies.base import Policy
from rankflow.policies.idleness import idle_phases
from tests.config.test_load import START

NAMES = [f"model.layers.{i}.{kind}" for i in range(6) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def layout(r: int, **limits: Any) -> Layout:
    return Layout({name: Slot(r, 64, 64, 1.0, **limits) for name in NAMES})


def idle(policy: Any, r: int, steps: int = 2000, **limits: Any) -> list[str]:
    resolved, phases = load_policy(policy).resolve(steps, layout(r, **limits))
    return idle_phases(resolved, phases)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_policy_at_the_rank_it_names_has_something_to_do(name: str):
    assert idle(name, START.get(name, 2)) == []


@pytest.mark.parametrize(
    ("name", "r", "which"),
    [
        ("increlora", 8, ["increlora: 12 decisions, none can change anything: the adapter starts at mean rank 8, "]),
        ("squeeze", 4, ["squeeze: "]),
        ("adalora", 4, ["adalora: "]),
        ("elalora", 16, ["elalora: "]),
        ("grow_then_squeeze", 16, ["phases[0] (increlora): "]),
        ("adalora_then_squeeze", 8, ["phases[0] (adalora): "]),
        ("colora_then_increlora", 4, []),
    ],
)
def test_a_phase_that_starts_where_it_is_to_end_is_named(name: str, r: int, which: list[str]):
    found = idle(name, r)
    assert [line[: len(start)] for line, start in zip(found, which, strict=True)] == which


@pytest.mark.parametrize(
    "name", sorted({*policy_names()} - {"eva", "gradient_start", "hold", "lisa", "rigl"})
)  # which do more than that
def test_limits_that_leave_one_rank_leave_nothing_to_decide(name: str):
    file: dict[str, Any] = {"policy": name, "limits": {"*": {"min": 6, "max": 6}}}
    if name in ("adalora", "squeeze", "increlora", "colora"):
        file["budget"] = {"mean_rank": 6}
    if name in ("bayesian_lora", "sora"):
        file["params"] = {"gate_lr": 1.0}
    [line] = idle(file, 6)
    assert "none can change anything" in line
    file["limits"] = {"*": {"min": 0, "max": 12}}
    if name in ("adalora", "squeeze"):
        file["budget"] = {"mean_rank": 3}
    assert (idle(file, 6) == []) == (name != "increlora")


def two(*phases: dict[str, Any]) -> dict[str, Any]:
    return {"phases": [*({"until": "50%", **phase} for phase in phases[:-1]), phases[-1]]}


INCRELORA, SQUEEZE = {"policy": "increlora"}, {"policy": "squeeze"}


@pytest.mark.parametrize(
    ("file", "r", "phases"),
    [
        (two({**INCRELORA, "budget": {"mean_rank": 8}}, {**SQUEEZE, "budget": {"mean_rank": 8}}), 2, [1]),
        (two({**SQUEEZE, "budget": {"mean_rank": 4}}, {**INCRELORA, "budget": {"mean_rank": 4}}), 8, [1]),
        (two({**SQUEEZE, "budget": {"size": "40KB"}}, {**INCRELORA, "budget": {"size": "60KB"}}), 8, []),
        # a bound, which ranks may fall below: to a budget of the same amount there may be something to grow
        (
            two(
                {"policy": "sora", "budget": {"mean_rank": 4}, "params": {"gate_lr": 1.0}},
                {**INCRELORA, "budget": {"mean_rank": 4}},
            ),
            8,
            [],
        ),
        (two({"policy": "diffora"}, {**INCRELORA, "budget": {"mean_rank": 8}}), 8, []),
        ({"policy": "elalora", "limits": {"*": {"min": 2, "max": 6}}}, 2, [0]),
        ({"policy": "elalora", "rank_buckets": [4, 8]}, 4, []),
        ({**INCRELORA, "budget": {"mean_rank": 6}, "rank_multiple": 40}, 4, [0]),
        ({"policy": "rigl", "limits": {"*": {"min": 4, "max": 4}}}, 4, []),  # its directions still move
        ({"policy": "rigl", "params": {"rate": 0.001}}, 4, [0]),
        ({"policy": "eva", "limits": {"*": {"min": 4, "max": 4}}}, 4, []),
        ({"policy": "eva", "limits": {"*": {"min": 4, "max": 4}}, "params": {"init_a": "keep"}}, 4, [0]),
        ({"policy": "diffora", "limits": {"*": {"min": 0}}, "params": {"ratio": 1.0}}, 4, [0]),
        ({"policy": "sora", "params": {"lam": 1e-6, "gate_lr": 1e-4}}, 4, [0]),
        ({"policy": "sora", "params": {"lam": 0.3, "gate_lr": 1e-3}}, 4, []),  # their own gradients may close gates
        ({"policy": "sora", "params": {"lam": 0.0, "gate_lr": 1e-3}}, 4, [0]),  # but none gets to be zero exactly
        ({"policy": "squeeze", "params": {"energy": 0.9}, "limits": {"*": {"min": 4}}}, 4, [0]),
        ({"policy": "squeeze", "params": {"energy": 0.9}}, 4, []),
        ({**INCRELORA, "budget": {"mean_rank": 8}, "when": {"start": 3000}}, 8, [0]),  # no decision at all
        ({"phases": [{**SQUEEZE, "budget": {"mean_rank": 2}, "until": "100%"}, {"policy": "hold"}]}, 4, [1]),
        ({"policy": "hold"}, 4, []),
        ({"policy": "lisa"}, 4, []),
    ],
)
def test_phases_that_can_change_nothing(file: dict[str, Any], r: int, phases: list[int]):
    found = idle(file, r)
    assert [int(line[7]) if line.startswith("phases[") else 0 for line in found] == phases


def test_ranks_outside_limits_are_something_to_do():
    assert idle({**SQUEEZE, "budget": {"mean_rank": 4}, "limits": {"*": {"max": 4}}}, 8) == []
    file = {**SQUEEZE, "budget": {"mean_rank": 4}, "limits": {"*layers.0.*": {"max": 2}}}
    assert idle(file, 4) == []


class Own(Policy):
    def decide(self, *args: Any) -> RankPlan:
        return RankPlan()


def test_a_policy_that_declares_nothing_is_idle_only_where_nothing_is_left_to_choose():
    assert idle(Own(), 4) == []
    resolved, phases = load_policy(Own()).resolve(100, layout(4, min_rank=4, max_rank=4))
    assert len(idle_phases(resolved, phases)) == 1


@pytest.mark.parametrize("name", ["elalora", "rigl"])
def test_what_keeps_its_total_is_refused_where_limits_do_not_let_it(name: str):
    for r, limits in ((16, {"max": 8}), (1, {"min": 2})):
        with pytest.raises(ConfigError, match="limits allow only"):
            load_policy({"policy": name, "limits": {"*": limits}}).resolve(100, layout(r))
    after = two({**SQUEEZE, "params": {"energy": 0.5}}, {"policy": name})  # which brings them within limits
    load_policy({**after, "limits": {"*": {"max": 8}}}).resolve(100, layout(16))


# -- who is told ------------------------------------------------------------------------------------------------------

IDLE = {"policy": "squeeze", "budget": {"mean_rank": 3}}


def test_attach_warns_once_and_changes_nothing():
    with pytest.warns(UserWarning, match="none can change anything") as said:
        run = Tiny(IDLE, 10)
    assert len(said) == 1
    run.until(4)
    state = run.flow.state_dict()
    run.flow.detach()
    flow = rankflow.attach(run.model, run.optimizer, IDLE, total_steps=10, state=state)  # said when it began
    flow.detach()


def test_a_summary_says_what_came_of_a_run(caplog: pytest.LogCaptureFixture, tmp_path: Any):
    model = tiny_llama(r=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    policy = {"policy": "squeeze", "budget": {"mean_rank": 1}, "when": {"start": 2, "every": 2}}
    flow = rankflow.attach(model, optimizer, policy, total_steps=4, ledger=tmp_path / "run.jsonl")
    for _ in range(4):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
    with caplog.at_level("INFO", logger="rankflow"):
        summary = flow.finish()
    assert (summary.decisions, summary.resizes, summary.steps) == (1, 1, 4)
    assert (summary.before, summary.after) == (20, 10)
    assert summary.ledger == str(tmp_path / "run.jsonl")
    assert summary.ranks.keys() == {name.removeprefix("rankflow/rank/") for name in flow.metrics() if "/rank/" in name}
    assert [r.getMessage() for r in caplog.records if "decision" in r.getMessage()] == [str(summary)]
    assert f"rankflow report {tmp_path / 'run.jsonl'}" in str(summary)
    assert flow.summary() == summary


def test_metrics_call_types_as_reports_do():
    names = [f"bert.layer.{i}.{kind}" for i in range(2) for kind in ("attention.output.dense", "output.dense", "dense")]
    from rankflow.training.summary import ranks_by_type

    found = ranks_by_type(Layout({name: Slot(i, 8, 8, 1.0) for i, name in enumerate(names, 1)}))
    assert found == {"attention.output.dense": [1, 4], "output.dense": [2, 5], "dense": [3, 6]}


def test_a_decision_after_the_last_step_is_said_when_the_run_starts():
    def attached(when: dict[str, Any]):
        model = tiny_llama(r=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        policy = {"policy": "squeeze", "budget": {"mean_rank": 1}, "when": when}
        return rankflow.attach(model, optimizer, policy, total_steps=10)

    with pytest.warns(UserWarning, match="squeeze: decides after step 10, the last of the run"):
        attached({"start": "100%"}).detach()
    attached({"every": 2}).detach()  # a warning would be an error here
