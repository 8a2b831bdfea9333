"""rankflow: the rank of LoRA adapters, managed instead of guessed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankflow.checkpoint import squeeze, squeeze_model
    from rankflow.config import load_policy
    from rankflow.controller import Controller
    from rankflow.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        OptimizerError,
        PlanError,
        RankFlowError,
    )
    from rankflow.gate import Gate
    from rankflow.inspection import inspect
    from rankflow.ledger import Ledger
    from rankflow.loop import attach
    from rankflow.plan import Layout, RankPlan, Slot
    from rankflow.policy import Observation, Policy, Signal, Study
    from rankflow.quantized import load_quantized, save_quantized
    from rankflow.resume import restore
    from rankflow.surgeon import resize
    from rankflow.trainer import RankFlowCallback

# Loaded on first use: torch and transformers take seconds, `rankflow --help` should not.
_HOME = {
    "attach": "loop",
    "RankFlowCallback": "trainer",
    "restore": "resume",
    "load_quantized": "quantized",
    "save_quantized": "quantized",
    "resize": "surgeon",
    "squeeze": "checkpoint",
    "squeeze_model": "checkpoint",
    "inspect": "inspection",
    "load_policy": "config",
    "Controller": "controller",
    "Ledger": "ledger",
    "Layout": "plan",
    "RankPlan": "plan",
    "Slot": "plan",
    "Gate": "gate",
    "Observation": "policy",
    "Policy": "policy",
    "Signal": "policy",
    "Study": "policy",
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "OptimizerError": "errors",
    "PlanError": "errors",
    "RankFlowError": "errors",
}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "Controller",
    "Gate",
    "Layout",
    "Ledger",
    "Observation",
    "OptimizerError",
    "PlanError",
    "Policy",
    "RankFlowCallback",
    "RankFlowError",
    "RankPlan",
    "Signal",
    "Slot",
    "Study",
    "attach",
    "inspect",
    "load_policy",
    "load_quantized",
    "resize",
    "restore",
    "save_quantized",
    "squeeze",
    "squeeze_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rankflow.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
