"""Training that is killed again and again, and restarted from its last checkpoint: `python tests/helpers/killing.py`.

A trial is a run of its own whose process is killed (kill -9) at a moment drawn from the seed, after so many seconds or
at so many calls that write, replace, save or resize, until one comes to its end. That end has to be, bit for bit, the
one of a run that nobody killed. Each process is forked from one that has everything imported.

    python tests/helpers/killing.py --trials 50 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from crashing import MEMORY, ticking
from helpers import same
from rich.progress import track
from tiny import Tiny, resumed, save, timeless

from rankflow.lora.transaction import Transaction
from rankflow.training.checkpoint import load_state, save_state
from rankflow.training.ledger import Ledger
from rankflow.training.phases import Operations

STEPS, EVERY = 16, 3  # optimizer steps, and how many between checkpoints
POLICY: dict[str, Any] = {
    "phases": [
        {
            "policy": "increlora",
            "until": 6,
            "budget": {"mean_rank": 4},
            "when": {"start": 2, "every": 2},
            "params": {"score_fraction": 1.0, "window": 2},
        },
        {
            "policy": "sora",
            "until": 11,
            "budget": {"mean_rank": 3},
            "when": {"every": 2},
            "params": {"gate_lr": 0.05, "lam": 3.0, "remove_after": 1},
        },
        {
            "policy": "squeeze",
            "until": 15,
            "budget": {"mean_rank": 2},
            "when": {"every": 2},
            "params": {"metric": "outputs"},
        },
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 1, "max": 8}},
}
Tick = Callable[[], None]


def train(folder: Path) -> None:
    """From the last checkpoint, or from the beginning, to the end, which is left in `end.pt`."""
    ledger = folder / "rankflow.jsonl"
    last = max((int(f.name.split("-")[1]) for f in folder.glob("step-*")), default=0)
    run = resumed(folder / f"step-{last}", POLICY, STEPS, ledger=ledger) if last else Tiny(POLICY, STEPS, ledger=ledger)
    while run.flow.step < STEPS:
        run.step()
        if run.flow.step % EVERY == 0:
            checkpoint(run, folder)
    run.flow.finish()
    torch.save(run.end() | {"ranks": run.flow.layout.ranks}, folder / "part")
    os.replace(folder / "part", folder / "end.pt")


def checkpoint(run: Tiny, folder: Path) -> None:
    """A folder beside the others, which is there wholly or not at all; of those before it one is kept."""
    partial, old = folder / "part-of-a-step", folder / f"step-{run.flow.step - 2 * EVERY}"
    shutil.rmtree(partial, ignore_errors=True)
    save(run, partial)
    save_state(run.flow, partial)
    os.replace(partial, folder / f"step-{run.flow.step}")
    if old.exists():  # renamed first: a kill amid the removal would leave a checkpoint that is not whole
        os.replace(old, partial)
        shutil.rmtree(partial)


@contextlib.contextmanager
def dying(tick: Tick) -> Iterator[None]:
    """`tick` at every write to the disk or to a model, and before every resize."""

    def counted(owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with ticking(tick), counted(Transaction, "write"), counted(Operations, "perform"), counted(torch, "save"):
        yield


def process(work: Callable[[], object], *, calls: int | None = None, seconds: float | None = None) -> bool:
    """Whether a process that does `work` was killed: at the call of that number, or after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # forked from a process that had more, others would be waited for in vain
            counter = iter(range(10**9))

            def tick() -> None:
                if next(counter) == calls:
                    os.kill(os.getpid(), signal.SIGKILL)

            with dying(tick) if calls is not None else contextlib.nullcontext():
                work()
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the run failed by itself")
    return os.WIFSIGNALED(status)


def length(work: Callable[[], object], report: Path) -> tuple[int, float]:
    """How many calls `work` makes, and how long it takes; as told by a process that did it."""

    def told() -> None:
        calls, began = 0, time.perf_counter()

        def tick() -> None:
            nonlocal calls
            calls += 1

        with dying(tick):
            work()
        report.write_text(f"{calls} {time.perf_counter() - began}")

    process(told)
    calls, seconds = report.read_text().split()
    return int(calls), float(seconds)


class Whole:
    """The run that nobody kills."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.calls, self.seconds = length(lambda: train(folder), folder.with_suffix(".txt"))
        self.end = torch.load(folder / "end.pt", weights_only=True)


def trial(whole: Whole, folder: Path, seed: int) -> tuple[str | None, int]:
    """What is wrong with the end of a run that was killed, if anything, and how often it was."""
    rng, kills = random.Random(seed), 0
    folder.mkdir()
    for attempt in range(200):
        by_calls = attempt == 0 or rng.random() < 0.5
        at = rng.randrange(whole.calls) if by_calls else rng.uniform(0, whole.seconds)
        died = process(lambda: train(folder), **({"calls": at} if by_calls else {"seconds": at}))  # type: ignore[arg-type]
        if problem := unsound(folder):
            return f"after kill {kills + 1}, at {at}: {problem}", kills
        if not died:
            break
        kills += 1
    else:
        return "it never came to its end", kills
    end = torch.load(folder / "end.pt", weights_only=True)
    wrong = [key for key in whole.end if not same(end[key], whole.end[key])]
    if wrong:
        return f"killed {kills} times, its {', '.join(wrong)} are others", kills
    if timeless(Ledger.read(folder / "rankflow.jsonl").events) != whole.end["events"]:
        return f"killed {kills} times, its ledger's events are others", kills
    return None, kills


def unsound(folder: Path) -> str | None:
    """What a killed process left that it must not."""
    for step in folder.glob("step-*"):
        state = load_state(step)
        if state is None or not (step / "run.pt").is_file():
            return f"{step.name} is a checkpoint and not whole"
    ledger = folder / "rankflow.jsonl"
    if ledger.exists() and b"\n" in ledger.read_bytes():
        Ledger.read(ledger)  # every line that ends is a whole one
    return None


def trials(count: int, seed: int, *, bar: bool = False) -> tuple[list[str], int]:
    """What went wrong in so many trials, and how often a process was killed in them."""
    problems, kills = [], 0
    with tempfile.TemporaryDirectory(prefix="killing-", dir=MEMORY) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Whole(Path(name) / "whole")
        for i in track(range(seed, seed + count), "killing", disable=not bar):
            problem, times = trial(whole, Path(name) / f"trial-{i}", i)
            kills += times
            if problem is not None:
                problems.append(f"seed {i}: {problem}")
            shutil.rmtree(Path(name) / f"trial-{i}")
    return problems, kills


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    problems, kills = trials(given.trials, given.seed, bar=True)
    print("\n".join(problems))
    print(f"{given.trials} runs, killed {kills} times, {len(problems)} of them did not end as they should")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
