"""A training run that takes milliseconds: four linear layers, LoRA on each, Adam, and everything that a run has."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise, wrap
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import rankflow

LAYERS = ("first", "second", "third", "last")
MASKED = {  # grows within room that is made beforehand
    "policy": "increlora",
    "mode": "mask",
    "budget": {"mean_rank": 4},
    "limits": {"*": {"min": 1, "max": 6}},
    "when": {"start": 2, "every": 2},
    "params": {"window": 2, "score_fraction": 1.0},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 7)
        self.third, self.last = nn.Linear(7, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        return self.last(x)


def tiny(**config: Any) -> PeftModel:
    """Factors random, as if trained."""
    torch.manual_seed(0)
    model = wrap(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=list(LAYERS), **config))
    randomise(model)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(6, 5, generator=generator)
    return x, x.cumsum(-1)[:, :4].sin()


def loss(model: nn.Module, of: tuple[Tensor, Tensor]) -> Tensor:
    x, y = of
    return (model(x) - y).square().mean()


class Tiny:
    """The run, step by step."""

    def __init__(self, policy: Any, steps: int, *, model: PeftModel | None = None, **options: Any):
        self.model = (model if model is not None else tiny()).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-2)
        self.flow = rankflow.attach(self.model, self.optimizer, policy, total_steps=steps, loss_fn=loss, **options)

    def backward_and_step(self) -> None:
        loss(self.model, batch(self.flow.step)).backward()
        self.flow.before_step()
        self.optimizer.step()

    def step(self) -> None:
        self.backward_and_step()
        self.flow.after_step()
        self.optimizer.zero_grad()

    def until(self, step: int) -> Tiny:
        while self.flow.step < step:
            self.step()
        return self

    def end(self) -> dict[str, Any]:
        """Everything that the run has come to, but for how long it took."""
        state = self.flow.state_dict()
        return {
            "weights": {n: p.detach().clone() for n, p in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "flow": {k: v for k, v in state.items() if k not in ("ledger", "checksum")},
            "events": timeless(state["ledger"]),
        }


def timeless(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k not in ("seconds", "time")} for event in events]


def resumed(folder: Path, policy: Any, steps: int, **options: Any) -> Tiny:
    """The run that goes on from what `saved` wrote there."""
    model = tiny()
    rankflow.restore(model, folder)
    kept = torch.load(folder / "run.pt", weights_only=True)
    run = Tiny(policy, steps, model=model, state=kept["flow"], **options)
    run.optimizer.load_state_dict(kept["optimizer"])
    return run


def save(run: Tiny, folder: Path) -> None:
    run.model.save_pretrained(folder)
    torch.save({"optimizer": run.optimizer.state_dict(), "flow": run.flow.state_dict()}, folder / "run.pt")


@pytest.fixture(autouse=True)
def compiled_code_of_nobody_else() -> Iterator[None]:
    """For every test of a module that imports it."""
    gc.collect()  # runs that other tests gave up may still listen, and keep compiled code eager
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
