"""What an engine would get wrong with an adapter file as it is, and what no rewriting of the file can mend."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankflow.engines import ADALORA, MIDDLE, OTHER_TYPES, Engine, Fate, Stack, engine_named
from rankflow.formats.adapter import BASE_COPY, SavedAdapter
from rankflow.formats.convert import Converted, Source
from rankflow.formats.dense import DenseAdapter
from rankflow.formats.detect import open_adapter
from rankflow.formats.diffusers import METADATA, DiffusersAdapter, mixed
from rankflow.formats.full import KIND as FULL
from rankflow.formats.peft import PeftAdapter
from rankflow.names import arrange

_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.weight$")
_SQUEEZE = "rankflow squeeze"
_ELSEWHERE = "serve it with another engine, or merge the adapter into its base model"
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


@dataclass(frozen=True)
class Verdict:
    """problems: none if all is well. hint: how the engine is to be started for it."""

    source: str
    engine: str
    problems: tuple[Problem, ...]
    hint: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": [problem.to_json() for problem in self.problems]}


def check(src: str | Path, engine: str, *, kind: str | None = None, base: str | Path | None = None) -> Verdict:
    """What `engine` (`rankflow.engines.ENGINES`) would get wrong with a file as it is.

    Raises:
        ConfigError: an unknown engine or format.
        AdapterError: no adapter, or a damaged one.
    """
    found = engine_named(engine)
    adapter = open_adapter(src, kind, base)
    wrong = tuple(_on_base(problem, base) for problem in problems(adapter, found))
    return Verdict(str(adapter.path), engine, wrong, "" if wrong else found.hint(max(adapter.layout.ranks.values())))


def problems(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    kind = _source(adapter).kind
    if kind == FULL or adapter.kind not in engine.reads:
        what = "whole model and no adapter" if kind == FULL else f"{adapter.kind} file"
        where = f"is a {what}; {engine.name} loads {', '.join(engine.reads)}"
        return [Problem("format", where, Fate.REFUSED, _rewrite(adapter, engine))]
    of_file = _features(adapter, engine, _OF_THE_FILE)
    if _no_plain_lora(adapter):  # of which ranks and scales are not those of any tensor
        return of_file
    return [*of_file, *_rows(adapter, engine), *_scales(adapter, engine), *lasting(adapter, engine)]


def lasting(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """Those that no other way of writing the file takes away."""
    kept = [feature for feature in FEATURES if feature not in _OF_THE_FILE]
    return [*_features(adapter, engine, kept), *_stacks(adapter, engine), *_layers(adapter, engine)]


def _rewrite(adapter: SavedAdapter, engine: Engine) -> str:
    gguf = engine.writes == "gguf" and not isinstance(adapter, PeftAdapter)  # which is made of PEFT's alone
    return f"{_SQUEEZE} {adapter.path} {'--format peft' if gguf else f'--for {engine.name}'}"


def _on_base(problem: Problem, base: str | Path | None) -> Problem:
    """The same with a remedy that reads what was read."""
    if base is None or not problem.remedy.startswith(_SQUEEZE):
        return problem
    return replace(problem, remedy=f"{problem.remedy} --base {base}")


# -- what is in a file beside plain linear factors ------------------------------------------------------------------


def _config(adapter: SavedAdapter) -> Mapping[str, Any]:
    return adapter.config if isinstance(adapter, PeftAdapter) else {}


def _extra(adapter: SavedAdapter, matches: Callable[[str], bool]) -> list[str]:
    saved = tuple(_config(adapter).get("modules_to_save") or ())
    factors = (".lora_magnitude_vector", ".bias", ".dora_scale", BASE_COPY)
    return [
        key
        for key in adapter.extra_tensors
        if matches(key) and not any(f in key for f in factors) and not any(f".{name}." in f".{key}" for name in saved)
    ]


def _source(adapter: SavedAdapter) -> Source:
    return adapter.source if isinstance(adapter, Converted) else adapter


def _no_plain_lora(adapter: SavedAdapter, *origins: str, other: bool = False) -> list[str]:
    """What an adapter of PEFT's is that is read as a LoRA without being one, if it is of one of these types; of any, if
    none are given, or with `other` of any but these."""
    source = _source(adapter)
    if isinstance(source, DenseAdapter):
        found, origin = source.kind, source.kind.upper()
    elif isinstance(source, PeftAdapter) and source.folded:
        found, origin = source.notes[0].partition(",")[0], source.origin
    else:
        return []
    return [found] if not origins or (origin in origins) != other else []


def _is_norm(key: str) -> bool:
    return "norm" in key


def _is_embedding(key: str) -> bool:
    return _EMBEDDING.search(key) is not None


def _of_kind(kind: str) -> Callable[[SavedAdapter], list[str]]:
    return lambda adapter: [name for name, slot in adapter.layout.items() if slot.kind == kind]


def _setting(name: str, default: object) -> Callable[[SavedAdapter], list[str]]:
    def given(adapter: SavedAdapter) -> list[str]:
        value = _config(adapter).get(name)
        return [name] if value and value != default else []

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
    "DoRA": _setting("use_dora", False),
    "modules_to_save": _setting("modules_to_save", None),
    "bias": lambda adapter: [*_setting("bias", "none")(adapter), *_setting("lora_bias", False)(adapter)],
    "embeddings": _of_kind("embedding"),
    "convolutions": _of_kind("conv"),
    "attention": _of_kind("attention"),
    "experts": _of_kind("experts"),
    "lm_head": lambda adapter: [name for name in adapter.layout if name.split(".")[-1] == "lm_head"],
    "full embeddings": lambda adapter: _extra(adapter, _is_embedding),
    "norms": lambda adapter: _extra(adapter, _is_norm),
    "other tensors": lambda adapter: _extra(adapter, lambda key: not _is_embedding(key) and not _is_norm(key)),
}
_OF_THE_FILE = (ADALORA, OTHER_TYPES, MIDDLE, "target_modules as an expression")  # gone once it is written anew
_SAID = {Fate.REFUSED: "does not load", Fate.SILENT: "leaves out", Fate.UNKNOWN: "may or may not load"}


def _features(adapter: SavedAdapter, engine: Engine, features: Collection[str]) -> list[Problem]:
    found = []
    for feature, fate in engine.fates.items():
        if feature in features and (where := FEATURES[feature](adapter)):
            remedy = _rewrite(adapter, engine) if feature in _OF_THE_FILE else _ELSEWHERE
            found.append(Problem("", f"{_SAID[fate]} {feature}", fate, remedy, tuple(where)))
    return found


# -- ranks and scales -----------------------------------------------------------------------------------------------


def _rows(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    ranks = adapter.layout.ranks
    found = []
    if engine.ranks and (most := max(ranks.values())) > engine.ranks[-1]:
        remedy = f"{_rewrite(adapter, engine)} --max-rank {engine.ranks[-1]}"
        found.append(Problem(f"rank {most}", f"serves at most {engine.ranks[-1]}", Fate.REFUSED, remedy))
    r = _config(adapter).get("r", 0)
    if engine.rows in ("r", "at most r"):
        wrong = [name for name, rank in ranks.items() if rank > r or (engine.rows == "r" and rank != r)]
        if wrong:
            does = f"goes by r = {r} for the room it needs, and {wrong[0]} has {ranks[wrong[0]]}"
            found.append(Problem("rank_pattern", does, Fate.REFUSED, _rewrite(adapter, engine), tuple(wrong)))
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
            _rewrite(adapter, engine),
        )
        for kind, ranks in padded.items()
        if len(ranks) > 1
    ]
    r = _config(adapter)["r"]
    if _as_padded(r) != r and len(padded) > 1:
        does = f"pads to {_as_padded(r)} and scales all types but the first by that"
        found.append(Problem(f"r = {r}", does, Fate.SILENT, _rewrite(adapter, engine)))
    return found


def _as_padded(rank: int) -> int:
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _scales(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    if engine.scale != "module":
        config = _config(adapter)
        return _misscaled(adapter, engine, lambda rank: engine.scale_of(config, rank))
    if isinstance(adapter, DiffusersAdapter):
        if engine.name == "comfyui" and METADATA in adapter.metadata:
            return _misscaled(adapter, engine, lambda _: 1.0)
        silent = METADATA not in adapter.metadata and not any(m.alpha_key for m in adapter.entries.values())
        if engine.name == "diffusers" and silent and mixed(adapter.layout.ranks):
            does = "takes the commonest rank for the scale of all, before its pull request 14409"
            return [Problem("ranks that differ, and no alpha", does, Fate.SILENT, _rewrite(adapter, engine))]
    return []


def _misscaled(adapter: SavedAdapter, engine: Engine, scale: Callable[[int], float]) -> list[Problem]:
    """One problem for each factor by which modules come out too strong or too weak."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, slot in adapter.layout.items():
        have = scale(slot.rank)
        if not math.isclose(have, slot.scaling, rel_tol=_ROUNDING):
            strength = f"scales by {have:.4g} and not by {slot.scaling:.4g}: {have / slot.scaling:.3g} times as strong"
            wrong[strength].append(name)
    why = ", ".join(engine.unheeded(_config(adapter))) or METADATA
    return [Problem(why, does, Fate.SILENT, _rewrite(adapter, engine), tuple(names)) for does, names in wrong.items()]


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
