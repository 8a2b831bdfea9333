"""What the controller costs: step time over plain PEFT LoRA at the same ranks, on all-MiniLM-L6-v2 and real reviews.

Every managed arm has a shadow: the same model without a controller, whose ranks follow, resized outside of the clock.
All arms are timed step by step, interleaved, on the same batches. Run: python examples/benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from harness import console, forget_peak, interleave, interval, machine, ratio_of_sums, resident, table
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import rankflow
from data import LINEARS, minilm_classifier, reviews

Batch = dict[str, torch.Tensor]
WARM = 5  # steps


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

    def __init__(self, rank: int, batches: list[Batch], policy: Any, steps: int, shadow: bool = True):
        super().__init__(rank, batches)
        self.flow = rankflow.attach(self.model, self.optimizer, policy, total_steps=steps)
        self.shadow = Plain(rank, batches) if shadow else self
        self.followed = self.flow.layout.ranks
        self.seconds: list[float] = []  # inside the controller, per step

    def __call__(self, i: int) -> None:
        self.backward_and_step(i)
        began = time.perf_counter()
        self.flow.after_step()
        self.seconds[-1] += time.perf_counter() - began
        self.optimizer.zero_grad()

    def backward_and_step(self, i: int) -> None:
        self.model(**self.batches[i % len(self.batches)]).loss.backward()
        began = time.perf_counter()
        self.flow.before_step()
        self.seconds.append(time.perf_counter() - began)
        self.optimizer.step()

    def follow(self) -> None:
        if self.flow.layout.ranks != self.followed:
            self.followed = self.flow.layout.ranks
            rankflow.resize(self.shadow.model, self.followed, self.shadow.optimizer)


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


def run(name: str, arm: Plain, base: Plain, steps: int) -> tuple[list[float], list[float]]:
    """Times of `arm` and `base` over `steps` interleaved steps, of which the first few only warm both up."""
    if isinstance(arm, Managed):
        arm.follow()
    times: dict[str, list[float]] = {"arm": [], "base": []}
    with console.status(name) as status:
        for i in range(steps):
            for key, seconds in interleave({"arm": arm, "base": base}, 1, seed=i, start=i).items():
                times[key] += seconds if i >= WARM else []
            if isinstance(arm, Managed):
                arm.follow()
            status.update(f"{name}: step {i + 1}/{steps}")
    return times["arm"], times["base"]


def memory(which: str, options: argparse.Namespace, batches: list[Batch]) -> None:
    """In a process of its own: one run's peak resident memory and, per resize, what it took for a moment, as JSON."""
    steps, rank = options.steps // 4, options.rank
    squeeze = {"policy": "squeeze", "budget": {"mean_rank": rank // 2}, "when": {"every": "10%"}}
    arm = Managed(rank, batches, squeeze, steps, shadow=False) if which == "managed" else Plain(rank, batches)
    peak, transients = 0, []
    for i in range(steps):
        if isinstance(arm, Managed):
            arm.backward_and_step(i)
            peak, before, version = max(peak, resident("VmHWM")), resident("VmRSS"), arm.flow.version
            forget_peak()
            arm.flow.after_step()
            if arm.flow.version > version:
                transients.append(resident("VmHWM") - before)
            arm.optimizer.zero_grad()
        else:
            arm(i)
    print(json.dumps({"peak": max(peak, resident("VmHWM")), "transients": transients}))


def compare_memory(options: argparse.Namespace) -> None:
    found = {}
    for which in ("fixed", "managed"):
        command = [sys.executable, __file__, "--memory", which, "--steps", str(options.steps)]
        command += ["--batch", str(options.batch), "--rank", str(options.rank)]
        with console.status(f"memory: {which}"):
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[which] = json.loads(printed.splitlines()[-1])
    transients = found["managed"]["transients"]
    console.print(
        f"Peak memory of a run squeezed from rank {options.rank}: {found['managed']['peak'] / 1024:.0f} MB, of LoRA "
        f"fixed at it {found['fixed']['peak'] / 1024:.0f} MB: ratio "
        f"{found['managed']['peak'] / found['fixed']['peak']:.3f} (limit 1.05). "
        f"Resizes took for a moment, in MB: {', '.join(f'{t / 1024:.1f}' for t in transients)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="arms whose name holds one of these words"
    )
    parser.add_argument("--memory", choices=["fixed", "managed"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    steps, rank = options.steps, options.rank
    short = max(20, steps // 2)

    loader = DataLoader(
        reviews()[0], batch_size=options.batch, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    batches = [b for b, _ in zip(loader, range(100), strict=False)]
    if options.memory:
        memory(options.memory, options, batches)
        return

    squeeze = {
        "policy": "squeeze",
        "budget": {"mean_rank": rank // 2},
        "when": {"every": "10%"},
        "params": {"allocate": "uniform"},
    }
    exact = {
        "policy": "increlora",
        "budget": {"mean_rank": 2 * rank},
        "params": {"window": "all", "score_fraction": 1.0},
    }
    idle = Managed(rank, batches, {"policy": "hold"}, short)
    annealed = Managed(rank, batches, squeeze, short)
    arms: list[tuple[str, Plain, int, str]] = [
        ("A/A: plain over plain", Plain(rank, batches), short, ""),
        ("idle steps (hold)", idle, short, "1.01 + A/A"),
        ("squeeze lifecycle", annealed, short, "1.02"),
        ("increlora, shipped defaults", Managed(2, batches, "increlora", steps), steps, "1.05"),
        ("increlora, exact score every step", Managed(rank, batches, exact, short), short, "reported"),
        ("PEFT AdaLoRA over LoRA", AdaLora(rank, batches, short), short, "reported"),
        (f"annealed to {rank // 2} over born at {rank // 2}", annealed, short // 2, "1 in interval"),
    ]
    rows = []
    for name, arm, n, limit in arms:
        if options.only and not any(word in name for word in options.only):
            continue
        event = "-"
        if name.startswith("annealed"):
            annealed.flow.detach()
            a, b = run(name, annealed, Plain(rank // 2, batches), n)
        else:
            a, b = run(name, arm, arm.shadow if isinstance(arm, Managed) else Plain(rank, batches), n)
            ledger = arm.flow.ledger.events if isinstance(arm, Managed) else []
            events = [e["seconds"] for e in ledger if e["event"] == "resize"]
            event = f"{max(events) / (sum(b) / len(b)):.2f}" if events else "-"
        value, low, high = ratio_of_sums(a, b)
        rows.append((name, str(n), f"{value:.3f}", f"{low:.3f} to {high:.3f}", limit, event))
    table(
        f"Step time over plain PEFT LoRA at the same ranks ({machine()})",
        ("arm", "steps", "ratio", "95 % interval", "limit", "dearest resize, in steps"),
        rows,
    )
    if idle.seconds:
        median, low, high = interval([1e6 * s for s in idle.seconds[WARM:]])
        console.print(f"Controller on an idle step: {median:.1f} microseconds ({low:.1f} to {high:.1f}; limit 100)")
    if not options.only:
        compare_memory(options)


if __name__ == "__main__":
    main()
