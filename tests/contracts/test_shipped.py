"""Every shipped policy file on live models: resumed bit for bit, and a plain PEFT LoRA in the end."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loops import Run, resumed, same_weights, tiny_llama, token_batches, trained
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankflow
from rankflow.config.load import shipped
from rankflow.errors import CheckpointError
from tests.config.test_load import START

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from data import LINEARS, minilm_classifier, reviews

STEPS = 20
# What a run of so few steps, or a model of so few layers, needs to see anything happen
HASTE: dict[str, dict[str, Any]] = {
    "bayesian_lora": {"gate_lr": 2.0, "mu": 10.0},
    "lisa": {"active": 1},
    "sora": {"gate_lr": 0.3, "remove_after": 0},
    "sora_then_hold": {"gate_lr": 0.3, "remove_after": 0},
}
every_file = pytest.mark.parametrize("name", sorted(shipped()))


def policy(name: str) -> Any:
    """The file, in haste where it has to be."""
    if name not in HASTE:
        return name
    file = yaml.safe_load(shipped()[name].read_text())
    first = file["phases"][0] if "phases" in file else file
    first["params"] = first.get("params", {}) | HASTE[name]
    return file


def begun(name: str, **options: Any) -> Run:
    return Run(policy(name), STEPS, model=tiny_llama(r=START.get(name, 2)), **data(), **options)


def resizes(run: Run) -> list[Any]:
    return [(e["step"], e["plan"]) for e in run.flow.ledger.events if e["event"] == "resize"]


def data() -> dict[str, Any]:
    return {"batches": token_batches(6, seed=2), "outer_batches": token_batches(6, seed=3)}


def plain(model: nn.Module) -> bool:
    """Whether nothing of ours is left in the model."""
    ours = [m for m in model.modules() if type(m).__module__.startswith("rankflow")]
    return not ours and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_file
@pytest.mark.parametrize("stop", [1, 8, 15])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, name, stop):
    whole = begun(name).until(STEPS)
    second = resumed(begun(name).until(stop), policy(name), STEPS, tmp_path, **data()).until(STEPS)
    for run in (whole, second):
        run.flow.finish()
    assert second.flow.layout == whole.flow.layout
    assert same_weights(trained(second.model), trained(whole.model))
    assert resizes(second) == resizes(whole)


@every_file
def test_what_is_left_is_plain_and_squeezes_alike_live_and_from_its_file(tmp_path, name):
    run = begun(name).until(STEPS)
    run.flow.finish()
    run.flow.detach()
    assert plain(run.model)
    run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    live = copy.deepcopy(run.model)
    rank = max(1, max(run.flow.layout.ranks.values()) // 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        filed = rankflow.squeeze(tmp_path, tmp_path / "small", target_rank=rank, gauge="keep")
        report = rankflow.squeeze_model(live, target_rank=rank)
    finally:
        torch.set_num_threads(threads)
    again = tiny_llama(r=1)
    rankflow.restore(again, tmp_path / "small")
    assert report.ranks == filed.ranks
    assert trained(again).keys() == trained(live).keys()
    assert all(torch.equal(t, trained(live)[n]) for n, t in trained(again).items())


@pytest.mark.slow
@every_file
def test_the_quickstart_s_model_trains_and_reloads_to_the_same_logits(tmp_path, name):
    train, held_out = reviews(64)
    targets = {"target_modules": LINEARS, "task_type": "SEQ_CLS"}
    model = get_peft_model(minilm_classifier(), LoraConfig(r=START.get(name, 2), lora_alpha=8, **targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def batches(start: int, n: int, size: int = 4):
        return [train[slice(k, k + size)] for k in range(start, start + n * size, size)]

    others = {"batches": batches(1000, 6), "outer_batches": batches(2000, 6)}
    with rankflow.attach(model, optimizer, policy(name), total_steps=STEPS, **others) as flow:
        for batch in batches(0, STEPS):
            model(**batch).loss.backward()
            flow.before_step()
            optimizer.step()
            flow.after_step()
            optimizer.zero_grad()
    assert plain(model)
    assert name == "hold" or any(e["event"] == "resize" for e in flow.ledger.events)
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(minilm_classifier(), tmp_path).eval()
    with torch.inference_mode():
        seen = held_out[slice(0, 64)]
        torch.testing.assert_close(again(**seen).logits, model(**seen).logits, rtol=0, atol=0)


def test_going_on_under_another_policy_file_is_refused_by_both_names(tmp_path):
    first = begun("adalora").until(3)
    with pytest.raises(
        CheckpointError, match=r"under the policy adalora \(.*adalora\.yaml\), and this run has increlora \("
    ):
        resumed(first, "increlora", STEPS, tmp_path, **data())


def test_going_on_with_other_settings_is_refused_by_their_names(tmp_path):
    first = begun("increlora").until(3)
    other = yaml.safe_load(shipped()["increlora"].read_text())
    other["when"]["every"], other["budget"] = "7%", {"mean_rank": 5}
    amount, every = r"\.budget\.amount is 8(\.0)? there and 5(\.0)? here", r"\.when\.every is 5% there and 7% here"
    with pytest.raises(CheckpointError, match=rf": phases\[0\]{amount}, phases\[0\]{every}; go on"):
        resumed(first, other, STEPS, tmp_path, **data())
