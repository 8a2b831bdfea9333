"""Rprop: a length of step for each entry, and the sign of its last gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rankflow.optim.handler import Handler, State
from rankflow.optim.moments import Moments, View


class RpropHandler(Handler):
    """Rprop, which keeps the length of the step of each entry, within limits. A direction that has not stepped yet
    starts with the learning rate, as in the optimizer."""

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        start = float(group["lr"]) ** 2
        steps = {key: torch.where(s > 0, s, start) for key, s in moments.strides.items()}
        new = super().store(replace(moments, strides=steps), state, group, raw)
        least, most = group["step_sizes"]
        return {**new, **{key: new[key].clamp(least, most) for key in steps}}


HANDLERS = {"torch.optim.Rprop": RpropHandler("prev", strides=("step_size",), roots=frozenset({"step_size"}))}
