"""What an adapter file holds beside plain linear factors, by the words that engines' records use for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rankflow.formats.as_lora.dense import DenseAdapter
from rankflow.formats.base import BASE_COPY, SavedAdapter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft_fields import is_set
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.names import renamed, renamed_key

# What of PEFT's is read here as the LoRA that it equals, and is none to an engine
ADALORA = "AdaLoRA's factors, which are named otherwise"
OTHER_TYPES = "adapters of a PEFT type other than LORA"
MIDDLE = "what stands between A and B"

# What acts otherwise than by A and B
ALORA = "the invocation tokens of an aLoRA"
REPLICATED = "layers stacked anew (layer_replication)"
TRAINED_ROWS = "single rows of embeddings (trainable_token_indices)"
TYING = "the tying of layers (ensure_weight_tying)"
MEGATRON = "Megatron's layers (megatron_config)"
DORA_SCALE = "DoRA's magnitudes (dora_scale)"
MAGNITUDE = "DoRA's magnitudes (lora_magnitude_vector)"
FLUX_BIASES = "FLUX's updates of biases (.diff_b)"
BIASES = "updates of biases (.diff_b)"
NORM_UPDATES = "updates of norms (.diff)"
FULL_UPDATES = "full updates (.diff)"

# What is in names, and goes as the file is written anew
WRAPPED = "modules under names that wrappers of training left (torch.compile, FSDP, DDP)"
NO_PREFIX = "factors whose names do not begin with base_model.model."
NAMED_ADAPTER = "factors with an adapter's name in theirs (lora_A.default.weight)"
OTHER_ADAPTER = "factors of an adapter that is not called default"
OTHER_NAMES = "modules under names that another library, or another version of it, gave them"
SD3_NAMES = "modules under the names of SD3's own checkpoint (joint_blocks)"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"[._]lora_?(?:embedding_)?(?:[AB]|down|up|mid)\b|\.lora\.(?:down|up)")
_NAMED = re.compile(r"(?<=\.lora_[AB])\.(?!weight$|bias$)[^.]+")  # an adapter's name
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.weight$")


def config_of(adapter: SavedAdapter) -> Mapping[str, Any]:
    """The PEFT config of an adapter that is read as one of PEFT's; empty for others."""
    return adapter.config if isinstance(adapter, PeftAdapter) else {}


def _extra(adapter: SavedAdapter, matches: Callable[[str], bool]) -> list[str]:
    """Tensors beside the factors that no feature of its own is about."""
    saved = tuple(config_of(adapter).get("modules_to_save") or ())
    own = (".lora_magnitude_vector", ".bias", ".dora_scale", ".diff", "trainable_tokens", BASE_COPY)
    return [
        key
        for key in adapter.extra_tensors
        if matches(key) and not any(f in key for f in own) and not any(f".{name}." in f".{key}" for name in saved)
    ]


def _tensors(adapter: SavedAdapter, matches: Callable[[str], bool]) -> list[str]:
    """Tensors beside the factors of a file that has no PEFT config with it, in which a setting would name them."""
    return [key for key in adapter.extra_tensors if not config_of(adapter) and matches(key)]


def no_plain_lora(adapter: SavedAdapter, *origins: str, other: bool = False) -> list[str]:
    """What an adapter of PEFT's is that is read as a LoRA without being one, if it is of one of these types; of any, if
    none are given, or with `other` of any but these."""
    source = adapter.source
    if isinstance(source, DenseAdapter):
        found, origin = source.kind, source.kind.upper()
    elif isinstance(source, PeftAdapter) and source.folded:
        found, origin = source.notes[0].partition(",")[0], source.origin
    else:
        return []
    return [found] if not origins or (origin in origins) != other else []


def _is_norm(key: str) -> bool:
    return "norm" in key


def _is_flux(key: str) -> bool:
    return re.search(r"(?:double|single)_blocks", key) is not None


def _keys(adapter: SavedAdapter) -> Mapping[str, str]:
    """Key in the file -> the one that it is read as, and written as, of factors."""
    source = adapter.source
    if not isinstance(source, PeftAdapter | SingleFile):
        return {}
    return {name: new for name, new in source.names_in_file.items() if _FACTOR.search(name)}


def _without_prefix(name: str, new: str) -> bool:
    return not name.startswith(_PREFIX) and new == _PREFIX + _NAMED.sub("", name)


