"""RMSprop: a second moment, and with momentum a buffer of past updates."""

from __future__ import annotations

from typing import Any

import torch

from rankflow.linalg.decompose import Factor
from rankflow.optim.handler import InGradientUnits, State
from rankflow.optim.moments import Moments, View


class RMSpropHandler(InGradientUnits):
    """RMSprop. The centred form divides by the root of v - m^2: the variance is mapped and m'^2 added, so it stays >=
    0."""

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


HANDLERS = {"torch.optim.RMSprop": RMSpropHandler()}
