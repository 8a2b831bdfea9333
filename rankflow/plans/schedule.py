"""Schedules: which steps are due, and how a number moves from its first value to its last."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rankflow.errors import ConfigError

StepLike = int | str  # 400, or "10%" of the whole run
_EVERY = "10%"  # where `every` is left out
SETTLING = 0.25  # of a phase that ends with the run: what was decided last is trained for so long


def resolve_step(value: StepLike, total_steps: int, *, what: str = "step") -> int:
    """A step count, from a step or a percentage of the whole run (rounded to the nearest step).

    Raises:
        ConfigError: not a whole number of steps, not a percentage, negative, or over 100 %.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"{what}: {value} is negative")
        return value
    percent = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*%", value.strip()) if isinstance(value, str) else None
    if percent is None:
        raise ConfigError(f"{what}: {value!r} is neither a number of steps nor a percentage such as '10%'")
    share = float(percent[1])
    if not 0 <= share <= 100:
        raise ConfigError(f"{what}: {value} is not between 0% and 100%")
    return round(share / 100 * total_steps)


@dataclass(frozen=True)
class When:
    """The steps on which a policy decides: `start`, `start + every`, ... below `stop`, counted in optimizer steps of
    the whole run. A decision at step s comes after the s-th optimizer step.

    Left out, `start` is where the phase begins (the first phase: one `every` into the run), and `stop` where it ends,
    or earlier: what was decided last is trained for a share of the phase (see `resolve`). `every` is then 10 % of the
    run. `run` is the number of steps of the whole run and `phase` where the phase begins and ends, known once resolved.
    """

    start: StepLike | None = None
    every: StepLike | None = None
    stop: StepLike | None = None
    run: int | None = None
    phase: tuple[int, int] | None = None  # its updates are those of the steps after the first up to the second

    def resolve(
        self, total_steps: int, begin: int = 0, end: int | None = None, *, settling: float = 0.0, changes: int = 0
    ) -> When:
        """The same cadence in steps, clipped to the phase [begin, end).

        Args:
            settling: where `stop` is left out, no decision falls into the last steps of the run, as many as this share
                of those from `start` on, or of the phase if `start` is left out. The first decision stays in any case.
            changes: how many changes of rank the phase comes to if every rank is to be trained for equally long; 0:
                as many as there are decisions. They make equal stages of the phase, which `every` is where it is left
                out, and `settling` is the last of them.

        Raises:
            ConfigError: a bad step, or a cadence under one step.
        """
        end = total_steps + 1 if end is None else end
        first = begin if self.start is None else max(begin, resolve_step(self.start, total_steps, what="when.start"))
        stages = changes + (begin == 0)  # a later phase begins with a change
        length = min(end, total_steps) - begin
        if self.every is not None:
            every = resolve_step(self.every, total_steps, what="when.every")
            if every < 1 and not isinstance(self.every, str):
                raise ConfigError("when.every: must be at least 1 step")
        else:
            every = length // stages if changes else resolve_step(_EVERY, total_steps)
        every = max(every, 1)  # a small percentage of a short run still means "as often as can be"
        if self.start is None:
            start = begin if begin > 0 else every
        else:
            start = resolve_step(self.start, total_steps, what="when.start")
        start = max(start, 1)
        if start < begin:
            start += -(-(begin - start) // every) * every
        if self.stop is not None:
            stop = min(end, resolve_step(self.stop, total_steps, what="when.stop"))
        else:
            left = math.ceil((1 / stages if changes else settling) * (min(end, total_steps) - first))
            stop = min(end, total_steps + 1 - min(left, total_steps - start))
            if changes and self.every is None:
                stop = min(stop, start + changes * every)
        return When(start, every, stop, total_steps, (begin, min(end, total_steps)))

    @property
    def _resolved(self) -> tuple[int, int, int]:
        if isinstance(self.start, int) and isinstance(self.every, int) and isinstance(self.stop, int):
            return self.start, self.every, self.stop
        raise ConfigError(f"{self} still holds percentages; resolve it against the run's total steps first")

    @property
    def events(self) -> range:
        """All due steps."""
        start, every, stop = self._resolved
        return range(start, stop, every)

    def due(self, step: int) -> bool:
        return step in self.events

    def next(self, step: int) -> int | None:
        """The first due step after `step`; None when there is none."""
        events = self.events
        if not events or step >= events[-1]:
            return None
        return events[0] if step < events[0] else events[(step - events.start) // events.step + 1]

    def within(self, step: int, window: int) -> bool:
        """Whether `step` is one of the `window` steps up to the next due one, itself among them; 0: any before it."""
        due = self.next(step - 1)
        return due is not None and (window == 0 or due - step < window)

    def progress(self, step: int) -> float:
        """Share of the events done once the one at `step` is: 1.0 at the last. 0 before the first."""
        events = self.events
        if not events or step < events[0]:
            return 0.0
        return min(1.0, ((step - events.start) // events.step + 1) / len(events))

    def at(self, share: float) -> int:
        """The step by which that share of the phase's updates is done.

        Raises:
            ConfigError: not resolved.
        """
        if self.phase is None:
            raise ConfigError(f"{self} is not resolved against a run, so nobody knows yet how long its phase is")
        begin, end = self.phase
        return begin + round(share * (end - begin))


# -- curves: fraction in [0, 1] -> number ---------------------------------------------------------------------------

Curve = Literal["constant", "linear", "cubic", "cosine", "halving"]


def _constant(first: float, last: float, t: float) -> float:
    return last


def _linear(first: float, last: float, t: float) -> float:
    return first + (last - first) * t


def _cubic(first: float, last: float, t: float) -> float:
    """AdaLoRA's (arXiv 2303.10512, eq. 12) budget curve: most of the change comes early."""
    return last + (first - last) * (1 - t) ** 3


def _cosine(first: float, last: float, t: float) -> float:
    """RigL's (arXiv 1911.11134, section 3) decay, half a period: slow at both ends."""
    return last + (first - last) * (1 + math.cos(math.pi * t)) / 2


def halvings(first: float, last: float) -> int:
    """How many halvings bring `first` down to `last` or below; 0 where it is not above."""
    return math.ceil(math.log2(first / last)) if 0 < last < first else 0


def _halving(first: float, last: float, t: float) -> float:
    """LoRA-Squeeze's ladder (arXiv 2602.10993): first, first/2, ..., last, each rung an equal share of the way."""
    rungs = halvings(first, last)
    return max(last, first / 2 ** math.floor(t * rungs)) if rungs else _linear(first, last, t)


CURVES: dict[Curve, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cubic": _cubic,
    "cosine": _cosine,
    "halving": _halving,
}


def curve(name: Curve, first: float, last: float, t: float) -> float:
    """The value at fraction t of the way from `first` to `last`, which t = 1 gives exactly.

    `constant` is at `last` from the start; the others are at `first` for t = 0.

    Raises:
        ConfigError: no curve of that name.
    """
    if name not in CURVES:
        raise ConfigError(f"unknown curve {name!r}; known: {', '.join(CURVES)}")
    return last if t >= 1 else CURVES[name](first, last, t)
