"""What the controller costs: step time over plain PEFT LoRA at the same ranks, on all-MiniLM-L6-v2 and real reviews.

Every managed arm has a shadow: the same model without a controller, whose ranks follow, resized outside of the clock.
All arms are timed step by step, interleaved, on the same batches. Run: python examples/benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import console, interleave, interval, machine, ratio_of_sums, table
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import rankflow
from data import LINEARS, minilm_classifier, reviews

Batch = dict[str, torch.Tensor]


class Plain:
    """MiniLM with PEFT LoRA and AdamW; a call is one training step."""

    def __init__(self, rank: int, batches: list[Batch], config: LoraConfig | None = None):
        config = config or LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
        torch.manual_seed(0)
        self.model = get_peft_model(minilm_classifier(), config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-4)
        self.batches = batches

    def __call__(self, i: int) -> None:
        self.model(**self.batches[i % len(self.batches)]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Managed(Plain):
    """The same with a controller; `shadow` follows its ranks."""

    def __init__(self, rank: int, batches: list[Batch], policy: Any, steps: int):
        super().__init__(rank, batches)
        self.flow = rankflow.attach(self.model, self.optimizer, policy, total_steps=steps)
        self.shadow = Plain(rank, batches)
        self.seconds: list[float] = []  # inside the controller, per step

    def __call__(self, i: int) -> None:
        self.model(**self.batches[i % len(self.batches)]).loss.backward()
        began = time.perf_counter()
        self.flow.before_step()
        paused = time.perf_counter()
        self.optimizer.step()
        resumed = time.perf_counter()
        self.flow.after_step()
        self.seconds.append(time.perf_counter() - resumed + paused - began)
        self.optimizer.zero_grad()

    def follow(self) -> None:
        if self.flow.layout.ranks != (seen := getattr(self, "_followed", None)):
            self._followed = self.flow.layout.ranks
            if seen is not None:
                rankflow.resize(self.shadow.model, self._followed, self.shadow.optimizer)


class AdaLora(Plain):
    """PEFT's AdaLoRA: scores on every step, masks at init_r, never shrinks a tensor."""

    def __init__(self, rank: int, batches: list[Batch], steps: int):
        config = AdaLoraConfig(
            task_type="SEQ_CLS",
            init_r=rank,
            target_r=rank // 2,
            lora_alpha=2 * rank,
            target_modules=LINEARS,
            tinit=steps // 10,
            tfinal=steps // 5,
            deltaT=max(1, steps // 20),
            total_step=steps,
        )
        super().__init__(rank, batches, config)

    def __call__(self, i: int) -> None:
        self.model(**self.batches[i % len(self.batches)]).loss.backward()
        self.optimizer.step()
        self.model.base_model.update_and_allocate(i)
        self.optimizer.zero_grad()


def run(name: str, arm: Plain, base: Plain, steps: int, warm: int = 3) -> tuple[str, list[float], list[float]]:
    """Times of `arm` and `base` over `steps` interleaved steps, after a few unrecorded ones of the base alone."""
    for i in range(warm):
        base(i)
    if isinstance(arm, Managed):
        arm.follow()
    times: dict[str, list[float]] = {"arm": [], "base": []}
    with console.status(name) as status:
        for i in range(steps):
            for key, seconds in interleave({"arm": arm, "base": base}, 1, seed=i, start=i).items():
                times[key] += seconds
            if isinstance(arm, Managed):
                arm.follow()
            status.update(f"{name}: step {i + 1}/{steps}")
    return name, times["arm"], times["base"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the table's numbers as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    steps, rank = options.steps, options.rank
    short = max(20, steps // 2)

    loader = DataLoader(
        reviews()[0], batch_size=options.batch, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    batches = [b for b, _ in zip(loader, range(100), strict=False)]
    squeeze = {"policy": "squeeze", "budget": {"mean_rank": rank // 2}, "when": {"every": "10%"}}
    exact = {
        "policy": "increlora",
        "budget": {"mean_rank": 2 * rank},
        "params": {"window": "all", "score_fraction": 1.0},
    }
    idle = Managed(rank, batches, {"policy": "hold"}, short)
    arms: list[tuple[str, Plain, int, str]] = [
        ("A/A: plain over plain", Plain(rank, batches), short, ""),
        ("idle steps (hold)", idle, short, "1.01 + A/A"),
        ("squeeze lifecycle", Managed(rank, batches, squeeze, short), short, "1.02"),
        ("increlora, shipped defaults", Managed(2, batches, "increlora", steps), steps, "1.05"),
        ("increlora, exact score every step", Managed(rank, batches, exact, short), short, "reported"),
        ("PEFT AdaLoRA over LoRA", AdaLora(rank, batches, short), short, "reported"),
    ]
    rows = []
    for name, arm, n, limit in arms:
        base = arm.shadow if isinstance(arm, Managed) else Plain(rank, batches)
        _, a, b = run(name, arm, base, n)
        value, low, high = ratio_of_sums(a, b)
        event = "-"
        if isinstance(arm, Managed):
            events = [e["seconds"] for e in arm.flow.ledger.events if e["event"] == "resize"]
            if events:
                event = f"{max(events) / (sum(b) / len(b)):.2f}"
        rows.append((name, str(n), f"{value:.3f}", f"{low:.3f} to {high:.3f}", limit, event))
    table(
        f"Step time over plain PEFT LoRA at the same ranks ({machine()})",
        ("arm", "steps", "ratio", "95 % interval", "limit", "dearest resize, in steps"),
        rows,
    )
    median, low, high = interval([1e6 * s for s in idle.seconds])
    console.print(f"Controller on an idle step: {median:.1f} microseconds ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
