"""What a policy can see: signals of modules in one optimizer step, or in a study of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rankflow.errors import RankFlowError


class Signal(str, Enum):
    """What can be observed of a module; shapes are those of the flattened factors (``[experts, ...]`` in front for
    expert tensors), values detached, on the module's device.

    Taken in the backward pass, loss scale undone; over the micro-batches of one optimizer step they add up as `.grad`
    does, so with a loss divided by the accumulation steps they are averages.
    """

    A = "A"  # [r, in]
    B = "B"  # [out, r]
    GRAD_A = "grad_A"  # [r, in], before clipping
    GRAD_B = "grad_B"  # [out, r], before clipping
    DELTA_SCORE = "delta_score"  # [], sum |DeltaW * dL/dDeltaW| / sqrt(out * in)
    DELTA_SCORE_SAMPLED = "delta_score_sampled"  # [], the same from a seeded subset of output rows
    SINGULAR_VALUES = "singular_values"  # [r], of DeltaW, descending, float64
    S_A = "S_A"  # [r, r], sum of z z^T over tokens, float64
    S_B = "S_B"  # [r, r], sum of d d^T over tokens, float64
    TOKENS = "tokens"  # [], tokens that went into S_A and S_B
    SKETCH = "sketch"  # [q, in], random rows of dL/dDeltaW
    GATE = "gate"  # [r] or [1], what the phase's gate multiplies directions or the module by; without noise
    GATE_OPEN = "gate_open"  # the same shape, bool: which are on
    GATE_SCORE = "gate_score"  # the same shape, what they rank by where some have to go
    GATE_GRAD = "gate_grad"  # the same shape, gradient of the gate's parameter `value`
    WEIGHT_SCORE = "weight_score"  # [], mean |W0 * dL/dDeltaW| over a seeded subset of output rows
    INPUTS = "inputs"  # [<= q, in], S V^T of the module's inputs about their mean, float64; no average
    INPUT_SAMPLE = "input_sample"  # [n, in], some of the module's inputs, drawn at random from each pass; no average
    INPUT_ENERGY = "input_energy"  # [], sum of all squared singular values of those inputs, float64; no average
    PATH_SCORE = "path_score"  # [], sum |DeltaW * dL/dDeltaW|, with the gradient averaged over a batch's `points` first
    # Exponential averages over the steps that listen to one of them (see `Policy.decay`), carried through every resize:
    MEAN_ZZ = "mean_zz"  # [r, r], of z z^T over tokens, float64
    MEAN_DD = "mean_dd"  # [r, r], of d d^T over tokens, of the loss summed over tokens, float64
    MEASURED = "measured"  # [r], tokens that the averages of each direction rest on, 0 for a new one, float64


GATE_SIGNALS = frozenset({Signal.GATE, Signal.GATE_OPEN, Signal.GATE_SCORE, Signal.GATE_GRAD})

AVERAGED = frozenset({Signal.MEAN_ZZ, Signal.MEAN_DD, Signal.MEASURED})
_NEVER_ALONE_NON_FINITE = {Signal.SINGULAR_VALUES, *AVERAGED}

Lazy = Tensor | Callable[[], Tensor]


class Observation(Mapping[str, Mapping[Signal, Tensor]]):
    """Module -> signal -> tensor for one optimizer step (or one `Study`). Callables are computed when first read.

    `unheard` are modules in the adapter that train and that no gradient has reached in the whole run, where others had
    one: by it they have no importance, unlike those that are frozen, of which nothing is known. On a step that missed a
    module that trains, signals that are made of gradients are 0.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, Mapping[Signal, Lazy]] | None = None,
        study: str | None = None,
        unheard: frozenset[str] = frozenset(),
    ):
        self.step = step
        self.study = study
        self.unheard = unheard
        self._values = {name: _Record(name, signals) for name, signals in (values or {}).items()}

    def __getitem__(self, name: str) -> Mapping[Signal, Tensor]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def only(self, wanted: frozenset[Signal], more: Mapping[str, Mapping[Signal, Tensor]]) -> Observation:
        """Return the `wanted` signals of this observation and of `more`. Callables stay uncalled."""
        values: dict[str, dict[Signal, Lazy]] = {}
        for name, record in self._values.items():
            values[name] = {s: partial(record.__getitem__, s) for s in record if s in wanted}
            values[name] |= {s: value for s, value in more.get(name, {}).items() if s in wanted}
        return Observation(self.step, values, self.study, self.unheard)

    def measured(self) -> dict[tuple[str, Signal], Tensor]:
        """Return what was taken from passes over data, by (module, signal), without what is computed when read."""
        return {
            (n, s): v for n, record in self._values.items() for s, v in record.given.items() if isinstance(v, Tensor)
        }

    def replaced(self, values: Mapping[tuple[str, Signal], Tensor]) -> Observation:
        """Return the same observation with these values in place of its own."""
        merged: dict[str, dict[Signal, Lazy]] = {n: dict(record.given) for n, record in self._values.items()}
        for (name, signal), value in values.items():
            merged.setdefault(name, {})[signal] = value
        return Observation(self.step, merged, self.study, self.unheard)

    def but_unheard(self, unheard: frozenset[str]) -> Observation:
        """Return the same observation with the set of modules that no gradient reaches."""
        values: dict[str, Mapping[Signal, Lazy]] = {name: record.given for name, record in self._values.items()}
        return Observation(self.step, values, self.study, unheard)

    def non_finite(self) -> str | None:
        """The first signal that holds an infinity or a NaN, as "module: signal", or None. Waits for the device once.

        Averages never do, and singular values do where A or B does.
        """
        named = [(f"{m}: {s.value}", r[s]) for m, r in self.items() for s in r if s not in _NEVER_ALONE_NON_FINITE]
        if not named:
            return None
        finite = torch.stack([torch.isfinite(t).all() for _, t in named]).tolist()
        return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)

    def gather(self, signal: Signal) -> dict[str, Tensor]:
        """Return one signal of every module that has it."""
        return {name: record[signal] for name, record in self._values.items() if signal in record}


