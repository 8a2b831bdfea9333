"""rankflow: the rank of LoRA adapters, managed instead of guessed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rankflow.analysis.difference import diff
    from rankflow.analysis.inspection import inspect
    from rankflow.calibration.collect import calibrate, save_statistics
    from rankflow.calibration.statistics import Statistics
    from rankflow.compress.live import squeeze_model
    from rankflow.compress.quantized import load_quantized, save_quantized
    from rankflow.compress.residual import expand
    from rankflow.compress.squeeze import canonicalize, pad, squeeze, squeeze_each
    from rankflow.compress.target import Target
    from rankflow.config.load import load_policy
    from rankflow.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DistributedError,
        OptimizerError,
        PlanError,
        RankFlowError,
    )
    from rankflow.plans.layout import Layout, Slot
    from rankflow.plans.plan import RankPlan
    from rankflow.policies.base import Policy
    from rankflow.policies.gate import Gate
    from rankflow.policies.observation import Observation, Signal, Study
    from rankflow.serving.verdicts import check
    from rankflow.surgery.ema import averaged_model
    from rankflow.surgery.resize import resize
    from rankflow.training.attach import attach, detach
    from rankflow.training.checkpoint import restore
    from rankflow.training.controller import Controller
    from rankflow.training.ledger import Ledger
    from rankflow.training.trainer import RankFlowCallback

# Loaded on first use: torch and transformers take seconds, `rankflow --help` should not.
_HOME = {
    "attach": "training.attach",
    "detach": "training.attach",
    "averaged_model": "surgery.ema",
    "RankFlowCallback": "training.trainer",
    "restore": "training.checkpoint",
    "load_quantized": "compress.quantized",
    "save_quantized": "compress.quantized",
    "resize": "surgery.resize",
    "calibrate": "calibration.collect",
    "save_statistics": "calibration.collect",
    "canonicalize": "compress.squeeze",
    "check": "serving.verdicts",
    "diff": "analysis.difference",
    "expand": "compress.residual",
    "pad": "compress.squeeze",
    "squeeze": "compress.squeeze",
    "squeeze_each": "compress.squeeze",
    "squeeze_model": "compress.live",
    "Target": "compress.target",
    "inspect": "analysis.inspection",
    "load_policy": "config.load",
    "Controller": "training.controller",
    "Ledger": "training.ledger",
    "Statistics": "calibration.statistics",
    "Layout": "plans.plan",
    "RankPlan": "plans.plan",
    "Slot": "plans.plan",
    "Gate": "policies.gate",
    "Observation": "policies.base",
    "Policy": "policies.base",
    "Signal": "policies.base",
    "Study": "policies.base",
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
