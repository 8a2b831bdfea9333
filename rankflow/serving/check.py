"""What an engine would get wrong with an adapter file as it is, and what no rewriting of the file can mend.

`rankflow.serving.verdicts` and `rankflow.serving.export` both go by this, so that what one says is what the other does.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankflow.formats.as_lora.dense import DenseAdapter
from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import BASE_COPY, SavedAdapter
from rankflow.formats.convert import Converted, Source, configs_of
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft_fields import is_set, unknown
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter, mixed
from rankflow.formats.single_file.names import renamed, renamed_key
from rankflow.plans.names import arrange
from rankflow.serving.engine import (
    ADALORA,
    ALORA,
    BIASES,
    DORA_SCALE,
    ENGINES,
    FLUX_BIASES,
    FULL_UPDATES,
    MAGNITUDE,
    MEGATRON,
    MIDDLE,
    NAMED_ADAPTER,
    NO_PREFIX,
    NORM_UPDATES,
    OTHER_ADAPTER,
    OTHER_NAMES,
    OTHER_TYPES,
    REPLICATED,
    SD3_NAMES,
    TRAINED_ROWS,
    TYING,
    WRAPPED,
    Engine,
    Fate,
    Stack,
)

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"[._]lora_?(?:embedding_)?(?:[AB]|down|up|mid)\b|\.lora\.(?:down|up)")
_NAMED = re.compile(r"(?<=\.lora_[AB])\.(?!weight$|bias$)[^.]+")  # an adapter's name
_EXPERT = re.compile(r"\.experts\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.weight$")
SQUEEZE = "rankflow squeeze"
ELSEWHERE = "serve it with another engine, or merge the adapter into its base model"
_FIELDS = "see what these settings do, and whether the engine heeds them; without them it is known what is loaded"
_ROUNDING = 1e-6  # scales nearer than this, relatively, are one


@dataclass(frozen=True)
class Problem:
    """what: the setting, if it is one. does: what the engine makes of it. fate: whether it says so. remedy: what to do.
    modules: those concerned, or tensors, where it is not the whole file."""

    what: str
    does: str
    fate: Fate
    remedy: str
    modules: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The setting, and a module with the number of others."""
        first, *more = self.modules or ("",)
        return ": ".join(filter(None, (self.what, f"{first} and {len(more)} more" if more else first)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fate": self.fate.value}


def problems(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    kind = source_of(adapter).kind
    if kind == FULL or adapter.kind not in engine.reads:
        what = "whole model and no adapter" if kind == FULL else f"{adapter.kind} file"
        where = f"is a {what}; {engine.name} loads {', '.join(engine.reads)}"
        unread = Problem("format", where, Fate.REFUSED, rewrite(adapter, engine))
        return [unread, *_above(adapter, engine), *lasting(adapter, engine)]
    mended = [feature for feature in _OF_THE_FILE if _mended(feature, engine)]
    of_file = [*_features(adapter, engine, mended), *_above(adapter, engine), *lasting(adapter, engine)]
    if _no_plain_lora(adapter):  # of which ranks and scales are not those of any tensor
        return of_file
    return [*of_file, *_rows(adapter, engine), *_scales(adapter, engine)]


def lasting(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """Those that no other way of writing the file takes away."""
    kept = [feature for feature in FEATURES if not _mended(feature, engine)]
    found = [*_features(adapter, engine, kept), *_stacks(adapter, engine), *_layers(adapter, engine)]
    if fields := sorted({field for config in configs_of(source_of(adapter)) for field in unknown(config)}):
        found.append(Problem("", f"may or may not heed {', '.join(fields)}", Fate.UNKNOWN, _FIELDS, tuple(fields)))
    return found


def _mended(feature: str, engine: Engine) -> bool:
    """Whether it is gone once the file is written anew; names that an engine may have too are kept for it."""
    return feature in _OF_THE_FILE and (feature != OTHER_NAMES or not engine.library_names)


def rewrite(adapter: SavedAdapter, engine: Engine) -> str:
    gguf = engine.writes == "gguf" and not isinstance(adapter, PeftAdapter)  # which is made of PEFT's alone
    return f"{SQUEEZE} {adapter.path} {'--format peft' if gguf else f'--for {engine.name}'}"


# -- what is in a file beside plain linear factors ------------------------------------------------------------------


def _config(adapter: SavedAdapter) -> Mapping[str, Any]:
    return adapter.config if isinstance(adapter, PeftAdapter) else {}


def _extra(adapter: SavedAdapter, matches: Callable[[str], bool]) -> list[str]:
    """Tensors beside the factors that no feature of its own is about."""
    saved = tuple(_config(adapter).get("modules_to_save") or ())
    own = (".lora_magnitude_vector", ".bias", ".dora_scale", ".diff", "trainable_tokens", BASE_COPY)
    return [
        key
        for key in adapter.extra_tensors
        if matches(key) and not any(f in key for f in own) and not any(f".{name}." in f".{key}" for name in saved)
    ]


def _tensors(adapter: SavedAdapter, matches: Callable[[str], bool]) -> list[str]:
    """Tensors beside the factors of a file that has no PEFT config with it, in which a setting would name them."""
    return [key for key in adapter.extra_tensors if not _config(adapter) and matches(key)]


def source_of(adapter: SavedAdapter) -> Source:
    return adapter.source if isinstance(adapter, Converted) else adapter


def _no_plain_lora(adapter: SavedAdapter, *origins: str, other: bool = False) -> list[str]:
    """What an adapter of PEFT's is that is read as a LoRA without being one, if it is of one of these types; of any, if
    none are given, or with `other` of any but these."""
    source = source_of(adapter)
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
    source = source_of(adapter)
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
        configs = configs_of(source_of(adapter))
        return [name for name in names if any(is_set(config.get(name)) for config in configs)]

    return given


FEATURES: Mapping[str, Callable[[SavedAdapter], list[str]]] = {
    ADALORA: lambda adapter: _no_plain_lora(adapter, "ADALORA"),
    OTHER_TYPES: lambda adapter: _no_plain_lora(adapter, "LORA", "ADALORA", other=True),
    MIDDLE: lambda adapter: _no_plain_lora(adapter, "LORA"),
    "target_modules as an expression": lambda adapter: (
        ["target_modules"]
        if isinstance(targets := _config(adapter).get("target_modules"), str) and targets not in ("all-linear", "all")
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
_OF_THE_FILE = (
    *(ADALORA, OTHER_TYPES, MIDDLE, "target_modules as an expression"),
    *(WRAPPED, NO_PREFIX, NAMED_ADAPTER, OTHER_ADAPTER, OTHER_NAMES),
)
_NOT_MERGED = (ALORA, REPLICATED, MEGATRON)  # which act by the tokens, or on another model than the base is
_SAID = {Fate.REFUSED: "does not load", Fate.SILENT: "leaves out", Fate.UNKNOWN: "may or may not load"}


def _features(adapter: SavedAdapter, engine: Engine, features: Collection[str]) -> list[Problem]:
    found = []
    for feature, fate in engine.fates.items():
        if feature in features and (where := FEATURES[feature](adapter)):
            remedy = rewrite(adapter, engine) if _mended(feature, engine) else _elsewhere(feature)
            found.append(Problem("", f"{_SAID[fate]} {feature}", fate, remedy, tuple(where)))
    return found


def _elsewhere(feature: str) -> str:
    """What is left to do; merging needs what PEFT itself merges."""
    if feature not in _NOT_MERGED:
        return ELSEWHERE
    heed = [e.name for e in ENGINES.values() if feature not in e.fates and PeftAdapter.kind in e.reads]
    return f"serve it with what heeds that: {', '.join(heed)}"


# -- ranks and scales -----------------------------------------------------------------------------------------------


def _above(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """A rank that no setting of the engine serves."""
    most = max(adapter.layout.ranks.values())
    if engine.room(most) is not None:
        return []
    remedy = f"{rewrite(adapter, engine)} --max-rank {engine.ranks[-1]}"
    return [Problem(f"rank {most}", f"serves at most {engine.ranks[-1]}", Fate.REFUSED, remedy)]


def _rows(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    ranks = adapter.layout.ranks
    found = []
    r = _config(adapter).get("r", 0)
    if engine.rows in ("r", "at most r"):
        wrong = [name for name, rank in ranks.items() if rank > r or (engine.rows == "r" and rank != r)]
        if wrong:
            does = f"goes by r = {r} for the room it needs, and {wrong[0]} has {ranks[wrong[0]]}"
            found.append(Problem("rank_pattern", does, Fate.REFUSED, rewrite(adapter, engine), tuple(wrong)))
    elif engine.rows == "one a type":
        found += _types(adapter, engine)
    return found


def _types(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """Ranks that LoRAX cannot stack, or pads and then scales by."""
    padded: dict[str, set[int]] = defaultdict(set)
    for row in arrange(adapter.layout):
        padded[row.type].add(_as_padded(adapter.layout[row.name].rank))
    found = [
        Problem(
            f"rank_pattern: {kind}",
            f"stacks all layers, and these have ranks {sorted(ranks)}",
            Fate.REFUSED,
            rewrite(adapter, engine),
        )
        for kind, ranks in padded.items()
        if len(ranks) > 1
    ]
    r = _config(adapter)["r"]
    if _as_padded(r) != r and len(padded) > 1:
        does = f"pads to {_as_padded(r)} and scales all types but the first by that"
        found.append(Problem(f"r = {r}", does, Fate.SILENT, rewrite(adapter, engine)))
    return found


def _as_padded(rank: int) -> int:
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _scales(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    if engine.scale != "module":
        config = _config(adapter)
        return _misscaled(adapter, engine, lambda rank, expert: engine.scale_of(config, rank, expert=expert))
    if isinstance(adapter, DiffusersAdapter):
        if engine.name == "comfyui" and METADATA in adapter.metadata:
            return _misscaled(adapter, engine, lambda *_: 1.0)
        silent = METADATA not in adapter.metadata and not any(m.alpha_key for m in adapter.entries.values())
        if engine.name == "diffusers" and silent and mixed(adapter.layout.ranks):
            does = "takes the commonest rank for the scale of all, before its pull request 14409"
            return [Problem("ranks that differ, and no alpha", does, Fate.SILENT, rewrite(adapter, engine))]
    return []


def _misscaled(adapter: SavedAdapter, engine: Engine, scale: Callable[[int, bool], float]) -> list[Problem]:
    """One problem for each factor by which modules come out too strong or too weak.

    Args:
        scale: of a module's rank, and whether it is an expert.
    """
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, slot in adapter.layout.items():
        expert = slot.kind == "experts" or _EXPERT.search(name) is not None
        have = scale(slot.rank, expert)
        if not math.isclose(have, slot.scaling, rel_tol=_ROUNDING):
            strength = f"scales by {have:.4g} and not by {slot.scaling:.4g}: {have / slot.scaling:.3g} times as strong"
            why = ", ".join(engine.unheeded(_config(adapter), expert=expert)) or METADATA
            wrong[why, strength].append(name)
    return [
        Problem(why, does, Fate.SILENT, rewrite(adapter, engine), tuple(names)) for (why, does), names in wrong.items()
    ]


# -- layers that belong together ------------------------------------------------------------------------------------


def _stacks(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    owners: dict[str, set[str]] = defaultdict(set)
    for name in adapter.layout:
        owner, _, last = name.rpartition(".")
        owners[owner].add(last)

    def lacking(stack: Stack) -> list[str]:
        return [
            f"{owner}.{next(n for n in stack.needs if n not in inside)}"
            for owner, inside in owners.items()
            if inside & {*stack.modules} and not inside >= {*stack.needs} and not inside & {*stack.unless}
        ]

    remedy = "train the missing ones too; their shapes are not known without the model"
    return [
        Problem("without", stack.otherwise, stack.fate, remedy, tuple(where))
        for stack in engine.stacks
        if (where := lacking(stack))
    ]


def _layers(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """Types of modules that some layer lacks."""
    if not engine.every_layer:
        return []
    layers: dict[str, set[str]] = defaultdict(set)
    for row in arrange(adapter.layout):
        layers[row.type].add(row.layer)
    every = set().union(*(found for found in layers.values() if "" not in found))
    return [
        Problem(
            f"{kind} in {len(found)} of {len(every)} layers",
            "leaves a type out of all layers if one lacks it",
            Fate.SILENT,
            "train that type in every layer",
        )
        for kind, found in layers.items()
        if "" not in found and len(found) < len(every)
    ]
