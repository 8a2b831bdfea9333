"""What a resize does to a run, cause by cause, on all-MiniLM-L6-v2 and real reviews.

A run is trained for a while with AdamW, its learning rate falling; from that very state, each arm resizes and goes on
on the same batches, and is compared with the run that was not resized. Four questions:

(i)   truncation: what a cut costs at once, the same for every arm, beside what the spectrum said it would;
(ii)  state: what it costs to lose optimizer state, where the function does not change at all;
(iii) shrinking for real: transported state against state started afresh, with and without a re-warm;
(iv)  growth: against not growing, for each way of seeding the second moments of new directions.

Two measures. Excess loss on held-out reviews: averaged over seeds first, then taken at its worst step, as the worst
step of each seed is biased upwards by noise. Distance: |move - move of the run that was not resized| over the latter,
where a move is how far all DeltaW got since the event; it hardly has noise.

Run: python examples/benchmarks/resize_bump.py
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from harness import console, interval, machine, table
from peft import LoraConfig, get_peft_model
from rich.progress import track
from torch import Tensor

from data import LINEARS, Reviews, minilm_classifier, reviews
from rankflow.linalg.decompose import spectrum
from rankflow.linalg.spectrum import Gauge
from rankflow.lora.adapter import Adapter
from rankflow.plans.ops import Grow, Keep, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon

Batch = dict[str, Tensor]
Products = dict[tuple[str, str], Tensor]  # module, factor -> running average of g_i g_j [r, r, n] over its directions
SEEDINGS = ("siblings", "mean", "zero")
BEND = (1, 3, 8, 14, 20)  # steps after the event at which the loss is evaluated
BETA2 = 0.999


@dataclass
class Setup:
    """Where every arm of one seed starts from."""

    state: dict[str, Tensor]
    optimizer: dict[str, Any]
    train: list[Batch]
    held_out: list[Batch]
    rank: int
    seed: int
    options: argparse.Namespace
    products: Products


@dataclass
class Trace:
    """What one arm did: held-out loss by step, and DeltaW minus DeltaW at the event after the first and last BEND."""

    loss: dict[int, float] = field(default_factory=dict)
    moves: list[list[Tensor]] = field(default_factory=list)
    reached: float = math.inf
    overshoot: float = 0.0


class Run:
    """A model with its optimizer and surgeon, at the state a `Setup` holds."""

    def __init__(self, rank: int, setup: Setup | None = None, sgd: bool = False, **surgeon: Any):
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
        self.model = get_peft_model(minilm_classifier(), config).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, momentum=0.9) if sgd else torch.optim.AdamW(trained)
        if setup is not None:
            self.model.load_state_dict(setup.state, strict=False)
            self.optimizer.load_state_dict(copy.deepcopy(setup.optimizer))
        self.adapter = Adapter(self.model)
        self.surgeon = Surgeon(self.adapter, self.optimizer, **surgeon)

    def step(self, batch: Batch, seed: int, lr: float, products: Products | None = None) -> None:
        torch.manual_seed(seed)
        self.model(**batch).loss.backward()
        if products is not None:
            for name, site in self.adapter.sites.items():
                for role, g in (("A", site.a().grad), ("B", site.b().grad.mT)):
                    now = g[:, None] * g[None]
                    products[name, role] = products.get((name, role), 0 * now).lerp(now, 1 - BETA2)
        self.optimizer.param_groups[0]["lr"] = lr
        self.surgeon.ramps.before_step()
        self.optimizer.step()
        self.surgeon.ramps.after_step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def loss(self, held_out: list[Batch]) -> float:
        self.model.eval()
        sizes = [len(b["labels"]) for b in held_out]
        value = float(np.average([self.model(**b).loss.item() for b in held_out], weights=sizes))
        self.model.train()
        return value

    def dense(self) -> list[Tensor]:
        return [s.scaling * s.b().detach() @ s.a().detach() for s in self.adapter.sites.values()]


def short(data: Reviews, tokens: int) -> Tensor:
    """Which reviews have at most so many tokens."""
    return torch.nonzero(data.encoded["attention_mask"].sum(1) <= tokens)[:, 0]


def batch(data: Reviews, at: Tensor) -> Batch:
    """Those reviews, padded to the longest of them."""
    longest = int(data.encoded["attention_mask"][at].sum(1).max())
    return {**{k: v[at, :longest] for k, v in data.encoded.items()}, "labels": data.labels[at]}


def rate(step: int, options: argparse.Namespace) -> float:
    """Learning rate: from 1e-3 in a straight line to 0 at the end of the run."""
    return 1e-3 * (1 - step / options.total)


def prepare(seed: int, options: argparse.Namespace, sgd: bool = False) -> Setup:
    """Train for a while, every review seen once. Other reviews are held out for every seed, so that the spread over
    seeds is also that over reviews."""
    data, _ = reviews(100)
    usable = short(data, options.tokens)
    usable = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))]
    trained_on, rest = usable.split([n := options.batch * (options.before + options.long), len(usable) - n])
    batches = [batch(data, at) for at in trained_on.split(options.batch)]
    at = rest[: options.eval]
    at = at[data.encoded["attention_mask"][at].sum(1).argsort()]
    run, products = Run(options.rank, sgd=sgd), {}
    for i, b in enumerate(batches[: options.before]):
        run.step(b, seed * 10_000 + i, 0.1 if sgd else rate(i, options), products)
    trained = {n: t.detach().clone() for n, t in run.model.state_dict().items() if "lora_" in n or "classifier" in n}
    state = copy.deepcopy(run.optimizer.state_dict())
    held = [batch(data, part) for part in at.split(32)]
    return Setup(trained, state, batches[options.before :], held, options.rank, seed, options, products)


def padded(setup: Setup, dead: int) -> Setup:
    """The same run with `dead` more directions in every module, that are and stay exactly zero."""
    ours, theirs = Run(setup.rank, setup), Run(setup.rank + dead)
    grown = theirs.model.state_dict()

    def pad(t: Tensor, like: Tensor) -> Tensor:
        out = torch.zeros_like(like)
        out[tuple(slice(n) for n in t.shape)] = t
        return out

    state = {n: pad(t, grown[n]) for n, t in setup.state.items()}
    optimizer = copy.deepcopy(setup.optimizer)
    trained = [p for p in theirs.model.parameters() if p.requires_grad]
    for i, p in enumerate(trained):
        old = ours.optimizer.state_dict()["state"][i]
        optimizer["state"][i] = {k: pad(v, p) if v.shape else v for k, v in old.items()}
    return Setup(state, optimizer, setup.train, setup.held_out, setup.rank + dead, setup.seed, setup.options, {})


Event = Callable[[Run], None]


def follow(setup: Setup, event: Event | None, steps: int, sgd: bool = False, new: int = 0, **surgeon: Any) -> Trace:
    """Go on for some steps after the event, of whose directions the last `new` are watched."""
    run, trace = Run(setup.rank, setup, sgd, **surgeon), Trace()
    if event is not None:
        event(run)
    start, sites = run.dense(), run.adapter.sites.values()
    for i, b in enumerate(setup.train[:steps], start=1):
        before = [s.b().detach()[:, -new:].clone() for s in sites] if new else []
        lr = 0.1 if sgd else rate(setup.options.before + i, setup.options)
        run.step(b, setup.seed * 10_000 + 5_000 + i, lr)
        if not sgd and (i in BEND or i == steps):
            trace.loss[i] = run.loss(setup.held_out)
        if i in (BEND[0], BEND[-1]):
            trace.moves.append([now - then for now, then in zip(run.dense(), start, strict=True)])
        for s, then in zip(sites, before, strict=False):
            moved = float((s.b().detach()[:, -new:] - then).abs().max()) / lr
            trace.overshoot = max(trace.overshoot, moved)
        if new and trace.reached == math.inf:
            young = size(s.b().detach()[:, -new:] @ s.a().detach()[-new:] for s in sites)
            if young >= 0.05 * size(s.b().detach() @ s.a().detach() for s in sites):
                trace.reached = i
    return trace


def size(parts: Any) -> float:
    return math.sqrt(sum(float(p.double().square().sum()) for p in parts))


def cut(k: int, gauge: Gauge = "nearest", **state: Any) -> Event:
    """Every module to its best rank k (its present rank: a change of basis and nothing else)."""

    def event(run: Run) -> None:
        ops = {}
        for name, site in run.adapter.sites.items():
            found = spectrum(site.a().detach(), site.b().detach(), site.scaling).cut(k, gauge)
            ops[name] = (Refactor(found.N, found.M), *([Grow(found.fresh)] if found.fresh else []))
        run.surgeon.apply(RankPlan(ops, "cut", **state))

    return event


def keep(n: int, **state: Any) -> Event:
    def event(run: Run) -> None:
        run.surgeon.apply(RankPlan({m: (Keep(tuple(range(n))),) for m in run.adapter.sites}, "keep", **state))

    return event


def grow(n: int) -> Event:
    def event(run: Run) -> None:
        run.surgeon.apply(RankPlan({m: (Grow(n),) for m in run.adapter.sites}, "grow"))

    return event


def rotated(**state: Any) -> Event:
    """Every module in a basis turned at random, the one change of basis that plain SGD does not see."""

    def event(run: Run) -> None:
        g = torch.Generator().manual_seed(0)
        ops = {}
        for name, site in run.adapter.sites.items():
            Q = torch.linalg.qr(torch.randn(site.rank, site.rank, generator=g, dtype=torch.float64)).Q
            ops[name] = (Refactor(Q, Q.mT.contiguous()),)
        run.surgeon.apply(RankPlan(ops, "rotation", **state))

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


def true_second(k: int, gauge: Gauge, products: Products) -> Event:
    """The cut, with the second moments that gradients in the new basis have really had since the run began."""

    def event(run: Run) -> None:
        maps = {}
        for name, site in run.adapter.sites.items():
            maps[name] = spectrum(site.a().detach(), site.b().detach(), site.scaling).cut(k, gauge)
        cut(k, gauge)(run)
        for name, site in run.adapter.sites.items():
            N, M = maps[name].N.float(), maps[name].M.float()
            for role, p, map in (("A", site.a(), M), ("B", site.b(), N.mT)):
                v = torch.einsum("ip,jp,ijx->px", map, map, products[name, role]).clamp(min=0)
                run.optimizer.state[p]["exp_avg_sq"].copy_(v if role == "A" else v.mT)

    return event


def truncation(setup: Setup, k: int) -> tuple[float, float, float]:
    """(loss change, predicted relative change of all DeltaW, the same as measured)."""
    run = Run(setup.rank, setup)
    before, dense = run.loss(setup.held_out), run.dense()
    predicted = math.hypot(
        *(spectrum(s.a().detach(), s.b().detach(), s.scaling).error(k) for s in run.adapter.sites.values())
    )
    cut(k)(run)
    change = size(now - then for now, then in zip(run.dense(), dense, strict=True))
    return run.loss(setup.held_out) - before, predicted / size(dense), change / size(dense)


@dataclass
class Arm:
    """One arm of one seed, against the run that was not resized."""

    excess: dict[int, float]  # by step
    distance: list[float]  # after the first and the last step of BEND
    reached: float
    overshoot: float


@dataclass
class Outcome:
    """What one seed showed."""

    arms: dict[tuple[str, str], Arm]  # by question and arm
    cut: tuple[float, float, float]


Compared = tuple[str, str, Trace, Trace]  # question, arm, what it did, what the run that was not resized did


def losing_state(setup: Setup, base: Trace) -> Iterator[Compared]:
    """(ii), and the control."""
    r, short_of = setup.rank, BEND[-1]
    nearest, turned, removal = (
        f"ii: {what}" for what in ("nearest basis, rank kept", "sorted basis, rank kept", "zero directions removed")
    )
    yield nearest, "carried", follow(setup, cut(r), short_of), base
    yield turned, "carried", follow(setup, cut(r, "keep"), short_of), base
    yield turned, "true second moments", follow(setup, true_second(r, "keep", setup.products), short_of), base
    yield turned, "reset", follow(setup, cut(r, "keep", state="reset"), short_of), base
    yield turned, "zeroed", follow(setup, zeroed(cut(r, "keep")), short_of), base

    with_dead = padded(setup, 2)
    yield removal, "carried", follow(with_dead, keep(r), short_of), base
    yield removal, "reset", follow(with_dead, keep(r, state="reset"), short_of), base
    yield removal, "zeroed", follow(with_dead, zeroed(keep(r)), short_of), base

    control = "control: SGD with momentum, basis turned"
    plain = prepare(setup.seed, argparse.Namespace(**{**vars(setup.options), "before": 40}), sgd=True)
    base = follow(plain, None, short_of, sgd=True)
    yield control, "carried", follow(plain, rotated(), short_of, sgd=True), base
    yield control, "reset", follow(plain, rotated(state="reset"), short_of, sgd=True), base


def shrinking(setup: Setup, base: Trace) -> Iterator[Compared]:
    """(iii)"""
    half, long, rewarm = setup.rank // 2, setup.options.long, setup.options.rewarm
    question = "iii: rank halved"
    yield question, "carried, nearest basis", follow(setup, cut(half), long), base
    yield question, "carried, sorted basis", follow(setup, cut(half, "keep"), long), base
    yield question, "reset", follow(setup, cut(half, state="reset"), long), base
    rewarmed = cut(half, state="reset", rewarm=rewarm)
    yield question, f"reset, re-warm {rewarm}", follow(setup, rewarmed, long), base


def growth(setup: Setup, base: Trace) -> Iterator[Compared]:
    """(iv)"""
    half, long, warmup = setup.rank // 2, setup.options.long, setup.options.rewarm
    for v in SEEDINGS:
        young = follow(setup, grow(half), long, new=half, seed_v=v, warmup=warmup, seed=setup.seed)
        yield GROWTH, f"v seeded by {v}", young, base


GROWTH = "iv: half as much again"
QUESTIONS = {"ii": losing_state, "iii": shrinking, "iv": growth}


def measure(seed: int, options: argparse.Namespace) -> Outcome:
    """Every arm from the same trained state, one seed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    setup = prepare(seed, options)
    found = Outcome({}, truncation(setup, options.rank // 2))
    still = follow(setup, None, options.long)
    for question, arm, trace, base in chain.from_iterable(QUESTIONS[q](setup, still) for q in options.only):
        distance = [
            size(x - y for x, y in zip(ours, theirs, strict=True)) / size(theirs)
            for ours, theirs in zip(trace.moves, base.moves, strict=True)
        ]
        excess = {i: value - base.loss[i] for i, value in trace.loss.items()}
        found.arms[question, arm] = Arm(excess, distance, trace.reached, trace.overshoot)
    return found


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def report(outcomes: list[Outcome], options: argparse.Namespace) -> None:
    halves = f"{options.rank} -> {options.rank // 2}"
    table(
        f"(i) Truncation {halves}, at once, {len(outcomes)} seeds ({machine()})",
        ("", "change of loss", "predicted |change| / |DeltaW|", "measured"),
        [("all arms alike", *(spread([o.cut[i] for o in outcomes], 6 if i else 4) for i in range(3)))],
    )

    def curves(key: tuple[str, str]) -> np.ndarray:
        """[seeds, steps], up to the last of BEND."""
        return np.array([[o.arms[key].excess[i] for i in BEND] for o in outcomes])

    rows = []
    for key in outcomes[0].arms:
        arms = [o.arms[key] for o in outcomes]
        distance = [spread([a.distance[i] for a in arms], 3) for i in range(2)]
        losses = ["", "", ""]
        if arms[0].excess:
            values = curves(key)
            at = int(values.mean(0).argmax())
            last = max(arms[0].excess)
            losses = [
                f"{spread(values[:, at].tolist())} (step {BEND[at]})",
                spread(values.max(1).tolist()),
                f"{spread([a.excess[last] for a in arms])} (step {last})",
            ]
        rows.append((": ".join(key), *distance, *losses))
    table(
        "Against the run that was not resized, mean ± standard error over seeds",
        ("arm", "distance, 1 step", f"{BEND[-1]} steps", "excess loss, worst step of mean", "worst of each", "last"),
        rows,
    )

    def worst_ratio(pick: np.ndarray, arm: tuple[str, str], other: tuple[str, str]) -> float:
        at = pick.astype(int)
        worst, least = (curves(key)[at].mean(0).max() for key in (arm, other))
        return worst / max(least, 1e-9)  # losing state may cost nothing, or help: then there is no bound

    def distance_ratio(pick: np.ndarray, arm: tuple[str, str], other: tuple[str, str]) -> float:
        ours, theirs = (np.array([o.arms[key].distance[0] for o in outcomes]) for key in (arm, other))
        return float(ours[pick.astype(int)].mean() / theirs[pick.astype(int)].mean())

    rows = []
    for question, arm in outcomes[0].arms:
        for other in ("reset", "zeroed"):
            against = question if (question, other) in outcomes[0].arms else "ii: zero directions removed"
            if not question.startswith("ii:") or arm not in ("carried", "true second moments"):
                continue
            cells = []
            for statistic in (worst_ratio, distance_ratio):
                keys = (question, arm), (against, other)
                value, low, high = interval(range(len(outcomes)), lambda pick, k=keys, f=statistic: f(pick, *k))
                cells.append(f"{value:.3f} ({low:.3f} to {f'{high:.3f}' if high < 1e3 else 'no bound'})")
            rows.append((f"{question}: {arm} / {other}", *cells))
    if rows:
        table(
            "Transport over losing state: ratio and 95 % bootstrap interval over seeds (limit 0.1)",
            ("", "worst excess loss", "distance after 1 step"),
            rows,
        )
    rows = []
    for key in outcomes[0].arms:
        if key[0] == GROWTH:
            arms = [o.arms[key] for o in outcomes]
            reached = ", ".join("-" if a.reached == math.inf else f"{a.reached:.0f}" for a in arms)
            rows.append((key[1], reached, spread([a.overshoot for a in arms], 2)))
    if rows:
        columns = ("", "steps until they carry 5 % of |DeltaW|", "largest update of an entry, in lr")
        table("(iv) New directions", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions, of (ii) on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--before", type=int, default=150, help="steps before the event")
    parser.add_argument("--total", type=int, default=250, help="steps at whose end the learning rate is 0")
    parser.add_argument("--long", type=int, default=50, help="steps after a real cut")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20, help="reviews of at most so many")
    parser.add_argument("--eval", type=int, default=480, help="held-out reviews, others for every seed")
    parser.add_argument("--rewarm", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, one thread each")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(measure, range(options.seeds), [options] * options.seeds)
        outcomes = list(track(done, "seeds", total=options.seeds, console=console))
    report(outcomes, options)


if __name__ == "__main__":
    main()
