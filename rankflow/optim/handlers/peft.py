"""PEFT's own optimizers that hold parameters, or state by name, outside of groups and state."""

from __future__ import annotations

from rankflow.optim.handler import Refused

HANDLERS = {
    "peft.LoraFAOptimizer": Refused("LoRA-FA keeps A frozen, its state by name and one scaling per pair"),
    "peft.RiemannianPreconditionedOptimizer": Refused("it holds the (A, B) pairs themselves, which a resize replaces"),
}