def _wrapped(adapter: SavedAdapter) -> list[str]:
    return [
        name
        for name, new in _keys(adapter).items()
        if new not in (name, _NAMED.sub("", name), renamed_key(name)) and not _without_prefix(name, new)
    ]


def other_names(adapter: SavedAdapter) -> list[str]:
    """Modules of an image model that formats call otherwise."""
    if adapter.kind == "kohya":
        return [name for name in _keys(adapter) if renamed_key(name) != name]
    return [name for name in adapter.layout if adapter.kind in ("diffusers", "comfyui") and renamed(name) != name]


def _is_embedding(key: str) -> bool:
    return _EMBEDDING.search(key) is not None


def _of_kind(kind: str) -> Callable[[SavedAdapter], list[str]]:
    return lambda adapter: [name for name, slot in adapter.layout.items() if slot.kind == kind]


def _setting(*names: str) -> Callable[[SavedAdapter], list[str]]:
    def given(adapter: SavedAdapter) -> list[str]:
        return [name for name in names if any(is_set(config.get(name)) for config in adapter.peft_configs)]

    return given


FEATURES: Mapping[str, Callable[[SavedAdapter], list[str]]] = {
    ADALORA: lambda adapter: no_plain_lora(adapter, "ADALORA"),
    OTHER_TYPES: lambda adapter: no_plain_lora(adapter, "LORA", "ADALORA", other=True),
    MIDDLE: lambda adapter: no_plain_lora(adapter, "LORA"),
    "target_modules as an expression": lambda adapter: (
        ["target_modules"]
        if isinstance(targets := config_of(adapter).get("target_modules"), str) and targets not in ("all-linear", "all")
        else []
    ),
    WRAPPED: _wrapped,
    NO_PREFIX: lambda adapter: [name for name, new in _keys(adapter).items() if _without_prefix(name, new)],
    NAMED_ADAPTER: lambda adapter: [name for name in _keys(adapter) if _NAMED.search(name)],
    OTHER_ADAPTER: lambda adapter: [
        name for name in _keys(adapter) if (found := _NAMED.search(name)) and found[0] != ".default"
    ],
    OTHER_NAMES: other_names,
    SD3_NAMES: lambda adapter: [
        name for name in adapter.layout if adapter.kind in ("kohya", "comfyui") and "joint_blocks" in name
    ],
    "DoRA": _setting("use_dora"),
    DORA_SCALE: lambda adapter: _tensors(adapter, lambda key: "dora_scale" in key),
    MAGNITUDE: lambda adapter: _tensors(adapter, lambda key: "lora_magnitude_vector" in key),
    ALORA: _setting("alora_invocation_tokens"),
    REPLICATED: _setting("layer_replication"),
    TRAINED_ROWS: _setting("trainable_token_indices"),
    TYING: _setting("ensure_weight_tying"),
    MEGATRON: _setting("megatron_config"),
    FLUX_BIASES: lambda adapter: _tensors(adapter, lambda key: key.endswith(".diff_b") and _is_flux(key)),
    BIASES: lambda adapter: _tensors(adapter, lambda key: key.endswith(".diff_b") and not _is_flux(key)),
    NORM_UPDATES: lambda adapter: _tensors(adapter, lambda key: key.endswith(".diff") and _is_norm(key)),
    FULL_UPDATES: lambda adapter: _tensors(adapter, lambda key: key.endswith(".diff") and not _is_norm(key)),
    "modules_to_save": _setting("modules_to_save"),
    "bias": lambda adapter: [
        *_setting("bias", "lora_bias")(adapter),
        *_tensors(adapter, lambda key: key.endswith(".bias")),
    ],
    "embeddings": _of_kind("embedding"),
    "convolutions": _of_kind("conv"),
    "attention": _of_kind("attention"),
    "experts": _of_kind("experts"),
    "lm_head": lambda adapter: [name for name in adapter.layout if name.split(".")[-1] == "lm_head"],
    "full embeddings": lambda adapter: _extra(adapter, _is_embedding),
    "norms": lambda adapter: _extra(adapter, _is_norm),
    "other tensors": lambda adapter: _extra(adapter, lambda key: not _is_embedding(key) and not _is_norm(key)),
}
# Gone once it is written anew
OF_THE_FILE = (
    *(ADALORA, OTHER_TYPES, MIDDLE, "target_modules as an expression"),
    *(WRAPPED, NO_PREFIX, NAMED_ADAPTER, OTHER_ADAPTER, OTHER_NAMES),
)
