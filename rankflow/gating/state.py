"""The parameters of a module's gate and Adam's state of them, through a resize."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankflow.plans.ops import Drop, Grow, Keep, Op, Open
from rankflow.policies.gate import Gate

Change = Callable[[str, Tensor], Tensor]  # of what belongs to the parameter of that name


@dataclass(frozen=True)
class GateState:
    """Parameters of one module's gate by name, none where it has left, and Adam's entries of each."""

    gate: Gate
    theta: Mapping[str, Tensor]
    adam: Mapping[str, Mapping[str, Any]]

    def copy(self) -> GateState:
        """Return a copy whose tensors updates in place do not reach."""
        return self._map(lambda key, t: t.clone(), lambda key, t: t.clone() if isinstance(t, Tensor) else t)

    def through(self, ops: Iterable[Op], fresh: Callable[[int], Mapping[str, Tensor]]) -> GateState:
        """Return the state after `ops`; `fresh(n)` gives the parameters of n new directions."""
        out = self
        for op in ops:
            match op:
                case Drop():
                    out = GateState(self.gate, {}, {})
                case Keep():
                    out = out._keep(op)
                case Open():
                    out = out._open(op)
                case Grow():
                    out = out._grow(fresh(op.n))
        return out

    def _keep(self, op: Keep) -> GateState:
        return self._each(lambda key, t: t[list(op.idx)], lambda key, t: t[list(op.idx)])

    def _open(self, op: Open) -> GateState:
        def fill(value: float) -> Change:
            return lambda key, t: t.index_fill(0, torch.tensor(op.idx, device=t.device), value) if key == "value" else t

        return self._each(fill(op.to), fill(0.0))

    def _grow(self, fresh: Mapping[str, Tensor]) -> GateState:
        if not self.theta:
            return replace(self, theta=fresh)
        return self._each(
            lambda key, t: torch.cat([t, fresh[key]]), lambda key, t: torch.cat([t, torch.zeros_like(fresh[key])])
        )

    def _each(self, theta: Change, adam: Change) -> GateState:
        """Change the directions of all that has some: not a module's own parameter, nor a step count."""

        def along(change: Change, key: str, t: Any) -> Any:
            per_direction = self.gate.scope == "component" and key in self.gate.per_direction
            return change(key, t) if per_direction and isinstance(t, Tensor) and t.dim() > 0 else t

        return self._map(partial(along, theta), partial(along, adam))

    def _map(self, theta: Callable[[str, Any], Any], adam: Callable[[str, Any], Any]) -> GateState:
        return GateState(
            self.gate,
            {key: theta(key, t) for key, t in self.theta.items()},
            {key: {e: adam(key, t) for e, t in entries.items()} for key, entries in self.adam.items()},
        )
