"""A small but honest training run for tests: a 2-layer Llama, dropout, weight decay, accumulation, clipping,
rsLoRA with mixed alphas and a second adapter that must never change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow
from rankflow.training.checkpoint import load_state, save_state

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

GROW_THEN_SQUEEZE: dict[str, Any] = {
    "phases": [
        {
            "policy": "increlora",
            "until": "60%",
            "budget": {"mean_rank": 4},
            "when": {"start": 3, "every": 3},
            "params": {"window": 2, "score_fraction": 1.0},
        },
        {"policy": "squeeze", "until": "90%", "budget": {"mean_rank": 2}, "when": {"every": 2}},
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 1, "max": 8}},
}


def tiny_llama(seed: int = 0, r: int = 2, dropout: float = 0.1, **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    settings: dict[str, Any] = {
        "r": r,
        "lora_alpha": 8,
        "use_rslora": True,
        "alpha_pattern": {"up_proj": 16},
        "target_modules": TARGETS,
        "lora_dropout": dropout,
        **config,
    }
    model = get_peft_model(base, LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS))
    return model


def token_batches(n: int, seed: int = 1, size: int = 4, length: int = 10) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (n, size, length), generator=generator)
    return [{"input_ids": x, "labels": x} for x in ids]


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class Run:
    """One training run that can be stepped, saved and resumed by hand."""

    def __init__(
        self,
        policy: Any,
        steps: int,
        *,
        model: PeftModel | None = None,
        scheduled: bool = True,
        make: Callable[[list[nn.Parameter]], Optimizer] = adamw,
        **options: Any,
    ):
        self.policy, self.steps = policy, steps
        self.model = model if model is not None else tiny_llama()
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make(trained)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1 if scheduled else 1.0, steps)
        self.flow = rankflow.attach(self.model, self.optimizer, policy, total_steps=steps, **options)
        self.batches = token_batches(2 * steps)
        self.losses: list[float] = []

    def step(self, corrupt: Callable[[], None] | None = None) -> None:
        i = self.flow.step
        torch.manual_seed(1000 + i)  # dropout of a resumed run must not depend on where it was resumed
        for micro in self.batches[2 * i : 2 * i + 2]:
            loss = self.model(**micro).loss / 2
            loss.backward()
            self.losses.append(loss.item())
        if corrupt is not None:
            corrupt()
        self.flow.before_step()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.flow.after_step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def until(self, step: int) -> Run:
        while self.flow.step < step:
            self.step()
        return self


def resumed(
    first: Run,
    policy: Any,
    steps: int,
    folder: Path,
    *,
    fresh: Callable[[], PeftModel] = lambda: tiny_llama(seed=7),
    kind: type[Run] = Run,
    **options: Any,
) -> Run:
    """The run that goes on from what `first` leaves in `folder`, as a fresh process would."""
    first.model.save_pretrained(folder)
    save_state(first.flow, folder)
    torch.save([first.optimizer.state_dict(), first.scheduler.state_dict()], folder / "optimizer.pt")
    model = fresh()
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data.copy_(dict(first.model.named_parameters())[name])
    rankflow.restore(model, folder)
    second = kind(policy, steps, model=model, state=load_state(folder), **options)
    optimizer, scheduler = torch.load(folder / "optimizer.pt", weights_only=True)
    second.optimizer.load_state_dict(optimizer)
    second.scheduler.load_state_dict(scheduler)
    return second


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the adapter that is trained."""
    return {n: t for n, t in weights(model).items() if ".default." in n}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
