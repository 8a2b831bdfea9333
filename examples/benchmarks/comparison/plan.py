"""Which jobs are still to be run, in order of need; later ones depend on the learning rates that earlier ones find."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, product

from comparison.arms import ARMS
from comparison.jobs import Job, Results
from comparison.settings import SETTINGS

EXTENSIONS = 3  # rates added beyond a grid whose best is at its edge


@dataclass(frozen=True)
class Protocol:
    """What is run. Rates are chosen by the loss on `validation` at seed 0; tables show the accuracy on `test`."""

    main: str = "recovery"
    side: str = "rotten_tomatoes"
    steps: int = 200
    rank: int = 4
    other_ranks: tuple[int, ...] = (2, 8)
    born: tuple[int, ...] = (1, 2, 4, 8, 16)
    high: int = 32  # squeezed after its end
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[float, ...] = (0.5, 1, 2, 4, 8)  # of the run, to see where it flattens out
    longer: int = 4  # times the steps, where it has more nearly done so
    tasks: tuple[str, ...] = ("recovery", "restorer", "newsgroups", "rotten_tomatoes", "vision", "language")
    paired_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of what is set against LoRA on all of these tasks


def tier(n: int) -> list[str]:
    return [name for name, arm in ARMS.items() if arm.tier == n]


OURS = "gradient_start"
PEERS = ["peft_adalora", *tier(4)]


@dataclass(frozen=True)
class Sweep:
    """Learning rates tried at seed 0. `best` is None while some are missing."""

    jobs: tuple[Job, ...]
    missing: tuple[Job, ...]
    best: float | None
    edge: bool = False

    @property
    def rates(self) -> list[float]:
        return sorted(job.rate for job in self.jobs)


def sweep(results: Results, task: str, arm: str, rank: int, steps: int, grid: tuple[float, ...] | None = None) -> Sweep:
    """All of the arm's grid, and one more rate, a factor of two on, as long as the best is at an edge."""
    setting = SETTINGS[task]
    rates = sorted(grid or setting.grid(ARMS[arm].rates))
    for extension in count():
        jobs = tuple(Job(task, arm, rank, rate, 0, steps) for rate in rates)
        missing = tuple(job for job in jobs if results.of(job) is None)
        if missing:
            return Sweep(jobs, missing, None)
        best = min(rates, key=lambda rate: _loss(results, Job(task, arm, rank, rate, 0, steps)))
        edge = best in (rates[0], rates[-1])
        if not edge or extension == EXTENSIONS or not setting.extend:
            return Sweep(jobs, (), best, edge)
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]
    raise AssertionError("count() does not end")


