"""What an engine would get wrong with an adapter file as it is, and what no rewriting of the file can mend.

`rankflow.serving.verdicts` and `rankflow.serving.export` both go by this, so that what one says is what the other does.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import SavedAdapter
from rankflow.formats.convert import configs_of
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft_fields import unknown
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter, mixed
from rankflow.plans.names import arrange
from rankflow.serving.engine import Engine, Fate, Stack
from rankflow.serving.engines import engines
from rankflow.serving.features import (
    ALORA,
    FEATURES,
    MEGATRON,
    OF_THE_FILE,
    OTHER_NAMES,
    REPLICATED,
    config_of,
    no_plain_lora,
    source_of,
)

_EXPERT = re.compile(r"\.experts\.")
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
    mended = [feature for feature in OF_THE_FILE if _mended(feature, engine)]
    of_file = [*_features(adapter, engine, mended), *_above(adapter, engine), *lasting(adapter, engine)]
    if no_plain_lora(adapter):  # of which ranks and scales are not those of any tensor
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
    return feature in OF_THE_FILE and (feature != OTHER_NAMES or not engine.library_names)


def rewrite(adapter: SavedAdapter, engine: Engine) -> str:
    gguf = engine.writes == "gguf" and not isinstance(adapter, PeftAdapter)  # which is made of PEFT's alone
    return f"{SQUEEZE} {adapter.path} {'--to-format peft' if gguf else f'--engine {engine.name}'}"


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
    heed = [e.name for e in engines().values() if feature not in e.fates and PeftAdapter.kind in e.reads]
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
    r = config_of(adapter).get("r", 0)
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
    r = config_of(adapter)["r"]
    if _as_padded(r) != r and len(padded) > 1:
        does = f"pads to {_as_padded(r)} and scales all types but the first by that"
        found.append(Problem(f"r = {r}", does, Fate.SILENT, rewrite(adapter, engine)))
    return found


def _as_padded(rank: int) -> int:
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _scales(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    if engine.scale != "module":
        config = config_of(adapter)
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
            why = ", ".join(engine.unheeded(config_of(adapter), expert=expert)) or METADATA
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
