"""What `rankflow check` foretells of memory and messages, against runs that take and send it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loops import GROW_THEN_SQUEEZE, tiny_llama, token_batches

import rankflow
from rankflow.analysis.forecast import blank_layout, foretell
from rankflow.config.load import load_policy
from rankflow.distributed.single import SingleProcess
from rankflow.lora.adapter import Adapter

STEPS = 8
ONCE = {"start": 2, "every": 4}
POLICIES = {
    "increlora": {"policy": "increlora", "when": ONCE, "budget": {"mean_rank": 6}},
    "by sketches": {"policy": "increlora", "when": ONCE, "budget": {"mean_rank": 6}, "params": {"grow_init": "grad"}},
    "by loss": {"policy": "squeeze", "when": ONCE, "budget": {"mean_rank": 2}, "params": {"metric": "loss"}},
    "by weights": {"policy": "squeeze", "when": ONCE, "budget": {"mean_rank": 2}},
    "adalora": {"policy": "adalora", "when": ONCE, "budget": {"mean_rank": 2}},
    "rigl": {"policy": "rigl", "when": ONCE},
    "eva": {"policy": "eva"},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_takes_and_sends_what_was_foretold(monkeypatch: pytest.MonkeyPatch, name: str):
    model = tiny_llama(r=4, dropout=0.0).train()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    layout, phases = load_policy(POLICIES[name]).resolve(STEPS, Adapter(model).layout())
    start = foretell(layout, phases)[0]
    heard, plans = [], []
    average, agree = SingleProcess.average, SingleProcess.agree
    monkeypatch.setattr(
        SingleProcess, "average", lambda self, seen: heard.append(seen.measured()) or average(self, seen)
    )
    monkeypatch.setattr(SingleProcess, "agree", lambda self, *args: plans.append(agree(self, *args)) or plans[-1])
    flow = rankflow.attach(model, optimizer, POLICIES[name], total_steps=STEPS, batches=token_batches(2))
    for batch in token_batches(0 if any(plans) else STEPS):
        model(**batch).loss.backward()
        gradients = sum(p.grad.nbytes for p in factors if p.grad is not None)
        flow.before_step()
        optimizer.step()
        if flow.step == 0:
            moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
            assert (start.adapter, start.step, start.optimizer) == (sum(p.nbytes for p in factors), gradients, moments)
        flow.after_step()
        optimizer.zero_grad()
        if any(plans):
            break
    assert start.listen == max((sum(8 * t.numel() for t in seen.values()) for seen in heard), default=0)
    (plan,) = filter(None, plans)
    assert plan.pack().nbytes <= 1.01 * start.resize, "but for ranks that are not spread evenly"
    flow.detach()


def test_the_end_of_every_phase_is_at_its_budget():
    layout, phases = load_policy(GROW_THEN_SQUEEZE).resolve(100, Adapter(tiny_llama()).layout())
    costs = foretell(layout, phases)
    assert [cost.when for cost in costs] == ["at the start", "after increlora", "after squeeze", "after hold"]
    modules = len(layout)
    assert [cost.layout.total_rank for cost in costs] == [2 * modules, 4 * modules, 2 * modules, 2 * modules]
    assert costs[2].resize == sum(8 * 2 * 4 * 2 for _ in layout), "N and M of every module, from rank 4 to 2"


def test_models_of_any_size_are_looked_at_without_their_weights(tmp_path: Path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = blank_layout(tmp_path / "config.json", None, 16)
    _, phases = load_policy("squeeze").resolve(1000, layout)
    cost = foretell(layout, phases)[0]
    attention = (8192 + 8192) + 2 * (8192 + 1024) + (8192 + 8192)
    params = 80 * 16 * (attention + 3 * (8192 + 28672))
    assert (len(layout), layout.params) == (560, params)
    assert (cost.adapter, cost.optimizer, cost.step) == (4 * params, 8 * params, 4 * params)