class _Record(Mapping[Signal, Tensor]):
    def __init__(self, name: str, values: Mapping[Signal, Lazy]):
        self._name = name
        self._values: dict[Signal, Lazy] = dict(values)

    @property
    def given(self) -> Mapping[Signal, Lazy]:
        """Tensors, and callables that were not called yet."""
        return self._values

    def __getitem__(self, signal: Signal) -> Tensor:
        try:
            value = self._values[signal]
        except KeyError:
            raise RankFlowError(
                f"{self._name}: signal {signal.value!r} was not observed; a policy must name it in what it listens to"
            ) from None
        if not isinstance(value, Tensor):
            value = self._values[signal] = value()
        return value

    def __contains__(self, signal: object) -> bool:
        return signal in self._values

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Study:
    """Passes over data that a policy asks for and the controller runs, leaving adapter, optimizer and RNG as they were.

    Every batch is run once at each of `points`, a factor on the adapter's scaling; signals are averaged over all
    passes (`inputs` and `input_energy` are those of all of them) and reach `Policy.observe` in an `Observation` whose
    `study` is this name. Only `path_score` looks at the points of a batch together: until the last of them it keeps
    lora_A's inputs and lora_B's output gradients, len(points) * tokens * (in + out) numbers for each module.
    """

    name: str
    signals: frozenset[Signal]
    batches: int = 8
    split: Literal["train", "outer"] = "train"
    points: tuple[float, ...] = (1.0,)
    when: Literal["start", "every"] = "start"  # before the first step, or before every decision
    frozen: bool = False  # whether modules whose factors do not train are looked at too
    rows: int = 64  # output rows that sampled scores and `weight_score` look at
    components: int = 16  # q of `sketch` and of `inputs`
