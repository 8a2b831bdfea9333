"""How optimizers store what `Moments` are, one small handler per family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankflow.linalg.decompose import Factor
from rankflow.optim.moments import Moments, View

State = Mapping[str, Any]


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
        """`state` with these moments in it, the rest as it is."""
        held = {**moments.first, **moments.points, **moments.strides}
        squares = ((self.second, moments.second), (self.peak, moments.peak))
        held |= {key: t for key, t in squares if key is not None and t is not None}
        held |= {key: _root(held[key], state[key].dtype) for key in self.roots if key in held}
        return {**state, **{key: raw(t).contiguous() for key, t in held.items()}}

    def refusal(self, p: Tensor) -> str | None:
        """What the optimizer knows of `p` outside of groups and state, which a resize would lose."""
        return None

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Shape of every state tensor of a parameter of `shape`."""
        return dict.fromkeys(self.keys, tuple(shape))

    def fresh(self, p: Tensor, group: State, optimizer: Optimizer) -> dict[str, Any]:
        """State of a parameter that never took a step; empty where the optimizer makes it by itself."""
        if not self.eager:
            return {}
        start = group.get("initial_accumulator_value", optimizer.defaults.get("initial_accumulator_value", 0.0))
        step = torch.zeros((), device=p.device if group.get("fused") else "cpu")
        return {"step": step, **{key: torch.full_like(p, start, requires_grad=False) for key in self.keys}}

    def shape_factor(self, group: State, shape: torch.Size) -> float:
        """What the step is multiplied by because of the parameter's shape."""
        return 1.0

    def decay(self, group: State) -> float:
        """What the parameter is multiplied by in a step, apart from the update that `shape_factor` scales."""
        return 1.0


def _squared(t: Tensor) -> Tensor:
    """In float64, of which the root is the number it was."""
    return t.double().square().clamp(max=torch.finfo(torch.float64).max)


