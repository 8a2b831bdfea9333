"""Markdown tables and the plot, from the results alone. What was not run says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from scipy.stats import t as student

from comparison.arms import ARMS
from comparison.jobs import Job, Line, Results
from comparison.plan import (
    ALSO_LONG,
    STAGES,
    Protocol,
    Sweep,
    halving,
    lengths,
    long_seeds,
    long_sweep,
    post,
    seeds,
    stage,
    sweep,
    tier,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_RUN = "not run"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and 95 % interval (Student's t over seeds); one value stands alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of their mean (Student's t)."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def done(results: Results, jobs: Iterable[Job] | None) -> list[Line]:
    return [line for job in jobs or () if (line := results.of(job)) is not None]


def accuracies(lines: Iterable[Line]) -> list[float]:
    """In percent."""
    return [100 * line["test"]["accuracy"] for line in lines]


def test_losses(lines: Iterable[Line]) -> list[float]:
    return [line["test"]["loss"] for line in lines]


def differences(lines: Iterable[Line], plain: Iterable[Line]) -> list[float]:
    """Test losses minus those of plain LoRA, seed by seed: both saw the same batches."""
    base = {line["seed"]: line["test"]["loss"] for line in plain}
    return [line["test"]["loss"] - base[line["seed"]] for line in lines if line["seed"] in base]


def main_table(results: Results, protocol: Protocol, task: str, rank: int) -> str:
    """Every arm of tier 1 at its best rate; while its sweep is unfinished, the best run so far, and marked so."""

    def tuned(arm: str) -> Sweep:
        if rank != protocol.rank and arm != "lora":  # the rate is another table's
            return replace(sweep(results, task, arm, protocol.rank, protocol.steps), jobs=())
        return sweep(results, task, arm, rank, protocol.steps)

    return _arms_table(results, tuned, lambda arm: seeds(results, protocol, task, arm, rank))


def long_table(results: Results, protocol: Protocol) -> str:
    """The main table for `longer` times the steps."""
    return _arms_table(
        results,
        lambda arm: long_sweep(results, protocol, arm),
        lambda arm: long_seeds(results, protocol, arm),
        ALSO_LONG,
    )


def _arms_table(
    results: Results,
    tuned: Callable[[str], Sweep],
    chosen: Callable[[str], Iterable[Job] | None],
    more: Iterable[str] = (),
) -> str:
    """A row for every arm of tier 1, and for `more`. `tuned` is where its rate is from, `chosen` the jobs at it."""
    rows = []
    plain = done(results, chosen("lora"))
    for arm in (*tier(1), *more):
        found = tuned(arm)
        lines = done(results, chosen(arm))
        state = ""
        if not lines and (tried := done(results, found.jobs)):
            lines = [min(tried, key=lambda line: line["validation"]["loss"])]
            state = f" ({len(tried)} of {len(found.jobs)} rates)"
        pairs = differences(lines, plain) if arm != "lora" else []
        versus = spread(pairs, 4) if pairs else ""
        rows.append(_row(ARMS[arm].title, lines, state, "*" if found.edge else "", versus))
    columns = (
        "arm",
        "accuracy",
        "se",
        "test loss",
        "minus LoRA's",
        "seeds",
        "rate",
        "params, k",
        "CPU s",
        "wall s",
        "peak MB",
    )
    return markdown(columns, rows)


def _row(title: str, lines: Sequence[Line], state: str, edge: str, versus: str) -> Sequence[str]:
    """`edge` marks a rate that is the last one tried: a better one may lie beyond."""
    if not lines:
        return title, NOT_RUN, *[""] * 9

    def average(key: str) -> str:
        return f"{mean(line[key] for line in lines):.0f}"

    return (
        title,
        spread(accuracies(lines)) + state,
        f"{100 * mean(line['test']['se'] for line in lines):.1f}",
        spread(test_losses(lines), 4),
        versus,
        str(len(lines)),
        f"{lines[0]['rate']:g}{edge}",
        f"{mean(line['params'] for line in lines) / 1e3:.0f}",
        average("cpu_seconds"),
        average("seconds"),
        f"{max(line['peak_mb'] for line in lines)}",
    )


def born_table(results: Results, protocol: Protocol) -> str:
    """Plain LoRA trained at each rank: seed 0 of its sweep, rates and all."""
    rows = []
    for rank in protocol.born:
        found = sweep(results, protocol.main, "lora", rank, protocol.steps)
        tried = done(results, found.jobs)
        if not tried:
            rows.append((str(rank), NOT_RUN, "", "", ""))
            continue
        best = min(tried, key=lambda line: line["validation"]["loss"])
        others = ", ".join(f"{line['rate']:g}: {line['validation']['loss']:.4f}" for line in tried)
        accuracy = f"{100 * best['test']['accuracy']:.1f} ± {100 * best['test']['se']:.1f}"
        state = "" if found.best is not None else " (sweep unfinished)"
        rows.append(
            (
                str(rank),
                accuracy + state,
                f"{best['test']['loss']:.4f}",
                f"{best['rate']:g}" + ("*" if found.edge else ""),
                others,
            )
        )
    return markdown(("rank", "test accuracy ± se", "test loss", "rate", "validation loss at each rate"), rows)


def lengths_table(results: Results, protocol: Protocol) -> str:
    jobs = lengths(results, protocol)
    rows = [(f"{round(protocol.steps * times)}", NOT_RUN, "", "") for times in protocol.lengths]
    for i, job in enumerate(jobs or ()):
        if (line := results.of(job)) is not None:
            rows[i] = (
                str(job.steps),
                f"{100 * line['test']['accuracy']:.1f} ± {100 * line['test']['se']:.1f}",
                f"{line['test']['loss']:.4f}",
                ", ".join(f"{loss:.3f}" for loss in line["losses"][::4]),
            )
    return markdown(("steps", "test accuracy ± se", "test loss", "training loss along the run"), rows)


def squeeze_table(results: Results, protocol: Protocol) -> str:
    """At each rank: trained there, annealed to it, and one high-rank run squeezed to it with each metric."""
    runs = done(results, post(results, protocol))
    rows = []
    for rank in protocol.born[:-1]:
        cells = [str(rank)]
        for arm in ("lora", "squeeze"):
            lines = done(results, seeds(results, protocol, protocol.main, arm, rank))
            cells.append(_both(accuracies(lines), test_losses(lines)))
        for metric in ("weights", "outputs", "loss"):
            scored = [line["post"][metric][str(rank)] for line in runs if "post" in line]
            cells.append(_both([100 * s["accuracy"] for s in scored], [s["loss"] for s in scored]))
        rows.append(cells)
    high = f"from {protocol.high}, after the end: "
    columns = ("rank", "trained at it", "annealed to it", high + "weights", "outputs", "loss")
    return markdown(columns, rows)


def _both(accuracies: Sequence[float], losses: Sequence[float]) -> str:
    return f"{spread(accuracies)}; {spread(losses, 4)} ({len(losses)})" if losses else NOT_RUN


def exploratory_table(results: Results, protocol: Protocol) -> str:
    rows = []
    for arm in tier(2):
        found = halving(results, protocol.main, arm, protocol.rank, protocol.steps)
        line = None
        if found.best is not None:
            line = results.of(Job(protocol.main, arm, protocol.rank, found.best, 0, protocol.steps))
        if line is None:
            rows.append((ARMS[arm].title, NOT_RUN, "", "", "", ""))
            continue
        test = line["test"]
        rows.append(
            (
                ARMS[arm].title,
                f"{100 * test['accuracy']:.1f} ± {100 * test['se']:.1f}",
                f"{test['loss']:.4f}",
                f"{line['rate']:g}" + ("*" if found.edge else ""),
                f"{line['params'] / 1e3:.0f}",
                f"{line['cpu_seconds']:.0f}",
            )
        )
    return markdown(("arm", "accuracy ± se, one seed", "test loss", "rate", "params, k", "CPU s"), rows)


def tables(results: Results, protocol: Protocol) -> dict[str, str]:
    """Every table by its title."""
    main, rank = protocol.main, protocol.rank
    made: dict[str, Callable[[], str]] = {
        f"LoRA trained at each rank, {main}, {protocol.steps} steps, seed 0": lambda: born_table(results, protocol),
        f"LoRA of rank {rank}, {main}, for shorter and longer, seed 0": lambda: lengths_table(results, protocol),
        f"{main}, mean rank {rank} at the end, {protocol.steps} steps": lambda: main_table(
            results, protocol, main, rank
        ),
        f"{protocol.side}, mean rank {rank} at the end, {protocol.steps} steps": lambda: main_table(
            results, protocol, protocol.side, rank
        ),
    }
    for other in protocol.other_ranks:
        made[f"{main}, mean rank {other} at the end, rates of rank {rank}"] = lambda other=other: main_table(
            results, protocol, main, other
        )
    made[f"{main}, mean rank {rank} at the end, {protocol.longer * protocol.steps} steps"] = lambda: long_table(
        results, protocol
    )
    made[f"High rank first, {main}: accuracy; test loss (seeds)"] = lambda: squeeze_table(results, protocol)
    made[f"Exploratory, {main}: rates by successive halving"] = lambda: exploratory_table(results, protocol)
    return {title: make() for title, make in made.items()}


def foreign(results: Results, protocol: Protocol) -> int:
    """Lines of configurations that are no longer (or not yet) part of the plan; no table uses them."""
    known = {job.digest for name in STAGES for job in stage(name, results, protocol)}
    return len(results.lines.keys() - known)


def plot(results: Results, protocol: Protocol, path: Path) -> None:
    """A dot per arm and setting: test loss minus that of tuned LoRA of the same size, with its 95 % interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    settings: dict[str, Callable[[str], list[Job] | None]] = {
        f"mean rank {rank}, {protocol.steps} steps": lambda arm, rank=rank: seeds(
            results, protocol, protocol.main, arm, rank
        )
        for rank in sorted((protocol.rank, *protocol.other_ranks))
    }
    settings[f"mean rank {protocol.rank}, {protocol.longer * protocol.steps} steps"] = lambda arm: long_seeds(
        results, protocol, arm
    )
    arms = [arm for arm in tier(1) if arm != "lora"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(settings), sharex=True, sharey=True)
    for axes, (title, chosen) in zip(panels, settings.items(), strict=True):
        plain = done(results, chosen("lora"))
        for row, arm in enumerate(arms):
            _dot(axes, row, differences(done(results, chosen(arm)), plain))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms])
        axes.xaxis.set_major_locator(MultipleLocator(0.005))
        axes.tick_params(axis="x", labelsize="x-small")
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"{protocol.main}: test loss minus that of tuned LoRA of the same size (left is better)", fontsize="medium"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _dot(axes: Axes, row: int, values: Sequence[float]) -> None:
    """The mean with its interval, green where the interval lies below 0 and red where above; every seed, faint."""
    if len(values) < 2:
        return
    middle, half = mean(values), half_width(values)
    color = "tab:green" if middle + half < 0 else "tab:red" if middle - half > 0 else "tab:gray"
    axes.errorbar(middle, row, xerr=half, fmt="o", color=color, capsize=3)
    axes.plot(values, [row + 0.28] * len(values), ".", color=color, markersize=4, alpha=0.5)
