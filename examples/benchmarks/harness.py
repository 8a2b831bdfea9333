"""Paired timing on noisy machines: arms interleaved step by step in one process, ratios with bootstrap intervals."""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' data.py

console = Console(width=120)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}{gpu}, {torch.get_num_threads()} torch thread(s), torch {torch.__version__}"


def resident(field: str) -> int:
    """Kilobytes of a line of /proc/self/status: VmRSS is now, VmHWM the most since `forget_peak`."""
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))


def forget_peak() -> None:
    """VmHWM starts again from VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def interval(
    samples: Sequence[float], statistic: Callable[[np.ndarray], float] = np.median, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high): the statistic and its bootstrap 95 % interval."""
    values = np.asarray(samples, dtype=float)
    rng = np.random.default_rng(seed)
    resampled = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(statistic(values)), float(low), float(high)


def ratio_of_sums(
    arm: Sequence[float], base: Sequence[float], block: int = 10, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Total time of one arm over another's, with a 95 % interval from a bootstrap over blocks of adjacent steps.

    Sums count every expensive step in full; a median over steps would hide the few that decide and resize.
    """
    n = len(arm) // block
    a = np.asarray(arm[: n * block]).reshape(n, block).sum(1)
    b = np.asarray(base[: n * block]).reshape(n, block).sum(1)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, n, (draws, n))
    ratios = a[picks].sum(1) / b[picks].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(sum(arm) / sum(base)), float(low), float(high)


def interleave(
    arms: Mapping[str, Callable[[int], None]], steps: int, seed: int = 0, start: int = 0
) -> dict[str, list[float]]:
    """Seconds of each arm at each step; all arms run step i, in a fresh random order, before any runs step i + 1."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    shuffle = random.Random(seed).shuffle
    for i in range(start, start + steps):
        shuffle(order)
        for name in order:
            began = time.perf_counter()
            arms[name](i)
            times[name].append(time.perf_counter() - began)
    return times


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    console.print(out)
