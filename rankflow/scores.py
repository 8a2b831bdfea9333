"""Importance: sensitivity |w * dL/dw|, smoothed over steps and weighted by how uncertain it is (AdaLoRA's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from rankflow.plan import Drop, Grow, Keep, RankPlan
from rankflow.policy import Observation, Signal, State

Number = TypeVar("Number", float, Tensor)

# What is scored of each direction: its row of A, its column of B, and the gate between them
_PARTS = {
    "A": (Signal.A, Signal.GRAD_A, -2),
    "B": (Signal.B, Signal.GRAD_B, -1),
    "gate": (Signal.GATE, Signal.GATE_GRAD, 0),
}
TRIPLET_SIGNALS = frozenset(signal for *signals, _ in _PARTS.values() for signal in signals)


def smoothed(i: Number, u: Number, s: Number, beta1: float, beta2: float) -> tuple[Number, Number]:
    """I' = beta1 I + (1 - beta1) s and U' = beta2 U + (1 - beta2) |s - I'| (AdaLoRA, arXiv 2303.10512, eqs. 9, 10)."""
    i = beta1 * i + (1 - beta1) * s  # type: ignore[assignment]
    return i, beta2 * u + (1 - beta2) * abs(s - i)  # type: ignore[return-value]


def observe_triplets(state: State, obs: Observation, beta1: float, beta2: float) -> State:
    """`state` after one more step: I and U of every entry of A, B and the gate, each of its own shape, under
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
    """Score ``[r]`` of every direction seen: that of its gate plus the means over its row of A and its column of B,
    each entry's being I * U (AdaLoRA, eq. 8 and its code)."""
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
    """`state` of `observe_triplets` after `plan`: directions that stay keep theirs, new ones start at 0."""
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
    """Whether there is anything to decide on: a score above 0, and none that is not finite."""
    return all(bool(t.isfinite().all()) for t in scores.values()) and any(bool(t.any()) for t in scores.values())


def complete(scores: Mapping[str, Tensor], present: Mapping[str, int]) -> dict[str, Tensor]:
    """`scores` with zeros for modules of rank > 0 that were not seen."""
    return {name: scores.get(name, torch.zeros(r, dtype=torch.float64)) for name, r in present.items() if r > 0}
