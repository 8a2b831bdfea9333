"""`adapter_config.json` of PEFT: read with suspicion, and written anew for other ranks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.base import is_scale
from rankflow.formats.io.strict_json import read_text, strict_loads
from rankflow.plans.peft_inits import loadable_init, refuse_init
from rankflow.plans.peft_patterns import alpha_for, compiled, exclude_modules, matches, rank_config

CONFIG = "adapter_config.json"

# Variants whose tensors or base weights depend on the rank or the basis of A and B, by the option that asks for them.
VARIANTS = {
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
}
_FOREIGN = {
    "enable_lora": "a MergedLinear of PEFT 0.2, which adapts some of q, k and v in one layer by a grouped convolution; "
    "load it with that, merge it into its base model, and give rankflow that with --from-format full and --base",
    "fine_tune_type": "an adapter of mlx-lm, whose factors lie transposed; merge it with mlx_lm.fuse, and give "
    "rankflow that with --from-format full and --base, or convert it to PEFT's format",
}
_CONVERSIONS = {
    "None": "this is not the config of a PEFT adapter",
}
# Fields that name modules, and whether a single expression may stand for a list.
_NAMES = {
    "target_modules": True,
    "exclude_modules": True,
    "layers_pattern": True,
    "target_parameters": False,
    "modules_to_save": False,
}
_MOST_CHARACTERS = 1 << 22  # of a field's expressions, each of which is compiled
_MOST_LAYERS = 10_000  # that replication may come to, each of which is made


# Whole numbers, which some writers of JSON give a fraction of 0
_WHOLE = ("r", "init_r", "target_r", "topk", "hybrid_r", "mini_r", "num_vectors", "vector_length", "gralora_k")


def load_config(path: Path) -> dict[str, Any]:
    """Return the config with its type and its whole numbers as PEFT writes them.

    Raises:
        AdapterError: it is not a JSON object, or that of another program's adapter.
    """
    return as_peft_writes(read_config(path))


def as_peft_writes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with ``"peft_type": "lora"`` in capitals, and ``"r": 4.0`` whole."""
    new = dict(config)
    if isinstance(new.get("peft_type"), str):
        new["peft_type"] = new["peft_type"].upper()
    new |= {field: _whole(new[field]) for field in _WHOLE if field in new}
    if isinstance(new.get("rank_pattern"), dict):
        new["rank_pattern"] = {name: _whole(rank) for name, rank in new["rank_pattern"].items()}
    return new


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_config(path: Path) -> dict[str, Any]:
    """Return the config as the file has it.

    Raises:
        AdapterError: it is not a JSON object, or that of another program's adapter.
    """
    try:
        config = strict_loads(read_text(path))
    except (ValueError, OSError) as e:
        raise AdapterError(f"{path}: not JSON ({e}); the file is damaged") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object; the file is damaged")
    for field, what in _FOREIGN.items():
        if config.get(field) is not None:
            raise AdapterError(f"{path}: {field} makes this {what}")
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise AdapterError(f"{path}: base_model_name_or_path is {repr(base)[:80]}; it must be a name or a folder")
    _check_names(config, path)
    return config


def check_config(config: Mapping[str, Any], path: Path | str, *, any_init: bool = False) -> dict[str, Any]:
    """The config with its patterns filled in; `path` is for messages.

    Raises:
        AdapterError: not that of a LoRA, or of one that cannot be resized; with `any_init`, for another reason than how
            it was started.
    """
    config = dict(config)
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = _CONVERSIONS.get(str(kind), "peft's convert_to_lora makes a LoRA of most other types")
        raise AdapterError(f"{path}: peft_type is {str(kind)[:80]!r} and no LoRA is known that it equals; {hint}")
    for option, variant in VARIANTS.items():
        if config.get(option):
            raise AdapterError(
                f"{path}: {option} makes this {variant}, which keeps more than A and B per rank and cannot be resized"
            )
    if not any_init:
        refuse_init(config.get("init_lora_weights"), path)
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = patterns_of(config, field, path)
    _check_names(config, path)
    for field, values in (
        ("r", [config.get("r"), *config["rank_pattern"].values()]),
        ("lora_alpha", [config.get("lora_alpha"), *config["alpha_pattern"].values()]),
    ):
        for v in values:
            if not is_scale(v) or (field == "r" and not isinstance(v, int)):
                raise AdapterError(
                    f"{path}: {field} (or a pattern of it) is {repr(v)[:80]}; it must be a positive number"
                )
    return config


