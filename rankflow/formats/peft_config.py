"""`adapter_config.json` of PEFT: read with suspicion, and written anew for other ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankflow.errors import AdapterError
from rankflow.patterns import alpha_for, exclude_modules, rank_config

CONFIG = "adapter_config.json"

# Variants whose tensors or base weights depend on the rank or the basis of A and B, by the option that asks for them.
_VARIANTS = {
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
}
_CONVERSIONS = {
    "ADALORA": "fold lora_E into lora_A, leave out lora_E and ranknum, and save that as LORA",
    "None": "this is not the config of a PEFT adapter",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise AdapterError(f"{path}: not JSON ({e}); the file is damaged") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object; the file is damaged")
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = _CONVERSIONS.get(str(kind), "peft's convert_to_lora makes a LoRA of most other types")
        raise AdapterError(f"{path}: peft_type is {kind!r} and only LORA can be resized; {hint}")
    for option, variant in _VARIANTS.items():
        if config.get(option):
            raise AdapterError(
                f"{path}: {option} makes this {variant}, which keeps more than A and B per rank and cannot be resized"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"{path}: init_lora_weights is {init!r}, with which loading changes the base weights by an amount that "
            "depends on the rank; save the adapter with path_initial_model_for_weight_conversion first"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = config.get(field) or {}
        if not isinstance(config[field], dict):
            raise AdapterError(f"{path}: {field} is not a mapping of names to numbers")
    for field, values in (
        ("r", [config.get("r"), *config["rank_pattern"].values()]),
        ("lora_alpha", [config.get("lora_alpha"), *config["alpha_pattern"].values()]),
    ):
        for v in values:
            if isinstance(v, bool) or not isinstance(v, int if field == "r" else int | float) or not 0 < v < math.inf:
                raise AdapterError(f"{path}: {field} (or a pattern of it) is {v!r}; it must be a positive number")
    return config


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """A pattern's value for a module, by PEFT's own rule."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # seconds of imports; most adapters have no patterns

    return patterns.get(get_pattern_key(list(patterns), name), default)


def wrapped_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Parameters of `module` that the config's `target_parameters` name, by PEFT's rule (whole name, or its end)."""
    named = [str(target).rpartition(".") for target in config.get("target_parameters") or []]
    return [p for owner, _, p in named if owner and (module == owner or module.endswith(f".{owner}"))]


def resized_config(
    config: Mapping[str, Any], modules: Mapping[str, tuple[Sequence[str], float]], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The adapter's config at other ranks, every module's scaling as it was.

    `modules` maps a name to (the names PEFT matches patterns against, scaling).
    """
    present = [name for name in modules if ranks[name]]
    absent = [name for name in modules if not ranks[name]]
    matched = {key: (ranks[name], modules[name][1]) for name in present for key in modules[name][0]}
    rslora = bool(config.get("use_rslora"))
    fields = rank_config(
        {key: rank for key, (rank, _) in matched.items()},
        {key: alpha_for(scaling, rank, rslora) for key, (rank, scaling) in matched.items()},
    )
    new = {**config, **fields._asdict()}
    if absent:
        new["exclude_modules"] = exclude_modules(config.get("exclude_modules"), present, absent)
    if config.get("init_lora_weights") == "orthogonal":
        new["init_lora_weights"] = True  # loading would refuse odd ranks, and all weights come from the file anyway
    return new
