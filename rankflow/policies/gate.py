"""Gates between A and B: DeltaW = scaling * B' diag(v) A', where v has a value per direction or per module, and the
gate makes A' and B' from A and B.

A gate is pure: parameters, noise and factors in, numbers out. Who holds its parameters, trains them and folds them into
plain factors is the runtime's business (`rankflow.gating`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankflow.plans.layout import Slot

Theta = Mapping[str, Tensor]  # a gate's parameters of one module, float32
Draw = Mapping[str, Tensor]  # what one module's forward uses of them, for one forward pass


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Base of all gates: a value per direction (scope `component`) or per module, its parameters the values themselves.

    Subclasses override what differs. `theta` entries named in `per_direction` are ``[r, ...]`` and follow the
    directions through every resize; others belong to the module.
    """

    scope: Literal["component", "module"] = "component"
    trained_on: Literal["inner", "outer", "nothing"] = "inner"  # training batches, held-out ones, or not at all
    lr: float | None = None  # None: the rate in force for the module's A
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    per_direction: ClassVar[frozenset[str]] = frozenset({"value"})

    def init(self, slot: Slot, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gate's parameters for `slot.rank` directions: those of a module, or the new ones of a module that
        grows."""
        return {"value": torch.ones(slot.rank if self.scope == "component" else 1)}

    def calibrate(self, theta: Theta, A: Tensor, B: Tensor) -> Theta:
        """Return the parameters that depend on the factors that a module has when it comes under the gate, A ``[*e, r,
        in]`` and B ``[*e, out, r]``. Those that are not returned stay as `init` made them."""
        return {}

    # -- in the forward pass ----------------------------------------------------------------------------------------

    def noisy(self, step: int) -> bool:
        """Whether training forwards before the `step`-th optimizer step see noise. Evaluation never does."""
        return False

    def noise(self, theta: Theta, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of one module for one forward pass."""
        return {}

    def draw(self, theta: Mapping[str, Theta], noise: Mapping[str, Draw] | None) -> dict[str, dict[str, Tensor]]:
        """Return what the forward of every module uses. It is differentiable in `theta`, and deterministic if `noise`
        is None."""
        return {name: self.draw_one(t, None if noise is None else noise[name]) for name, t in theta.items()}

    def draw_one(self, theta: Theta, noise: Draw | None) -> dict[str, Tensor]:
        """Return what the forward of one module uses, for gates whose modules do not depend on each other."""
        return dict(theta)

    def value(self, draw: Draw) -> Tensor:
        """v ``[r]`` of scope `component`, ``[1]`` of scope `module`."""
        return draw["value"]

    def a(self, draw: Draw, A: Tensor) -> Tensor:
        """diag(v) A' of A ``[*e, r, in]``, in A's dtype."""
        return (self.value(draw)[:, None] * A).to(A.dtype)

    def b(self, draw: Draw, B: Tensor) -> Tensor:
        """B' of B ``[*e, out, r]``, in B's dtype."""
        return B

    def open(self, theta: Theta) -> Tensor:
        """Return which values are on, bool in the shape of v. A direction that is off may be taken out of the
        adapter."""
        return self.value(self.draw_one(theta, None)) != 0

    def score(self, theta: Theta) -> Tensor:
        """Return what values rank by if some of them have to go, float in the shape of v."""
        return self.value(self.draw_one(theta, None)).abs()

    # -- training ---------------------------------------------------------------------------------------------------

    def trains(self, key: str, step: int) -> bool:
        """Whether parameter `key` takes part in the update that goes with the `step`-th optimizer step."""
        return True

    def rate(self, key: str, lr: float) -> float:
        """Learning rate of parameter `key` where that of the module's A is `lr`."""
        return lr if self.lr is None else self.lr

    def penalty(self, theta: Mapping[str, Theta], step: int) -> Tensor | None:
        """Return a term of the loss that depends on the gate alone, or None."""
        return None

    def prox(self, theta: Theta, lr: float, step: int) -> Theta:
        """Return the parameters that change in the proximal step after an update at rate `lr`. The others stay."""
        return {}

    def outer(self, step: int) -> bool:
        """Whether a gate `trained_on` outer is updated on a held-out batch before the `step`-th optimizer step."""
        return self.trained_on == "outer"

    def report(self, theta: Theta) -> dict[str, float]:
        """Return numbers about one module for the ledger. They are read when its gate is folded."""
        return {}

    def total(self, reports: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the numbers of `report` that make sense for all modules together, from the `report` of each."""
        return {}

    def stored(self, theta: Theta, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return A and B in the form in which this gate's factors are best kept in files; empty if floats are."""
        return {}
