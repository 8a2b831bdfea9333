"""rankflow: the rank of LoRA adapters, managed instead of guessed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rankflow.calibration import calibrate, save_statistics
    from rankflow.checkpoint import canonicalize, pad, squeeze, squeeze_each
    from rankflow.config import load_policy
    from rankflow.controller import Controller
    from rankflow.difference import diff
    from rankflow.ema import averaged_model
    from rankflow.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DistributedError,
        OptimizerError,
        PlanError,
        RankFlowError,
    )
    from rankflow.gate import Gate
    from rankflow.in_memory import squeeze_model
    from rankflow.inspection import inspect
    from rankflow.ledger import Ledger
    from rankflow.loop import attach, detach
    from rankflow.measured import Statistics
    from rankflow.plan import Layout, RankPlan, Slot
    from rankflow.policy import Observation, Policy, Signal, Study
    from rankflow.quantized import load_quantized, save_quantized
    from rankflow.resume import restore
    from rankflow.surgeon import resize
    from rankflow.tails import expand
    from rankflow.targets import Target
    from rankflow.trainer import RankFlowCallback
    from rankflow.verdicts import check

# Loaded on first use: torch and transformers take seconds, `rankflow --help` should not.
_HOME = {
    "attach": "loop",
    "detach": "loop",
    "averaged_model": "ema",
    "RankFlowCallback": "trainer",
    "restore": "resume",
    "load_quantized": "quantized",
    "save_quantized": "quantized",
    "resize": "surgeon",
    "calibrate": "calibration",
    "save_statistics": "calibration",
    "canonicalize": "checkpoint",
    "check": "verdicts",
    "diff": "difference",
    "expand": "tails",
    "pad": "checkpoint",
    "squeeze": "checkpoint",
    "squeeze_each": "checkpoint",
    "squeeze_model": "in_memory",
    "Target": "targets",
    "inspect": "inspection",
    "load_policy": "config",
    "Controller": "controller",
    "Ledger": "ledger",
    "Statistics": "measured",
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
    "DistributedError": "errors",
    "OptimizerError": "errors",
    "PlanError": "errors",
    "RankFlowError": "errors",
}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "Controller",
    "DistributedError",
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
    "Statistics",
    "Study",
    "Target",
    "attach",
    "averaged_model",
    "calibrate",
    "canonicalize",
    "check",
    "detach",
    "diff",
    "expand",
    "inspect",
    "load_policy",
    "load_quantized",
    "pad",
    "resize",
    "restore",
    "save_quantized",
    "save_statistics",
    "squeeze",
    "squeeze_each",
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
