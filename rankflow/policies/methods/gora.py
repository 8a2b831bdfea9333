"""GoRA: before the first step, ranks go where the weights and their gradient say that training will act."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.plans.allocate import proportional
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.policies._initial import Opening
from rankflow.policies.observation import Observation, Signal, Study


@dataclass(frozen=True, kw_only=True)
class Gora(Opening):
    """GoRA (arXiv 2502.12171): ranks of a fresh adapter in proportion to mean |W0 * G| over sqrt(in + out).

    G is the gradient of the frozen weight W0, averaged over some batches before the absolute value is taken; B is 0
    then, so it is the base model's. Run once, before the first step; any other policy may follow.

    When to use: the adapter is fresh, some training batches are at hand, and ranks should differ from the first step on
    at no cost afterwards.

    Differs: from the paper and its released code,
    - B stays 0. They set it to what of the gradient A can express, G A^T (A A^T)^-1 times a step size, so that training
      starts one step ahead and from another function;
    - the mean runs over `rows` seeded output rows of every module, of which alone the gradient is kept, ``[rows, in]``;
      with `rows` at or above the output size it is theirs, and as dear: a gradient the size of every weight;
    - ranks are rounded so that the budget is met exactly, and it counts ranks or parameters; theirs, the sum of
      r sqrt(in + out), is missed by what rounding each rank and clipping it happen to add up to;
    - limits are those of the file, where the paper has half to four times the reference rank;
    - the passes are in eval mode, without dropout, and as many as `batches`; the code may stop once scores settle.
    """

    batches: Annotated[PositiveInt, Field(description="batches over which the gradient is averaged")] = 16
    features: Annotated[
        Literal["sqrt", "linear", "none"],
        Field(description="what a module's score is divided by: the root of in + out, as published, in + out, or 1"),
    ] = "sqrt"
    init_a: Annotated[
        Literal["keep", "grad"],
        Field(description="rows of A: those there are, or leading directions of the gradient; B is 0 either way"),
    ] = "keep"
    rows: Annotated[
        PositiveInt, Field(description="output rows of each module whose gradient is kept; all of them if it has fewer")
    ] = 256
    components: Annotated[
        PositiveInt, Field(description="with init_a grad: rows of the gradient's sketch; more than the largest rank")
    ] = 64

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.WEIGHT_SCORE, Signal.SKETCH})
    source: ClassVar[str] = "GoRA, arXiv 2502.12171"

    @property
    def studies(self) -> tuple[Study, ...]:
        signals = self.needs if self.init_a == "grad" else self.needs - {Signal.SKETCH}
        return (Study("gradients", signals, self.batches, rows=self.rows, components=self.components),)

    @property
    def beyond_ranks(self) -> bool:
        return self.init_a == "grad"

    def gains(self, obs: Observation, layout: Layout, budget: Budget) -> Mapping[str, Sequence[float]]:
        scores = obs.gather(Signal.WEIGHT_SCORE)
        weights = {name: float(score) / self._size(layout[name]) for name, score in scores.items()}
        return proportional(weights, layout, budget)

    def directions(self, record: Mapping[Signal, Tensor]) -> Tensor | None:
        return record[Signal.SKETCH] if self.init_a == "grad" and Signal.SKETCH in record else None

    def _size(self, slot: Slot) -> float:
        size = slot.in_features + slot.out_features
        return {"sqrt": math.sqrt(size), "linear": size, "none": 1}[self.features]
