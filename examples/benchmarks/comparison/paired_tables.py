"""Tables of what is set against tuned LoRA, pair by pair of seeds, on each of the six tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from comparison.arms import ARMS
from comparison.jobs import Results
from comparison.plan import MINIATURES, OURS, PEERS, Protocol, miniature, paired, tier
from comparison.settings import SETTINGS
from comparison.tables import NOT_RUN, accuracies, differences, done, half_width, markdown, spread, test_losses

DIGITS = 4


@dataclass(frozen=True)
class Verdict:
    """What the paired differences of one task say; `differences` are an arm's test losses minus LoRA's, by seed."""

    differences: Sequence[float]

    @property
    def below(self) -> bool:
        return mean(self.differences) < 0

    @property
    def surely_below(self) -> bool:
        """The 95 % interval (Student's t over seeds) lies below zero."""
        return len(self.differences) > 1 and mean(self.differences) + half_width(self.differences) < 0

    @property
    def worse(self) -> bool:
        """Above zero by more than one standard error of the mean difference."""
        n = len(self.differences)
        return n > 1 and mean(self.differences) > stdev(self.differences) / math.sqrt(n)

    def __str__(self) -> str:
        return f"{spread(self.differences, DIGITS)} ({len(self.differences)})"


def verdict(results: Results, protocol: Protocol, task: str, arm: str, rank: int, own: bool) -> Verdict | None:
    """None where nothing can be paired yet."""
    plain = done(results, paired(results, protocol, task, "lora", rank))
    found = differences(done(results, paired(results, protocol, task, arm, rank, own)), plain)
    return Verdict(found) if found else None


def tasks_table(results: Results, protocol: Protocol, rank: int, own: bool, arm: str = OURS) -> str:
    """A row for each task: LoRA, the arm and their paired difference, at LoRA's best rate or the arm's own."""
    rows = []
    for task in protocol.tasks:
        plain = done(results, paired(results, protocol, task, "lora", rank))
        lines = done(results, paired(results, protocol, task, arm, rank, own))
        found = verdict(results, protocol, task, arm, rank, own)
        if found is None:
            state = f"{len(plain)} seeds of LoRA" if plain else ""
            rows.append((SETTINGS[task].title, NOT_RUN, state, "", "", ""))
            continue
        seeds = {line["seed"] for line in lines}
        rows.append(
            (
                SETTINGS[task].title,
                str(len(found.differences)),
                f"{lines[0]['rate']:g}",
                spread(test_losses(line for line in plain if line["seed"] in seeds), DIGITS),
                spread(test_losses(lines), DIGITS),
                spread(found.differences, DIGITS),
            )
        )
    return markdown(("task", "seeds", "rate", "LoRA's test loss", f"{ARMS[arm].title}'s", "difference"), rows)


def summary_table(results: Results, protocol: Protocol) -> str:
    """How many of the six tasks each arm wins; those that were not run count for nothing and are named."""
    rows = []
    for own, arms in ((False, tier(3)), (True, [OURS, *PEERS])):
        for arm in arms:
            found = {task: verdict(results, protocol, task, arm, protocol.rank, own) for task in protocol.tasks}
            run = {task: v for task, v in found.items() if v is not None}
            label = f"{ARMS[arm].title}, {'its best rate' if own else 'rate of LoRA'}"
            if not run:
                rows.append((label, NOT_RUN, "", "", "", ""))
                continue
            fewest = min(len(v.differences) for v in run.values())
            rows.append(
                (
                    label,
                    f"{len(run)} of {len(found)}",
                    f"{fewest}",
                    str(sum(v.below for v in run.values())),
                    str(sum(v.surely_below for v in run.values())),
                    ", ".join(task for task, v in run.items() if v.worse) or "none",
                )
            )
    columns = ("arm", "tasks run", "seeds, at least", "below LoRA", "interval below 0", "worse by over one se on")
    return markdown(columns, rows)


def arms_table(results: Results, protocol: Protocol, arms: Iterable[str], own: bool) -> str:
    """A row for each arm, a column for each task: differences to tuned LoRA and the number of seeds."""
    rows = []
    for arm in arms:
        cells = [verdict(results, protocol, task, arm, protocol.rank, own) for task in protocol.tasks]
        rows.append((ARMS[arm].title, *(NOT_RUN if cell is None else str(cell) for cell in cells)))
    return markdown(("arm", *protocol.tasks), rows)


def miniature_table(results: Results, protocol: Protocol, task: str, arms: Iterable[str]) -> str:
    """One claim of a paper: three seeds of each arm at LoRA's best rate."""
    plain = done(results, miniature(results, protocol, task, "lora"))
    rows = []
    for arm in arms:
        lines = done(results, miniature(results, protocol, task, arm))
        cells = [NOT_RUN, "", "", ""]
        if lines:
            pairs = differences(lines, plain) if arm != "lora" else []
            versus = spread(pairs, DIGITS) if pairs else ""
            cells = [str(len(lines)), spread(accuracies(lines)), spread(test_losses(lines), DIGITS), versus]
        rows.append((ARMS[arm].title, *cells))
    return markdown(("arm", "seeds", "accuracy", "test loss", "minus LoRA's"), rows)


def calibration_table(results: Results, protocol: Protocol, task: str) -> str:
    """Accuracy and calibration errors, in percent, of every arm at the rate that its other tables show."""
    rows = []
    for arm in ["lora", *tier(3), *PEERS]:
        found = done(results, paired(results, protocol, task, arm, protocol.rank, own=arm in PEERS))
        lines = [line for line in found if "ece" in line["test"]]  # older lines have none
        cells = [NOT_RUN, "", "", "", ""]
        if lines:
            errors = (spread([100 * line["test"][error] for line in lines]) for error in ("ece", "mce", "ace"))
            cells = [spread(accuracies(lines)), *errors, str(len(lines))]
        rows.append((ARMS[arm].title, *cells))
    return markdown(("arm", "accuracy", "ECE", "MCE", "ACE", "seeds"), rows)


def paired_tables(results: Results, protocol: Protocol) -> dict[str, Callable[[], str]]:
    """What makes each table, by its title."""
    rank = protocol.rank
    made: dict[str, Callable[[], str]] = {
        "Six tasks: who is below tuned LoRA": lambda: summary_table(results, protocol),
        f"Six tasks, rank {rank}, at LoRA's own best rate": lambda: tasks_table(results, protocol, rank, own=False),
        f"Six tasks, rank {rank}, at its own best rate": lambda: tasks_table(results, protocol, rank, own=True),
        "What contributes, at LoRA's rate: minus tuned LoRA (seeds)": lambda: arms_table(
            results, protocol, tier(3), own=False
        ),
        "Peers at their own best rates: minus tuned LoRA (seeds)": lambda: arms_table(
            results, protocol, PEERS, own=True
        ),
    }
    for other in protocol.other_ranks:
        made[f"Six tasks, rank {other}, at LoRA's own best rate"] = lambda other=other: tasks_table(
            results, protocol, other, own=False
        )
    for claim, (task, arms) in MINIATURES.items():
        made[f"{claim}, {task}"] = lambda task=task, arms=arms: miniature_table(results, protocol, task, arms)
    for task in protocol.tasks:
        if SETTINGS[task].classes:
            made[f"Calibration, {task}, in percent"] = lambda task=task: calibration_table(results, protocol, task)
    return made