def halving(results: Results, task: str, arm: str, rank: int, steps: int) -> Sweep:
    """Exploratory arms: all rates at half the steps, then the better half of them at all steps."""
    rates = sorted(ARMS[arm].rates)
    first = [Job(task, arm, rank, rate, 0, steps // 2) for rate in rates]
    if missing := [job for job in first if results.of(job) is None]:
        return Sweep(tuple(first), tuple(missing), None)
    better = sorted(first, key=lambda job: _loss(results, job))[: len(first) // 2]
    second = [Job(task, arm, rank, job.rate, 0, steps) for job in better]
    if missing := [job for job in second if results.of(job) is None]:
        return Sweep((*first, *second), tuple(missing), None)
    best = min(second, key=lambda job: _loss(results, job)).rate
    return Sweep((*first, *second), (), best, best in (rates[0], rates[-1]))


def _loss(results: Results, job: Job) -> float:
    line = results.of(job)
    assert line is not None, "asked for once all are there"
    return line["validation"]["loss"]


def seeds(results: Results, protocol: Protocol, task: str, arm: str, rank: int) -> list[Job] | None:
    """The jobs a row of a table is made of: every seed at the best rate; None while the rate is not known.

    At other ranks than the main one the rate is that found at the main one; plain LoRA is tuned at every rank.
    """
    tuned = rank if arm == "lora" else protocol.rank
    best = sweep(results, task, arm, tuned, protocol.steps).best
    if best is None:
        return None
    return [Job(task, arm, rank, best, seed, protocol.steps) for seed in protocol.seeds]


def post(results: Results, protocol: Protocol) -> list[Job] | None:
    """Runs at the high rank, at the rate of the highest rank that was tuned, squeezed after their end."""
    best = sweep(results, protocol.main, "lora", max(protocol.born), protocol.steps).best
    if best is None:
        return None
    return [Job(protocol.main, "post", protocol.high, best, seed, protocol.steps) for seed in protocol.seeds]


def lengths(results: Results, protocol: Protocol) -> list[Job] | None:
    """LoRA at the main rank and its best rate, for shorter and longer."""
    best = sweep(results, protocol.main, "lora", protocol.rank, protocol.steps).best
    if best is None:
        return None
    return [
        Job(protocol.main, "lora", protocol.rank, best, 0, round(protocol.steps * times)) for times in protocol.lengths
    ]


def long_sweep(results: Results, protocol: Protocol, arm: str) -> Sweep:
    """The best rate of the usual length and its neighbours, for `longer` times the steps."""
    best = sweep(results, protocol.main, arm, protocol.rank, protocol.steps).best
    if best is None:
        return Sweep((), (), None)
    grid = (best / 2, best, 2 * best)
    return sweep(results, protocol.main, arm, protocol.rank, protocol.longer * protocol.steps, grid)


def long_seeds(results: Results, protocol: Protocol, arm: str) -> list[Job] | None:
    """As `seeds`, for `longer` times the steps."""
    best = long_sweep(results, protocol, arm).best
    if best is None:
        return None
    steps = protocol.longer * protocol.steps
    return [Job(protocol.main, arm, protocol.rank, best, seed, steps) for seed in protocol.seeds]


def paired(results: Results, protocol: Protocol, task: str, arm: str, rank: int, own: bool = False) -> list[Job] | None:
    """Every seed of the arm on one of the six tasks, at LoRA's best rate or at its own; None while that is unknown."""
    steps = SETTINGS[task].steps
    best = sweep(results, task, arm if own else "lora", rank, steps).best
    if best is None:
        return None
    return [Job(task, arm, rank, best, seed, steps) for seed in protocol.paired_seeds]


def _paired_stage(results: Results, protocol: Protocol, arms: list[str], rank: int, own: bool = False) -> Iterator[Job]:
    """Of each task in turn the sweeps that are needed and the first seeds; then the other seeds."""
    for some in (protocol.seeds, protocol.paired_seeds):
        for task, arm in product(protocol.tasks, arms):
            yield from _middle_first(sweep(results, task, arm if own else "lora", rank, SETTINGS[task].steps).jobs)
            yield from (job for job in paired(results, protocol, task, arm, rank, own) or () if job.seed in some)


ALSO_LONG = ("adalora",)  # whose own schedule has a long final stretch
MINIATURES = {  # a paper's claim: (task, what is set side by side at LoRA's rate)
    "DiffoRA's choice of modules against a random one": ("recovery", ("lora", "diffora", "random_modules")),
    "LoRA-Squeeze's stages of equal length": ("recovery", ("lora", "squeeze", "squeeze_equal")),
    "EVA's rho": ("recovery", ("lora", "eva_rho_1", "eva_rho_2")),
    "IncreLoRA at few samples": ("rotten_tomatoes_few", ("lora", "increlora")),
}


def miniature(results: Results, protocol: Protocol, task: str, arm: str) -> list[Job] | None:
    """Three seeds at LoRA's best rate."""
    jobs = paired(results, protocol, task, arm, protocol.rank)
    return None if jobs is None else [job for job in jobs if job.seed in protocol.seeds]


PAIRED_STAGES = ("lora_rate", "own_rate", "shares", "peers", "lora_rate_ranks", "miniature")
STAGES = ("born", "sweep", "seeds", "lengths", "post", "side", "ranks", "exploratory", "long", *PAIRED_STAGES)


def stage(name: str, results: Results, protocol: Protocol) -> Iterator[Job]:
    """Jobs of a stage that can be known by now, finished ones too."""
    main, side, rank, steps = protocol.main, protocol.side, protocol.rank, protocol.steps
    match name:
        case "sweep":
            yield from _middle_first(job for arm in tier(1) for job in sweep(results, main, arm, rank, steps).jobs)
        case "born":
            ranks = dict.fromkeys((rank, protocol.born[0], protocol.born[-1], *protocol.born))  # does rank matter?
            yield from _middle_first(job for r in ranks for job in sweep(results, main, "lora", r, steps).jobs)
        case "seeds":
            for arm in tier(1):
                yield from seeds(results, protocol, main, arm, rank) or ()
        case "lengths":
            yield from lengths(results, protocol) or ()
        case "post":
            yield from post(results, protocol) or ()
            for r in protocol.born:
                yield from seeds(results, protocol, main, "squeeze", r) or ()
                yield from seeds(results, protocol, main, "lora", r) or ()
        case "side":
            for arm in tier(1):
                yield from sweep(results, side, arm, rank, steps).jobs
            for arm in tier(1):
                yield from seeds(results, protocol, side, arm, rank) or ()
        case "ranks":
            for r in protocol.other_ranks:
                for arm in tier(1):
                    yield from seeds(results, protocol, main, arm, r) or ()
        case "exploratory":
            for arm in tier(2):
                yield from halving(results, main, arm, rank, steps).jobs
        case "long":
            for arm in ALSO_LONG:
                yield from _middle_first(sweep(results, main, arm, rank, steps).jobs)
            arms = (*tier(1), *ALSO_LONG)
            yield from _middle_first(job for arm in arms for job in long_sweep(results, protocol, arm).jobs)
            for arm in arms:
                yield from long_seeds(results, protocol, arm) or ()
        case "lora_rate":
            yield from _paired_stage(results, protocol, ["lora", OURS], rank)
        case "own_rate":
            yield from _paired_stage(results, protocol, [OURS], rank, own=True)
        case "shares":
            yield from _paired_stage(results, protocol, [arm for arm in tier(3) if arm != OURS], rank)
        case "peers":
            yield from _paired_stage(results, protocol, PEERS, rank, own=True)
        case "lora_rate_ranks":
            for r in protocol.other_ranks:
                yield from _paired_stage(results, protocol, ["lora", OURS], r)
        case "miniature":
            for task, arms in MINIATURES.values():
                yield from sweep(results, task, "lora", rank, SETTINGS[task].steps).jobs
                for arm in arms:
                    yield from miniature(results, protocol, task, arm) or ()
        case _:
            raise ValueError(f"no stage is called {name!r}; known: {', '.join(STAGES)}")


def _middle_first(jobs: Iterable[Job]) -> list[Job]:
    """Rates in the middle of an arm's grid before those at its edges, so that unfinished sweeps say something."""

    def distance(job: Job) -> float:
        rates = job.setting.grid(ARMS[job.arm].rates)
        return abs(math.log2(job.rate**2 / (rates[0] * rates[-1])))

    return sorted(jobs, key=distance)


def plan(results: Results, protocol: Protocol, stages: tuple[str, ...] = STAGES) -> list[Job]:
    """Missing jobs that can be run now, each once. Arms whose policy does not exist are left out."""
    jobs = (job for name in stages for job in stage(name, results, protocol))

    def can_run(job: Job) -> bool:
        return ARMS[job.arm].available and ARMS[job.arm].runs_on(job.setting)

    return list(dict.fromkeys(job for job in jobs if can_run(job) and results.of(job) is None))
