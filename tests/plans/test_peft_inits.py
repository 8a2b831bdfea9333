"""Ways to start an adapter that change the base weights: ranks are left alone, by every door and in the same words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise, same, snapshot
from loops import same_weights
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import rankflow
from rankflow.errors import AdapterError, CheckpointError, RankFlowError
from rankflow.lora.adapter import Adapter
from rankflow.plans.ops import Keep, Train
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon

SQUEEZE = {"policy": "squeeze", "budget": {"mean_rank": 2}, "when": {"start": 4, "every": 4, "stop": "80%"}}
CHANGING = ["pissa", "pissa_niter_4", "olora", "OLoRA"]  # made by PEFT here
SAID = ["pissa_niter_16", "corda", "loftq", "lora_ga"]  # these take data, or quantise: the config says so
OTHERS = [True, False, None, "gaussian", "eva", "orthogonal"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 10)
        self.b = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net(init: Any = True, r: int = 4) -> PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eva asks for its data
        config = LoraConfig(r=r, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=init)
        return get_peft_model(Net(), config)


def said(init: str) -> PeftModel:
    model = net()
    model.peft_config["default"].init_lora_weights = init
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(model: nn.Module, flow: Any, optimizer: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()


def made_by_callback(model: PeftModel, folder: Path) -> None:
    Trainer(model, arguments(folder), callbacks=[rankflow.RankFlowCallback(SQUEEZE)])


def squeezed_on_disk(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder / "adapter")
    rankflow.squeeze(folder / "adapter", out=folder / "out", target_rank=2)


DOORS: dict[str, Callable[[PeftModel, Path], Any]] = {
    "attach": lambda m, _: rankflow.attach(m, adamw(m), SQUEEZE, total_steps=20),
    "a later phase": lambda m, _: rankflow.attach(
        m, adamw(m), {"phases": [{"policy": "hold", "until": 10}, SQUEEZE]}, total_steps=40
    ),
    "callback": made_by_callback,
    "resize": lambda m, _: rankflow.resize(m, 2),
    "squeeze_model": lambda m, _: rankflow.squeeze_model(m, target_rank=2),
    "surgeon": lambda m, _: Surgeon(Adapter(m)).apply(RankPlan({"a": [Keep((0, 1))]})),
    "file": squeezed_on_disk,
}


def refusal(door: str, model: PeftModel, folder: Path) -> str:
    with pytest.raises(AdapterError) as refused:
        DOORS[door](model, folder)
    return str(refused.value)


@pytest.mark.parametrize("init", [*CHANGING, *SAID])
def test_every_door_refuses_in_the_same_words_and_changes_nothing(init, tmp_path):
    model = net(init) if init in CHANGING else said(init)
    before = snapshot(model)
    words = {refusal(door, model, tmp_path).partition("init_lora_weights")[2] for door in DOORS}
    assert len(words) == 1
    assert repr(init) in words.pop()
    assert same(snapshot(model), before)


@pytest.mark.parametrize("init", OTHERS)
def test_ways_that_leave_the_base_alone_are_managed_and_load_again(init, tmp_path):
    model = net(init)
    base = {n: p.detach().clone() for n, p in Net().named_parameters()}
    optimizer = adamw(model)
    flow = rankflow.attach(model, optimizer, {**SQUEEZE, "budget": {"total_rank": 4}}, total_steps=12)
    steps(model, flow, optimizer, 12)
    flow.finish()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = PeftModel.from_pretrained(Net(), tmp_path)
    x = torch.randn(5, 12)
    assert len(base) == 4
    torch.testing.assert_close(back(x), model(x))


def test_orthogonal_is_written_as_what_loads_at_any_rank(tmp_path):
    for resize in (
        lambda m: rankflow.resize(m, {"a": 3, "b": 1}),
        lambda m: rankflow.squeeze_model(m, target_rank=3),
        lambda m: rankflow.restore(m, tmp_path),
    ):
        model = net("orthogonal")
        resize(model)
        assert model.peft_config["default"].init_lora_weights is True
        model.save_pretrained(tmp_path)
        back = PeftModel.from_pretrained(Net(), tmp_path)
        assert {s.rank for s in Adapter(back).sites.values()} <= {1, 3}


def test_what_only_freezes_may_have_any_adapter():
    model = net("pissa")
    surgeon = Surgeon(Adapter(model), adamw(model))
    surgeon.apply(RankPlan({"a": [Train(False)]}))
    assert not Adapter(model).sites["a"].A.requires_grad
    lisa = {"policy": "lisa", "when": {"start": 1, "every": 2}, "params": {"active": 1, "group": "module"}}
    model, optimizer = (fresh := net("pissa")), adamw(fresh)
    flow = rankflow.attach(model, optimizer, lisa, total_steps=6)
    steps(model, flow, optimizer, 6)
    flow.finish()
    assert len([e for e in flow.ledger.events if e["event"] == "resize"]) > 0


def test_restoring_leaves_ranks_alone_or_nothing_at_all(tmp_path):
    saved = net("pissa")
    randomise(saved)
    saved.save_pretrained(tmp_path)
    same_ranks = net("pissa")
    rankflow.restore(same_ranks, tmp_path)
    assert same_weights(*({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (saved, same_ranks)))
    for model, says in ((net("pissa", r=3), "depends on the rank"), (net(True), "not for the same base")):
        before = snapshot(model)
        with pytest.raises(RankFlowError, match=says):
            rankflow.restore(model, tmp_path)
        assert same(snapshot(model), before)
    net(True).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not for the same base"):
        rankflow.restore(net("olora"), tmp_path / "plain")


# -- under the Trainer ------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=16))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(folder), **settings, **quiet, **options)


def trainer(init: str, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init)  # type: ignore[arg-type]
    ids = torch.randint(0, 61, (32, 10), generator=torch.Generator().manual_seed(1))
    data: Any = [{"input_ids": i, "labels": i} for i in ids]
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(folder, load_best_model_at_end=True, metric_for_best_model="eval_loss", **every)
    model = get_peft_model(llama(), config)
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks))


def lora_of(run: Trainer) -> dict[str, Tensor]:
    assert run.model is not None
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_holding_and_resuming_go_on_as_without_rankflow(init, tmp_path):
    plain, held = trainer(init, tmp_path / "plain"), trainer(init, tmp_path / "held", rankflow.RankFlowCallback("hold"))
    for run in (plain, held):
        run.train()  # and loads the best model at its end
    assert same_weights(lora_of(held), lora_of(plain))
    resumed = trainer(init, tmp_path / "held", rankflow.RankFlowCallback("hold"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "held" / "checkpoint-4"))
    assert same_weights(lora_of(resumed), lora_of(plain))
    held.save_model(str(tmp_path / "final"))
    back = PeftModel.from_pretrained(llama(), tmp_path / "final").eval()
    ids = torch.arange(10)[None]
    assert held.model is not None
    torch.testing.assert_close(back(ids).logits, held.model.eval()(ids).logits)
