"""What a resize does to the loss, cause by cause, on all-MiniLM-L6-v2 and real reviews.

A run is trained for a while with AdamW; from that very state, each arm resizes and goes on for some steps on the same
batches, and the evaluation loss is compared, step by step, with the run that was not resized. Four questions:

(i)   truncation: what a cut costs at once, the same for every arm, beside what the spectrum said it would;
(ii)  state: what it costs to lose optimizer state, where the function does not change at all;
(iii) shrinking for real: transported state against state started afresh, with and without a re-warm;
(iv)  growth: against not growing, for each way of seeding the second moments of new directions.

Run: python examples/benchmarks/resize_bump.py
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from harness import console, machine, table
from peft import LoraConfig, get_peft_model
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from data import LINEARS, minilm_classifier, reviews
from rankflow.adapters import Adapter
from rankflow.linalg import spectrum
from rankflow.plan import Grow, Keep, RankPlan, Refactor
from rankflow.surgeon import Surgeon

Batch = dict[str, torch.Tensor]
SEEDINGS = ("siblings", "mean", "zero")


@dataclass
class Setup:
    """Where every arm of one seed starts from."""

    state: dict[str, Any]
    optimizer: dict[str, Any]
    train: list[Batch]
    held_out: list[Batch]
    rank: int


class Run:
    """A model with its optimizer and surgeon, at the state a `Setup` holds."""

    def __init__(self, rank: int, setup: Setup | None = None, lr: float = 1e-3, **surgeon: Any):
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
        self.model = get_peft_model(minilm_classifier(), config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        if setup is not None:
            self.model.load_state_dict(setup.state, strict=False)
            self.optimizer.load_state_dict(copy.deepcopy(setup.optimizer))
        self.adapter = Adapter(self.model)
        self.surgeon = Surgeon(self.adapter, self.optimizer, **surgeon)

    def step(self, batch: Batch, seed: int) -> None:
        torch.manual_seed(seed)
        self.model(**batch).loss.backward()
        self.surgeon.ramps.before_step()
        self.optimizer.step()
        self.surgeon.ramps.after_step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def loss(self, held_out: list[Batch]) -> float:
        self.model.eval()
        value = float(np.mean([self.model(**b).loss.item() for b in held_out]))
        self.model.train()
        return value


def prepare(seed: int, rank: int, options: argparse.Namespace, dead: int = 0) -> Setup:
    """Train for a while; with `dead`, that many directions of every module are zero from the start and stay so."""
    train, held_out = reviews()
    loader = DataLoader(train, options.batch, shuffle=True, generator=torch.Generator().manual_seed(seed))
    batches = [b for b, _ in zip(loader, range(options.before + options.steps), strict=False)]
    run = Run(rank)
    if dead:
        with torch.no_grad():
            for site in run.adapter.sites.values():
                site.A[-dead:] = 0
                site.B[:, -dead:] = 0
    for i, batch in enumerate(batches[: options.before]):
        run.step(batch, seed * 10_000 + i)
    return Setup(
        {n: t.detach().clone() for n, t in run.model.state_dict().items() if "lora_" in n or "classifier" in n},
        copy.deepcopy(run.optimizer.state_dict()),
        batches[options.before :],
        list(DataLoader(Subset(held_out, range(options.eval)), 64)),
        rank,
    )


Event = Callable[[Run], None]


def follow(setup: Setup, event: Event | None, seed: int, **surgeon: Any) -> list[float]:
    """Evaluation loss right after the event, then after each step."""
    run = Run(setup.rank, setup, **surgeon)
    if event is not None:
        event(run)
    losses = [run.loss(setup.held_out)]
    for i, batch in enumerate(setup.train):
        run.step(batch, seed * 10_000 + 5_000 + i)
        losses.append(run.loss(setup.held_out))
    return losses


def cut(k: int, **state: Any) -> Event:
    """Every module to its best rank k (its present rank: a change of basis and nothing else)."""

    def event(run: Run) -> None:
        ops = {}
        for name, site in run.adapter.sites.items():
            found = spectrum(site.a().detach(), site.b().detach(), site.scaling).cut(k)
            ops[name] = (Refactor(found.N, found.M), *([Grow(found.fresh)] if found.fresh else []))
        run.surgeon.apply(RankPlan(ops, "cut", **state))

    return event


def keep(n: int, **state: Any) -> Event:
    def event(run: Run) -> None:
        run.surgeon.apply(RankPlan({m: (Keep(tuple(range(n))),) for m in run.adapter.sites}, "keep", **state))

    return event


def zeroed(event: Event) -> Event:
    """The same event, then all moments set to zero under the old step count, as naive code does."""

    def naive(run: Run) -> None:
        event(run)
        for p in run.adapter.parameters():
            for value in run.optimizer.state[p].values():
                if torch.is_tensor(value) and value.shape == p.shape:
                    value.zero_()

    return naive


def grow(n: int) -> Event:
    def event(run: Run) -> None:
        run.surgeon.apply(RankPlan({m: (Grow(n),) for m in run.adapter.sites}, "grow"))

    return event


def worst_excess(arm: list[float], base: list[float]) -> float:
    return max(a - b for a, b in zip(arm[1:], base[1:], strict=True))


def truncation(setup: Setup, k: int) -> tuple[float, float, float]:
    """(loss change, predicted relative change of all DeltaW, the same as measured)."""
    run = Run(setup.rank, setup)
    before = run.loss(setup.held_out)
    dense, spectra = {}, {}
    for name, site in run.adapter.sites.items():
        dense[name] = site.scaling * site.b().detach().double() @ site.a().detach().double()
        spectra[name] = spectrum(site.a().detach(), site.b().detach(), site.scaling)
    cut(k)(run)
    change = sum(
        float((dense[n] - s.scaling * s.b().detach().double() @ s.a().detach().double()).square().sum())
        for n, s in run.adapter.sites.items()
    )
    size = sum(float(d.square().sum()) for d in dense.values())
    predicted = sum(s.error(k) ** 2 for s in spectra.values())
    return run.loss(setup.held_out) - before, math.sqrt(predicted / size), math.sqrt(change / size)


def growth(setup: Setup, n: int, seed: int, seeding: str, warmup: int) -> tuple[list[float], float, float]:
    """(losses, steps until new directions carry 5 % of |DeltaW|, worst single update of a new entry in units of lr)."""
    run = Run(setup.rank, setup, seed_v=seeding, warmup=warmup, seed=seed)
    lr = run.optimizer.param_groups[0]["lr"]
    grow(n)(run)
    losses, reached, overshoot = [run.loss(setup.held_out)], math.inf, 0.0
    for i, batch in enumerate(setup.train):
        before = [s.b()[..., -n:].detach().clone() for s in run.adapter.sites.values()]
        run.step(batch, seed * 10_000 + 5_000 + i)
        losses.append(run.loss(setup.held_out))
        moved = max(
            float((s.b().detach()[..., -n:] - b).abs().max())
            for s, b in zip(run.adapter.sites.values(), before, strict=True)
        )
        overshoot = max(overshoot, moved / lr)
        new = sum(
            float((s.b().detach()[..., -n:] @ s.a().detach()[-n:]).square().sum()) for s in run.adapter.sites.values()
        )
        everything = sum(float((s.b().detach() @ s.a().detach()).square().sum()) for s in run.adapter.sites.values())
        if reached == math.inf and math.sqrt(new / everything) >= 0.05:
            reached = i + 1
    return losses, reached, overshoot


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def arms(rewarm: int, half: int, rank: int) -> Iterator[tuple[str, str, Event]]:
    """(question, arm, event) of everything that is compared with the run that was not resized."""
    yield "ii: change of basis", "transport", cut(rank)
    yield "ii: change of basis", "reset", cut(rank, state="reset")
    yield "ii: change of basis", "zero moments, old step", zeroed(cut(rank))
    yield "iii: rank halved", "transport", cut(half)
    yield "iii: rank halved", "reset", cut(half, state="reset")
    yield "iii: rank halved", f"reset, re-warm {rewarm}", cut(half, state="reset", rewarm=rewarm)


@dataclass
class Outcome:
    """What one seed showed."""

    excess: dict[tuple[str, str], tuple[float, float]]  # (question, arm) -> excess loss at the worst and the last step
    cut: tuple[float, float, float]
    reached: dict[str, float]
    overshoot: dict[str, float]


def measure(seed: int, options: argparse.Namespace) -> Outcome:
    """Every arm from the same trained state, one seed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank, half = options.rank, options.rank // 2
    found = Outcome({}, (0.0, 0.0, 0.0), {}, {})

    def note(question: str, arm: str, losses: list[float], base: list[float]) -> None:
        found.excess[question, arm] = worst_excess(losses, base), losses[-1] - base[-1]

    setup = prepare(seed, rank, options)
    base = follow(setup, None, seed)
    found.cut = truncation(setup, half)
    for question, arm, event in arms(options.rewarm, half, rank):
        note(question, arm, follow(setup, event, seed), base)
    for seeding in SEEDINGS:
        losses, steps, peak = growth(setup, rank // 2, seed, seeding, warmup=options.rewarm)
        note("iv: half as much again", f"v seeded by {seeding}", losses, base)
        found.reached[seeding], found.overshoot[seeding] = steps, peak
    with_dead = prepare(seed, rank + 2, options, dead=2)
    base = follow(with_dead, None, seed)
    removals = {
        "transport": keep(rank),
        "reset": keep(rank, state="reset"),
        "zero moments, old step": zeroed(keep(rank)),
    }
    for arm, event in removals.items():
        note("ii: zero directions removed", arm, follow(with_dead, event, seed), base)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--before", type=int, default=60, help="steps before the event")
    parser.add_argument("--steps", type=int, default=20, help="steps after it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eval", type=int, default=64, help="held-out reviews")
    parser.add_argument("--rewarm", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, one thread each")
    options = parser.parse_args()

    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(measure, range(options.seeds), [options] * options.seeds)
        outcomes += track(done, "seeds", total=options.seeds, console=console)

    table(
        f"(i) Truncation {options.rank} -> {options.rank // 2}, at once, {options.seeds} seeds ({machine()})",
        ("", "change of loss", "predicted |change| / |DeltaW|", "measured"),
        [("all arms alike", *(spread([o.cut[i] for o in outcomes], 6 if i else 4) for i in range(3)))],
    )
    table(
        f"Excess evaluation loss over the run that was not resized, {options.steps} steps, mean ± standard error",
        ("question", "arm", "worst step", "last step"),
        [
            (*key, *(spread([o.excess[key][i] for o in outcomes], 5) for i in range(2)))
            for key in sorted(outcomes[0].excess)
        ],
    )
    table(
        "(iv) New directions",
        ("v seeded by", "steps until they carry 5 % of |DeltaW|", "largest update of an entry, in lr"),
        [
            (
                seeding,
                ", ".join("-" if o.reached[seeding] == math.inf else f"{o.reached[seeding]:.0f}" for o in outcomes),
                spread([o.overshoot[seeding] for o in outcomes], 2),
            )
            for seeding in SEEDINGS
        ],
    )


if __name__ == "__main__":
    main()