def _check_names(config: Mapping[str, Any], path: Path | str) -> None:
    for field, lone in _NAMES.items():
        value = config.get(field)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if value is not None and not names and not (lone and isinstance(value, str)):
            raise AdapterError(f"{path}: {field} is {str(value)[:80]!r}; it must be a list of names")
        # PEFT matches these without looking at what they cost, so an output that has them must not have others
        expressions = [value] if isinstance(value, str) else value or [] if field == "layers_pattern" else []
        _check_expressions(expressions, field, path)
    _check_layers(config, path)


def _check_expressions(expressions: Collection[str], field: str, path: Path | str) -> None:
    if (length := sum(map(len, expressions))) > _MOST_CHARACTERS:
        raise AdapterError(
            f"{path}: {field} has expressions of {length:,} characters, of at most {_MOST_CHARACTERS:,}; shorten them"
        )
    try:
        for expression in expressions:
            compiled(_as_peft_reads(expression))
    except ConfigError as e:
        raise AdapterError(f"{path}: {field}: {e}") from None


def _check_layers(config: Mapping[str, Any], path: Path | str) -> None:
    """Check that layers are numbers, and no more than a model may have."""
    chosen, copied = config.get("layers_to_transform"), config.get("layer_replication") or []
    whole = [chosen] if isinstance(chosen, int) else chosen or []
    if not isinstance(whole, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in whole):
        raise AdapterError(f"{path}: layers_to_transform is {repr(chosen)[:80]}; it must be numbers of layers")
    ranges = isinstance(copied, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) and 0 <= pair[0] <= pair[1]
        for pair in copied
    )
    if not ranges:
        raise AdapterError(f"{path}: layer_replication is {repr(copied)[:80]}; it must be pairs of numbers of layers")
    if (count := sum(end - start for start, end in copied)) > _MOST_LAYERS:
        raise AdapterError(f"{path}: layer_replication comes to {count:.6g} layers, of at most {_MOST_LAYERS:,}")


def patterns_of(config: Mapping[str, Any], field: str, path: Path | str) -> dict[str, Any]:
    """Return `rank_pattern` or `alpha_pattern`, empty if there is none.

    Raises:
        AdapterError: no mapping of expressions that can be compiled.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: {field} is not a mapping of names to numbers")
    _check_expressions(patterns, field, path)
    return patterns


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """A pattern's value for a module, by PEFT's own rule: the first that matches the end of its name, from a dot on.

    Raises:
        AdapterError: a pattern takes for ever to match.
    """
    try:
        return next((value for key, value in patterns.items() if matches(_as_peft_reads(key), name)), default)
    except ConfigError as e:
        raise AdapterError(str(e)) from None


def _as_peft_reads(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def wrapped_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Parameters of `module` that the config's `target_parameters` name, by PEFT's rule (whole name, or its end)."""
    named = [str(target).rpartition(".") for target in config.get("target_parameters") or []]
    return [p for owner, _, p in named if owner and (module == owner or module.endswith(f".{owner}"))]


def resized_config(
    config: Mapping[str, Any], modules: Mapping[str, tuple[Sequence[str], float]], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the adapter's config at other ranks, with every module's scaling as it was.

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
    if "init_lora_weights" in config:
        new["init_lora_weights"] = loadable_init(config["init_lora_weights"])
    return new


def target_modules(names: Collection[str]) -> list[str] | str:
    """PEFT's `target_modules` for exactly these modules: a list of names, or, where one is the tail of another, by
    which PEFT would match both, a regular expression."""
    whole = set(names)
    tails = any(name[i + 1 :] in whole for name in whole for i, c in enumerate(name) if c == ".")
    return "|".join(map(re.escape, sorted(whole))) if tails else sorted(whole)