def _root(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.sqrt().clamp(max=torch.finfo(dtype).max).to(dtype)


class RpropHandler(Handler):
    """Rprop, whose steps are as long as it has found to be good for each entry, within limits; a direction that has not
    stepped yet starts at the learning rate, as the optimizer has it."""

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        start = float(group["lr"]) ** 2
        steps = {key: torch.where(s > 0, s, start) for key, s in moments.strides.items()}
        new = super().store(replace(moments, strides=steps), state, group, raw)
        least, most = group["step_sizes"]
        return {**new, **{key: new[key].clamp(least, most) for key in steps}}


class MuonHandler(Handler):
    """torch's Muon, whose step depends on the parameter's shape by a factor (out / r for B)."""

    def shape_factor(self, group: State, shape: torch.Size) -> float:
        from torch.optim._muon import _adjust_lr  # torch's own rule, which has changed before

        return float(_adjust_lr(1.0, group["adjust_lr_fn"], shape))

    def decay(self, group: State) -> float:
        return 1.0 - float(group["lr"]) * float(group["weight_decay"])


class _InGradientUnits(Handler):
    """Carries a buffer of past *updates*, g / sqrt(v), as sqrt(v) times itself, which maps as gradients do.

    No entry of the buffer grows beyond the largest there was, as with |m| / sqrt(v) elsewhere.
    """

    def _to_gradient(self, update: Tensor, v: Tensor, eps: float) -> Tensor:
        return update.double() * (v.double().clamp(min=0).sqrt() + eps)

    def _to_update(self, gradient: Tensor, v: Tensor, eps: float, like: Tensor) -> Tensor:
        root = v.double().clamp(min=0).sqrt() + eps
        update = torch.where(root > 0, gradient / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        bound = float(like.abs().max()) if like.numel() else 0.0
        return update.clamp(-bound, bound).to(like.dtype)


class RMSpropHandler(_InGradientUnits):
    """Centred, it divides by the root of v - m^2: the variance is mapped and m'^2 added, so it stays >= 0."""

    @property
    def keys(self) -> set[str]:
        return {"square_avg", "grad_avg", "momentum_buffer"}

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        v, first = canonical(state["square_avg"]).double(), {}
        if group["centered"]:
            m = canonical(state["grad_avg"]).double()
            first["grad_avg"], v = m, (v - m.square()).clamp(min=0)
        if group["momentum"] > 0:
            buffer = canonical(state["momentum_buffer"])
            first["momentum_buffer"] = self._to_gradient(buffer, v, group["eps"])
        return Moments(factor, first, v)

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        v = moments.second
        assert v is not None
        new = dict(state)
        if "momentum_buffer" in moments.first:
            old = state["momentum_buffer"]
            buffer = self._to_update(moments.first["momentum_buffer"], v, group["eps"], old)
            new["momentum_buffer"] = raw(buffer).contiguous()
        if "grad_avg" in moments.first:
            m = moments.first["grad_avg"].to(state["grad_avg"].dtype)
            new["grad_avg"] = raw(m).contiguous()
            # The optimizer takes the root of v - m^2 in its own precision: rounding must not make that negative
            square = m.double().square()
            v = torch.maximum(v + square, square * (1 + 8 * torch.finfo(m.dtype).eps))
        new["square_avg"] = raw(v.to(state["square_avg"].dtype)).contiguous()
        return new


class AdafactorHandler(_InGradientUnits):
    """Second moments kept as row and column means over the last two dimensions: spread out, mapped, averaged again.

    Spread out they are row col / mean(row), which every map keeps of that form; only grown directions are fitted.
    """

    row_key, col_key = "row_var", "col_var"

    @property
    def keys(self) -> set[str]:
        return {self.row_key, self.col_key}

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {self.row_key: (*shape[:-1], 1), self.col_key: (*shape[:-2], 1, shape[-1])}

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        row, col = (self._spread(state[key].double(), key) for key in (self.row_key, self.col_key))
        mean = row.mean(-2, keepdim=True)
        return Moments(factor, {}, canonical(torch.where(mean > 0, row * col / mean, 0.0)))

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        assert moments.second is not None
        v = raw(moments.second)
        row, col = v.mean(-1, keepdim=True), v.mean(-2, keepdim=True)
        packed = {self.row_key: self._pack(row, self.row_key), self.col_key: self._pack(col, self.col_key)}
        return {**state, **{key: t.to(state[key].dtype).contiguous() for key, t in packed.items()}}

    def _spread(self, t: Tensor, key: str) -> Tensor:
        return t

    def _pack(self, t: Tensor, key: str) -> Tensor:
        return t


class TransformersAdafactorHandler(AdafactorHandler):
    """The same without the kept dimension of size 1, and with `beta1` an average of past updates."""

    row_key, col_key = "exp_avg_sq_row", "exp_avg_sq_col"

    @property
    def keys(self) -> set[str]:
        return {*super().keys, "exp_avg"}

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {
            self.row_key: tuple(shape[:-1]),
            self.col_key: (*shape[:-2], shape[-1]),
            "exp_avg": tuple(shape),
        }

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        moments = super().load(factor, state, group, canonical)
        if "exp_avg" not in state:
            return moments
        assert moments.second is not None
        update = canonical(state["exp_avg"])
        return replace(moments, first={"exp_avg": self._to_gradient(update, moments.second, 0.0)})

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        new = super().store(moments, state, group, raw)
        if "exp_avg" in moments.first:
            assert moments.second is not None
            update = self._to_update(moments.first["exp_avg"], moments.second, 0.0, state["exp_avg"])
            new["exp_avg"] = raw(update).contiguous()
        return new

    def _spread(self, t: Tensor, key: str) -> Tensor:
        return t.unsqueeze(-1 if key == self.row_key else -2)

    def _pack(self, t: Tensor, key: str) -> Tensor:
        return t.squeeze(-1 if key == self.row_key else -2)
