"""How an optimizer stores what `Moments` are: the base of all handlers, which `rankflow.optim.handlers` has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankflow.linalg.decompose import Factor
from rankflow.optim.moments import Moments, View

State = Mapping[str, Any]


@dataclass(frozen=True)
class Refused:
    """What stands in a handler's place for an optimizer that no resize can be carried through."""

    why: str


@dataclass(frozen=True)
class Handler:
    """State of an optimizer that treats every entry alike: any of a first moment, a second and the second's peak,
    points beside the parameter that move as it does, and squares of the lengths of its steps.

    What the optimizer keeps of the second moment or of steps as a size, not as a square, is among `roots`.
    """

    first: str | None = None
    second: str | None = None
    peak: str | None = None
    points: tuple[str, ...] = ()
    strides: tuple[str, ...] = ()
    roots: frozenset[str] = frozenset()
    betas: bool = False  # bias-corrected by beta^step
    eager: bool = False  # makes its state when it is made itself, and fails without
    shape_dependent: bool = False  # steps by an amount that depends on the parameter's shape
    elementwise: bool = True  # steps each entry by what that entry alone has seen

    @property
    def keys(self) -> set[str]:
        """Keys of the state tensors that this handler carries."""
        return {key for key in (self.first, self.second, self.peak, *self.points, *self.strides) if key is not None}

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        held = {k: canonical(state[k]) for k in self.keys if isinstance(state.get(k), Tensor)}
        held |= {k: _squared(held[k]) for k in self.roots if k in held}
        first = {k: m for k, m in held.items() if k == self.first}
        bias = (1.0, 1.0)
        if self.betas and (step := float(state["step"])) > 0:
            beta1, beta2 = map(float, group["betas"])
            bias = (1 - beta1**step, 1.0 if self.second in self.roots else 1 - beta2**step)  # a maximum has no bias
        second, peak = (held.get(k) if k else None for k in (self.second, self.peak))
        points, strides = ({k: held[k] for k in keys if k in held} for keys in (self.points, self.strides))
        return Moments(factor, first, second, peak, self.first, bias, points, strides)

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        """Return `state` with these moments in it and the rest as it is."""
        held = {**moments.first, **moments.points, **moments.strides}
        squares = ((self.second, moments.second), (self.peak, moments.peak))
        held |= {key: t for key, t in squares if key is not None and t is not None}
        held |= {key: _root(held[key], state[key].dtype) for key in self.roots if key in held}
        return {**state, **{key: raw(t).contiguous() for key, t in held.items()}}

    def refusal(self, p: Tensor) -> str | None:
        """Return what the optimizer knows of `p` outside of its groups and state, which a resize would lose, or
        None."""
        return None

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Shape of every state tensor of a parameter of `shape`."""
        return dict.fromkeys(self.keys, tuple(shape))

    def fresh(self, p: Tensor, group: State, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of a parameter that has not taken a step; empty if the optimizer makes it by itself."""
        if not self.eager:
            return {}
        start = group.get("initial_accumulator_value", optimizer.defaults.get("initial_accumulator_value", 0.0))
        step = torch.zeros((), device=p.device if group.get("fused") else "cpu")
        return {"step": step, **{key: torch.full_like(p, start, requires_grad=False) for key in self.keys}}

    def shape_factor(self, group: State, shape: torch.Size) -> float:
        """What the step is multiplied by because of the parameter's shape."""
        return 1.0

    def rank_exponent(self, group: State) -> float:
        """The power of the rank with which the step of DeltaW grows where the scaling stays (a new row of A and column
        of B a direction, all steps alike: the root of their number)."""
        return 0.5

    def decay(self, group: State) -> float:
        """What the parameter is multiplied by in a step, apart from the update that `shape_factor` scales."""
        return 1.0


def _squared(t: Tensor) -> Tensor:
    """Return the square in float64, whose root is the same number again."""
    return t.double().square().clamp(max=torch.finfo(torch.float64).max)


def _root(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.sqrt().clamp(max=torch.finfo(dtype).max).to(dtype)


class InGradientUnits(Handler):
    """Carry a buffer of past *updates*, g / sqrt(v), multiplied by sqrt(v), which maps as gradients do.

    No entry of the buffer grows beyond the largest there was, as with |m| / sqrt(v) elsewhere.
    """

    def _to_gradient(self, update: Tensor, v: Tensor, eps: float) -> Tensor:
        return update.double() * (v.double().clamp(min=0).sqrt() + eps)

    def _to_update(self, gradient: Tensor, v: Tensor, eps: float, like: Tensor) -> Tensor:
        root = v.double().clamp(min=0).sqrt() + eps
        update = torch.where(root > 0, gradient / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        bound = float(like.abs().max()) if like.numel() else 0.0
        return update.clamp(-bound, bound).to(like.dtype)
