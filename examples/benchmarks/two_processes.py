"""What the controller costs over two processes on CPUs, over gloo: step time over plain PEFT LoRA under
DistributedDataParallel at the same ranks, and how long a resize of all modules of an adapter of 7B shape takes.

As in overhead.py every managed arm has a shadow whose ranks follow outside of the clock, and all are timed step by
step, interleaved, on the same batches; both processes wait for one another in every step, so one of them tells.

Run: python examples/benchmarks/two_processes.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import console, interleave, interval, machine, ratio_of_sums, table
from overhead import WARM, Batch, Plain
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import rankflow
from data import reviews
from rankflow.distributed.ddp import rebuild
from rankflow.linalg.decompose import spectrum
from rankflow.plans.ops import Refactor
from rankflow.plans.plan import RankPlan

SIZE = 2
MODULES, WIDTH, RANK, TARGET = 224, 4096, 16, 8


class Replica(Plain):
    """One of the processes' copies; a call is one training step of all of them."""

    def __init__(self, rank: int, batches: list[Batch]):
        super().__init__(rank, batches)
        self.ddp = DistributedDataParallel(self.model)

    def __call__(self, i: int) -> None:
        self.ddp(**self.batches[i % len(self.batches)]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class ManagedReplica(Replica):
    """The same with a controller; `shadow` follows its ranks."""

    def __init__(self, rank: int, batches: list[Batch], policy: Any, steps: int):
        super().__init__(rank, batches)
        self.flow = rankflow.attach(self.ddp, self.optimizer, policy, total_steps=steps)
        self.shadow = Replica(rank, batches)
        self.followed = self.flow.layout.ranks

    def __call__(self, i: int) -> None:
        self.ddp(**self.batches[i % len(self.batches)]).loss.backward()
        self.flow.before_step()
        self.optimizer.step()
        self.flow.after_step()
        self.optimizer.zero_grad()

    def follow(self) -> None:
        if self.flow.layout.ranks != self.followed:
            self.followed = self.flow.layout.ranks
            rankflow.resize(self.shadow.model, self.followed, self.shadow.optimizer)
            rebuild(self.shadow.ddp)


def steps(options: argparse.Namespace, leads: bool) -> None:
    loader = DataLoader(
        reviews()[0], batch_size=options.batch, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    batches = [b for b, _ in zip(loader, range(100), strict=False)][dist.get_rank() :: SIZE]
    rows = []
    for name, policy, rank, limit in (
        ("idle steps (hold)", {"policy": "hold"}, 8, "1.01"),
        ("increlora, shipped defaults", "increlora", 2, "1.03"),
    ):
        arm = ManagedReplica(rank, batches, policy, options.steps)
        arm.follow()
        times: dict[str, list[float]] = {"arm": [], "base": []}
        for i in range(options.steps):
            for key, seconds in interleave({"arm": arm, "base": arm.shadow}, 1, seed=i, start=i).items():
                times[key] += seconds if i >= WARM else []
            arm.follow()
            if leads and i % 10 == 0:
                console.print(f"[dim]{name}: step {i}/{options.steps}[/dim]")
        events = [e["seconds"] for e in arm.flow.ledger.events if e["event"] == "resize"]
        mean = sum(times["base"]) / len(times["base"])
        value, low, high = ratio_of_sums(times["arm"], times["base"])
        dearest = f"{max(events) / mean:.2f}" if events else "-"
        rows.append((name, str(options.steps), f"{value:.3f}", f"{low:.3f} to {high:.3f}", limit, dearest))
        arm.flow.finish()
    if leads:
        columns = ("arm", "steps", "ratio", "95 % interval", "limit", "dearest resize, in steps")
        table(f"{SIZE} processes: step time over plain PEFT LoRA under DDP ({machine()})", columns, rows)


def large(modules: int, width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An adapter of that many linears without a base, one optimizer step old."""
    with torch.device("meta"):
        base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(modules)))
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[str(i) for i in range(modules)])
        model = get_peft_model(base, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    factors = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.requires_grad:
            drawn = torch.randn(weight.shape, generator=generator) / width**0.5
            module._parameters["weight"] = p = nn.Parameter(drawn)
            p.grad = torch.full_like(p, 1e-3)
            factors.append(p)
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def squeezed(flow: rankflow.Controller) -> RankPlan:
    """Every module cut to the target rank by its weights."""
    ops = {}
    for name, site in flow._adapter.sites.items():
        cut = spectrum(site.a().detach(), site.b().detach(), site.scaling).cut(TARGET, "nearest")
        ops[name] = [Refactor(cut.N, cut.M)]
    return RankPlan(ops, "all of them")


def resizes(options: argparse.Namespace, leads: bool) -> None:
    found: dict[str, list[float]] = {"agreement": [], "surgery": [], "both": []}
    for _ in range(options.repeats):
        model, optimizer = large(options.modules, options.width)
        flow = rankflow.attach(model, optimizer, {"policy": "hold"}, total_steps=10)
        plan = squeezed(flow)
        dist.barrier()
        began = time.perf_counter()
        agreed = flow._processes.agree(partial(RankPlan, plan.ops, plan.reason), flow.layout, flow.step)
        middle = time.perf_counter()
        flow._phases.operations.perform(agreed, flow._phases.now)
        end = time.perf_counter()
        for key, seconds in zip(found, (middle - began, end - middle, end - began), strict=True):
            found[key].append(seconds)
        flow.detach()
    if leads:
        rows = [
            (key, *(f"{x:.2f}" for x in interval(seconds)), "<= 1" if key == "both" else "")
            for key, seconds in found.items()
        ]
        shape = f"{options.modules} modules, {options.width} wide, rank {RANK} to {TARGET}"
        table(
            f"{SIZE} processes: seconds that a resize takes, of {shape}, with AdamW",
            ("", "median", "low", "high", "limit"),
            rows,
        )


def child(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    if options.steps:
        steps(options, rank == 0)
    resizes(options, rank == 0)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=240, help="0 leaves step times out")
    parser.add_argument("--batch", type=int, default=8, help="of each process")
    parser.add_argument("--modules", type=int, default=MODULES)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(child, (str(Path(folder)), options), nprocs=SIZE)


if __name__ == "__main__":
    main()
