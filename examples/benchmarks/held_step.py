"""Does it help to hold the length of the model's steps while ranks change? Policies at the rate that LoRA of the final
rank was tuned to, with `step: held` and `step: free`, in pairs.

python examples/benchmarks/held_step.py run --minutes 60   # goes on where it stopped
python examples/benchmarks/held_step.py table

Every run appends one line to examples/benchmarks/results. See quality.py for the tasks and what they need.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from comparison.jobs import Job, Results
from comparison.plan import Protocol, sweep
from harness import console, table
from scipy.stats import t

RESULTS = Path(__file__).parent / "results"
POLICIES = ("squeeze", "increlora", "adalora")
TASKS = ("recovery", "newsgroups", "rotten_tomatoes")
SEEDS = 5

app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="where the lines are")]


def pairs(results: Results) -> Iterator[tuple[str, str, Job, Job]]:
    """Task, policy and the held and the free run, the first seeds of everything first."""
    protocol = Protocol()
    rates = {task: sweep(results, task, "lora", protocol.rank, protocol.steps).best for task in TASKS}
    for seed, task, policy in itertools.product(range(SEEDS), TASKS, POLICIES):
        if (rate := rates[task]) is not None:
            held, free = (
                Job(task, f"{policy}_{step}", protocol.rank, rate, seed, protocol.steps) for step in ("held", "free")
            )
            yield task, policy, held, free


@app.command("run")
def run_jobs(
    minutes: Annotated[float, typer.Option(help="start nothing after this time")] = 60, results: Folder = RESULTS
) -> None:
    """Run what is missing."""
    from comparison.training import run

    found, deadline = Results(results), time.monotonic() + 60 * minutes
    for *_, held, free in pairs(found):
        for job in (held, free):
            if found.of(job) is None and time.monotonic() < deadline:
                found.append(job, **run(job))
                console.print(
                    f"{time.strftime('%H:%M')} {job}: test loss {found.lines[job.digest]['test']['loss']:.4f}"
                )


@app.command("table")
def show_table(results: Folder = RESULTS) -> None:
    """Print the mean test losses, and that of held minus free with its 95 % interval over the seeds that were run."""
    found, rows = Results(results), []
    each = list(pairs(found))
    for task, policy in itertools.product(TASKS, POLICIES):
        lines = [(found.of(h), found.of(f)) for a, b, h, f in each if (a, b) == (task, policy)]
        losses = [(h["test"]["loss"], f["test"]["loss"]) for h, f in lines if h is not None and f is not None]
        if not losses:
            rows.append([f"{task}, {policy}", "0", *["not run"] * 3])
            continue
        held, free = map(mean, zip(*losses, strict=True))
        change = [h - f for h, f in losses]
        n = len(change)
        wide = f" ± {t.ppf(0.975, n - 1) * stdev(change) / n**0.5:.4f}" if n > 1 else ""
        rows.append([f"{task}, {policy}", str(len(losses)), f"{held:.4f}", f"{free:.4f}", f"{mean(change):+.4f}{wide}"])
    table("Test loss at LoRA's own rate", ["", "seeds", "held", "free", "held - free"], rows)


if __name__ == "__main__":
    app()
