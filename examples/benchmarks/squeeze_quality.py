"""What squeezing costs: a trained adapter brought to several sizes by every kind of budget and metric, beside LoRA
trained at that size. MiniLM and the main task of quality.py, offline.

python examples/benchmarks/squeeze_quality.py run      # one process; goes on where it stopped
python examples/benchmarks/squeeze_quality.py tables

One run of rank 32 a seed is saved, calibrated on 20 training batches, and squeezed from file to file; every outcome is
loaded into a fresh base model and scored. LoRA trained at each rank comes from quality.py's results.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from comparison.jobs import PARAMS_PER_RANK, Job, Results, append_line
from comparison.plan import Protocol, post, seeds
from comparison.tables import accuracies, done, markdown, spread, test_losses
from comparison.tasks import Task, load
from comparison.training import METRICS, train
from harness import console
from peft import PeftModel
from rich.progress import track

import rankflow

HERE = Path(__file__).parent / "results"
LINES = HERE / "squeeze_quality.jsonl"
RANKS = (1, 2, 4, 8, 16)  # sizes: parameters of LoRA trained at that rank
BATCHES = 20  # of calibration
# One number to which every module is held, and between which values it is looked for; error e is energy 1 - e^2.
SPREAD = {
    "energy of each module": ("energy", 0.01, 1.0),
    "sv_ratio of each module": ("sv_ratio", 1.0, 1e4),
    "sv_cumulative of each module": ("sv_cumulative", 0.01, 1.0),
}
NOISE = "noise threshold of each module"  # comes to a size of its own
KINDS = ("one rank for all", "all modules together", *SPREAD, NOISE)

Settings = dict[str, Any]  # of rankflow.squeeze

app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False, pretty_exceptions_enable=False)


def settings(kind: str, rank: int, size_of: Callable[[Settings], int]) -> Settings:
    """What to ask of a squeeze to come to that size at most. `size_of` tells the parameters that settings lead to."""
    limit = rank * PARAMS_PER_RANK
    if kind == "one rank for all":
        return {"target_rank": rank}
    if kind == "all modules together":
        return {"max_params": limit}
    if kind == NOISE:
        return {"auto": True}
    field, fits, fails = SPREAD[kind]
    for _ in range(24):
        middle = (fits * fails) ** 0.5 if field == "sv_ratio" else (fits + fails) / 2
        if size_of({field: middle}) <= limit:
            fits = middle
        else:
            fails = middle
    return {field: fits}


def squeezed(job: Job, task: Task, known: set[tuple[Any, ...]]) -> None:
    """All outcomes of one seed that are not `known`, each a line."""
    wanted = [
        (kind, metric, rank)
        for kind in KINDS
        for metric in METRICS
        for rank in (RANKS if kind != NOISE else RANKS[:1])
        if (kind != NOISE or metric == "weights")  # no other has a noise threshold
        and (job.digest, kind, metric, rank) not in known
    ]
    if not wanted:
        return
    console.print(f"seed {job.seed}: trains at rank {job.rank}")
    model, _, _ = train(job, task)
    with tempfile.TemporaryDirectory() as scratch:
        source, statistics = Path(scratch) / "trained", Path(scratch) / "statistics.safetensors"
        model.save_pretrained(source)
        batches = [batch for batch, _ in zip(task.batches(job.seed + 1_000, 8), range(BATCHES), strict=False)]
        rankflow.calibrate(model, batches).save(statistics)
        for i, (kind, metric, rank) in enumerate(track(wanted, f"seed {job.seed}", console=console)):
            common: Settings = {"metric": metric, "calibration": None if metric == "weights" else statistics}

            def size_of(target: Settings, common: Settings = common) -> int:
                return rankflow.squeeze(source, **target, **common, dry_run=True).params_after

            target = settings(kind, rank, size_of)
            report = rankflow.squeeze(source, Path(scratch) / str(i), **target, **common)
            small = PeftModel.from_pretrained(task.model(job.seed), str(Path(scratch) / str(i)))
            line = {
                "run": job.digest,
                "seed": job.seed,
                "kind": kind,
                "metric": metric,
                "rank": rank,
                "target": target,
                "params": report.params_after,
                "weight_error": round(report.weight_error, 6),
                "test": task.score(small, "test"),
            }
            append_line(LINES, line)


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def jobs() -> list[Job]:
    found = post(Results(HERE), Protocol())
    if found is None:
        raise SystemExit("the rate of the high rank is not known yet; run: quality.py run --stage born")
    return found


@app.command()
def run() -> None:
    """Train, squeeze and score what is missing."""
    torch.set_num_threads(1)
    task = load(Protocol().main)
    for job in jobs():
        known = {(line["run"], line["kind"], line["metric"], line["rank"]) for line in lines()}
        squeezed(job, task, known)
    tables()


@app.command()
def tables() -> None:
    """Print the table as Markdown: test loss; accuracy in percent, means over seeds."""
    results, protocol = Results(HERE), Protocol()
    digests = {job.digest for job in jobs()}
    found = [line for line in lines() if line["run"] in digests]
    rows = []
    born = {rank: done(results, seeds(results, protocol, protocol.main, "lora", rank)) for rank in RANKS}
    rows.append(("trained at it", "", *(cell(born[rank]) for rank in RANKS)))
    for kind in KINDS[:-1]:
        for metric in METRICS:
            of = [line for line in found if (line["kind"], line["metric"]) == (kind, metric)]
            rows.append((kind, metric, *(cell([line for line in of if line["rank"] == rank]) for rank in RANKS)))
    sizes = [f"{rank * PARAMS_PER_RANK / 1e3:.0f} k" for rank in RANKS]
    console.print(markdown(("budget", "metric", *sizes), rows), soft_wrap=True, markup=False)
    if edge := [line for line in found if line["kind"] == NOISE]:
        console.print(f"\n{NOISE}: {spread([line['params'] / 1e3 for line in edge], 0)} k; {cell(edge)}", markup=False)


def cell(of: list[dict[str, Any]]) -> str:
    if not of:
        return "not run"
    return f"{spread(test_losses(of), 4)}; {spread(accuracies(of))}"


if __name__ == "__main__":
    app()
