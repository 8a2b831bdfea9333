"""The base of policies that score directions by smoothed sensitivity, as AdaLoRA does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from rankflow.linalg.decompose import overlap_term
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Drop, Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.policies.base import Policy, State
from rankflow.policies.gate import Gate
from rankflow.policies.observation import Observation, Signal

Number = TypeVar("Number", float, Tensor)


def smoothed(i: Number, u: Number, s: Number, beta1: float, beta2: float) -> tuple[Number, Number]:
    """I' = beta1 I + (1 - beta1) s and U' = beta2 U + (1 - beta2) |s - I'| (AdaLoRA, arXiv 2303.10512, eqs. 9, 10)."""
    i = beta1 * i + (1 - beta1) * s  # type: ignore[assignment]
    return i, beta2 * u + (1 - beta2) * abs(s - i)  # type: ignore[return-value]


# What is scored of each direction: its row of A, its column of B, and the gate between them
_PARTS = {
    "A": (Signal.A, Signal.GRAD_A, -2),
    "B": (Signal.B, Signal.GRAD_B, -1),
    "gate": (Signal.GATE, Signal.GATE_GRAD, 0),
}
TRIPLET_SIGNALS = frozenset(signal for *signals, _ in _PARTS.values() for signal in signals)

Orth = Annotated[
    float, Field(ge=0, description="weight of the penalty that keeps A's rows and B's columns orthogonal; 0: off")
]


@dataclass(frozen=True, kw_only=True)
class Triplets(Policy):
    """DeltaW = scaling * B diag(Lambda) A: each direction is a row of A, an entry of Lambda and a column of B, and has
    a score (see `triplet_scores`) from the `window` steps before each event."""

    beta1: Annotated[float, Field(ge=0, lt=1, description="memory of the smoothed sensitivity I")] = 0.85
    beta2: Annotated[float, Field(ge=0, lt=1, description="memory of the uncertainty U")] = 0.85
    orth: Orth = 0.1
    window: Annotated[NonNegativeInt, Field(description="steps before each event that are scored; 0: every step")] = 20

    needs: ClassVar[frozenset[Signal]] = TRIPLET_SIGNALS

    @property
    def gate(self) -> Gate:
        return Gate()

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """orth / 2 (|off A A^T|_F + |off B^T B|_F), the paper's regulariser without its diagonal: that pulls lengths
        to 1, and here they hold the size of DeltaW, which the paper's Lambda does."""
        return overlap_term(self.orth)

    def listen(self, step: int) -> frozenset[Signal]:
        return self.needs if self.when.within(step, self.window) else frozenset()

    def observe(self, state: State, obs: Observation, step: int) -> State:
        return observe_triplets(state, obs, self.beta1, self.beta2)

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        return follow(state, plan)


def observe_triplets(state: State, obs: Observation, beta1: float, beta2: float) -> State:
    """Return `state` after one more step: I and U of every entry of A, B and the gate, in their shapes, under
    ``<module>/<part>/I`` and ``/U``. A module whose step is not finite keeps what it had."""
    state = dict(state)
    for name, signals in obs.items():
        if any(signal not in signals for signal in TRIPLET_SIGNALS):
            continue
        parts = {part: (signals[w] * signals[g]).abs().float() for part, (w, g, _) in _PARTS.items()}
        finite = torch.stack([s.isfinite().all() for s in parts.values()]).all()  # stays on the device: no waiting
        for part, s in parts.items():
            keys = f"{name}/{part}/I", f"{name}/{part}/U"
            old = [state.get(key, torch.zeros_like(s)) for key in keys]
            new = smoothed(old[0], old[1], s, beta1, beta2)
            for key, was, now in zip(keys, old, new, strict=True):
                state[key] = torch.where(finite, now, was)
    return state


def triplet_scores(state: State) -> dict[str, Tensor]:
    """Return the score ``[r]`` of every direction seen, by module: I * U of its gate, plus the means of I * U over its
    row of A and its column of B (AdaLoRA, eq. 8 and its code)."""
    scores: dict[str, Tensor] = {}
    for key in state:
        name, _, rest = key.rpartition("/gate/")
        if rest != "I":
            continue
        entries = {part: state[f"{name}/{part}/I"] * state[f"{name}/{part}/U"] for part in _PARTS}
        rows, columns = entries["A"].mean(-1), entries["B"].mean(-2)
        while rows.dim() > 1:  # over experts, which have one rank
            rows, columns = rows.mean(0), columns.mean(0)
        scores[name] = (entries["gate"] + rows + columns).double()
    return scores


def follow(state: State, plan: RankPlan) -> State:
    """Return the state of `observe_triplets` after `plan`. Directions that stay keep their values, new ones start at
    0."""
    state = dict(state)
    for name, ops in plan.ops.items():
        for part, (_, _, dim) in _PARTS.items():
            for key in (f"{name}/{part}/I", f"{name}/{part}/U"):
                if key not in state:
                    continue
                for op in ops:
                    t = state.get(key)
                    if t is None or isinstance(op, Drop):
                        state.pop(key, None)
                    elif isinstance(op, Keep):
                        state[key] = t.index_select(dim, torch.tensor(op.idx, device=t.device))
                    elif isinstance(op, Grow):
                        shape = list(t.shape)
                        shape[dim] = op.n
                        state[key] = torch.cat([t, t.new_zeros(shape)], dim)
    return state


def measured(scores: Mapping[str, Tensor]) -> bool:
    """Return whether there is something to decide on: all scores are finite, and some are above 0."""
    return all(bool(t.isfinite().all()) for t in scores.values()) and any(bool(t.any()) for t in scores.values())


def frozen_last(scores: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the scores of all modules in the adapter. A frozen module cannot be judged and goes last: its directions
    score above the best of all others. A module that trains and that no gradient has reached is worth nothing."""
    top = 2 * max((float(t.max()) for t in scores.values()), default=0.0)
    found = {}
    for name, slot in layout.items():
        if slot.rank > 0:
            blank = torch.full((slot.rank,), 0.0 if slot.trainable else top, dtype=torch.float64)
            found[name] = scores.get(name, blank) if slot.trainable else blank
    return found
