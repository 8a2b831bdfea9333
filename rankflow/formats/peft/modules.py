"""How PEFT names and shapes the tensors it saves: which of them make a module, and of what rank and scaling it is."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, permutations
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.base import SavedModule, checked_slot
from rankflow.formats.peft_config import CONFIG, pattern_value, wrapped_parameters
from rankflow.formats.single_file.keys import foreign_factors
from rankflow.linalg.factor_shapes import canonical_a, canonical_b, stored_a, stored_b
from rankflow.plans.layout import Slot
from rankflow.plans.names import natural
from rankflow.plans.peft_patterns import scaling_for

_PREFIX = "base_model.model."
_MOST_ORDERS = 10_000  # in which the parameters of one module may have been wrapped
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.(?P<tail>.+))?$")


@dataclass(frozen=True)
class Entry(SavedModule):
    """One module of a PEFT adapter."""

    pattern_names: tuple[str, ...]  # what rank_pattern is matched against

    def canonical(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A ``[*e, r, in]`` and B ``[*e, out, r]`` from tensors as the file shapes them; views where that can be.

        Expert tensors lie expert-major in A (``[E * r, in]``) and expert-minor in B (``[out, r * E]``).
        """
        return canonical_a(a, self.slot.experts), canonical_b(b, self.slot.experts)

    def raw(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `canonical`, at whatever rank `a` and `b` have."""
        if self.slot.experts > 1:
            return stored_a(a, self.slot.experts), stored_b(b, self.slot.experts)
        raw_a, raw_b = self.raw_shapes(a.shape[0])
        return a.reshape(raw_a), b.reshape(raw_b)

    def raw_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = rank * self.slot.experts
        return (rows, *self.a_shape[1:]), (self.b_shape[0], rows, *self.b_shape[2:])


def read_entries(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    """Module -> entry, in natural order of names, which are those `rank_pattern` and live models use.

    Two parameters of one module may be adapted at once (`target_parameters`), and the file does not name them. Where
    their ranks do not tell them apart either, they are tied, and named in the order of the config.

    Raises:
        AdapterError: tensors that do not make a LoRA adapter, or not the one that `config` describes.
    """
    owned: dict[str, list[_Pair]] = defaultdict(list)
    for pair in _pairs(tensors, path):
        # Wrappers nest through `base_layer`: expert parameters in each other, attention's out-projection in attention.
        owned[re.split(r"\.base_layer(?:\.|$)", pair.name, maxsplit=1)[0]].append(pair)
    entries: dict[str, Entry] = {}
    inside = Counter(prefix for key in tensors for prefix in accumulate(key.split("."), "{}.{}".format))
    for owner, pairs in owned.items():
        parameters = wrapped_parameters(config, owner)
        found = (
            _parameters(owner, parameters, pairs, config, path) if parameters else _module(owner, pairs, config, path)
        )
        for name, entry in found:
            if name in entries:
                raise AdapterError(f"{path}: {name} is there twice; the file is damaged, or of an unknown make")
            if inside[entry.a_key.rpartition(".lora_")[0]] > 2:  # more than A and B
                entry = replace(entry, slot=replace(entry.slot, min_rank=1))
            entries[name] = entry
    return {name: entries[name] for name in sorted(entries, key=natural)}


class _Pair(NamedTuple):
    """A and B of one wrapper, as the file has them, without their values: made ones would all be held at once."""

    name: str  # with `base_layer` in it where wrappers nest
    a_key: str
    b_key: str
    a: Tensor
    b: Tensor

    @property
    def shapes(self) -> str:
        return f"A {list(self.a.shape)} and B {list(self.b.shape)}"


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> list[_Pair]:
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    adapters: set[str] = set()
    for key in tensors:
        found = _FACTOR.match(key)
        if found is None:
            if whose := foreign_factors([key]):
                raise AdapterError(f"{path}: {key} makes this {whose}")
            if ".lora_" in key and "lora_magnitude_vector" not in key:
                raise AdapterError(f"{path}: {key} is not a tensor of plain LoRA or DoRA; this variant is not known")
            continue
        tail = (found["tail"] or "").removesuffix("weight").removesuffix(".")
        if not tail.endswith("bias"):
            adapters.add(tail)
            keys[found["module"]][found["part"]] = key
    if not keys:
        raise AdapterError(f"{path}: holds no lora_A and lora_B tensors; it is not a LoRA adapter, or was merged")
    if len(adapters) > 1:
        raise AdapterError(
            f"{path}: holds several adapters ({', '.join(sorted(adapters))}); save each into a folder of its own"
        )
    return [_pair(module.removeprefix(_PREFIX), parts, tensors, path) for module, parts in keys.items()]


def _pair(name: str, parts: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> _Pair:
    a_part, b_part = ("A", "B") if parts.keys() & {"A", "B"} else ("embedding_A", "embedding_B")
    for have, lack in ((a_part, b_part), (b_part, a_part)):
        if lack not in parts:
            raise AdapterError(
                f"{path}: {name} has lora_{have} but no lora_{lack}; the file is incomplete, save the adapter again"
            )
    keys = parts[a_part], parts[b_part]
    pair = _Pair(name, *keys, *(tensors[key].to("meta") for key in keys))
    a, b = pair.a, pair.b
    if a.ndim < 2 or b.ndim != a.ndim or 0 in a.shape or 0 in b.shape or any(n != 1 for n in b.shape[2:]):
        raise AdapterError(f"{path}: {name} has {pair.shapes}, which are no LoRA factors; were sharded weights saved?")
    if not a.is_floating_point() or a.dtype != b.dtype or a.itemsize < 2:
        raise AdapterError(
            f"{path}: {name} has {a.dtype} and {b.dtype} factors; both must be of one floating type of at least 16 bits"
        )
    if a.shape[0] != b.shape[1]:
        if a.ndim > 2 and a.shape[0] % b.shape[1] == 0:
            raise AdapterError(
                f"{path}: {name} is a convolution of {a.shape[0] // b.shape[1]} groups ({pair.shapes}); PEFT cannot "
                "give the update of a grouped convolution, so it cannot be resized either"
            )
        raise AdapterError(f"{path}: {name} has {pair.shapes}, whose ranks do not agree; the file is damaged")
    return pair


class _Setting(NamedTuple):
    rank: int
    alpha: float


def _setting(config: Mapping[str, Any], name: str) -> _Setting:
    return _Setting(
        pattern_value(config["rank_pattern"], name, config["r"]),
        pattern_value(config["alpha_pattern"], name, config["lora_alpha"]),
    )


def _module(owner: str, pairs: Sequence[_Pair], config: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Entry]]:
    """A module's own weight, and for attention that of its out-projection, to which PEFT gives the same rank."""
    attention = any(pair.name != owner for pair in pairs)
    setting = _setting(config, owner)
    for pair in pairs:
        if pair.a.shape[0] != setting.rank:
            raise _at_odds(pair, setting.rank, path)
        kind = "embedding" if "lora_embedding" in pair.a_key else "conv" if pair.a.ndim > 2 else "linear"
        kind = "attention" if attention else kind
        name = pair.name.replace(".base_layer", "")
        yield name, _entry(name, pair, setting, config, kind, (owner,), path, tie=owner if attention else None)


def _parameters(
    owner: str, parameters: Sequence[str], pairs: Sequence[_Pair], config: Mapping[str, Any], path: Path
) -> Iterator[tuple[str, Entry]]:
    """Parameters adapted directly. PEFT wraps them one around the other, the first that the module has innermost."""
    inner_first = sorted(pairs, key=lambda pair: -pair.name.count(".base_layer"))
    rows = [pair.a.shape[0] for pair in inner_first]
    settings = {p: _setting(config, f"{owner}.{p}") for p in parameters}
    if math.perm(len(parameters), len(pairs)) > _MOST_ORDERS:
        raise AdapterError(f"{path}: {owner} has {len(parameters)} target_parameters, more than can be told apart")
    fitting = [
        names
        for names in permutations(parameters, len(pairs))
        if all(n % settings[p].rank == 0 for n, p in zip(rows, names, strict=True))
        and len({n // settings[p].rank for n, p in zip(rows, names, strict=True)}) == 1
    ]
    if not fitting:
        raise _at_odds(inner_first[0], settings[parameters[0]].rank, path)
    if len({tuple(settings[p] for p in names) for names in fitting}) > 1:
        raise AdapterError(
            f"{path}: {owner} has {', '.join(parameters)} adapted at different alphas, and the file does not say which "
            "tensors are whose; it cannot be resized without the model"
        )
    unnamed = len(fitting) > 1
    for pair, p in zip(inner_first, fitting[0], strict=True):
        matched = tuple(f"{owner}.{q}" for q in (parameters if unnamed else [p]))
        tie = owner if unnamed and len(pairs) > 1 else None
        name = f"{owner}.{p}"
        yield name, _entry(name, pair, settings[p], config, "experts", matched, path, tie=tie)


def _at_odds(pair: _Pair, rank: int, path: Path) -> AdapterError:
    return AdapterError(
        f"{path}: {pair.name} has rank {pair.a.shape[0]} ({pair.shapes}) but {CONFIG} says {rank}; config and weights "
        "do not belong together"
    )


def _entry(
    name: str,
    pair: _Pair,
    setting: _Setting,
    config: Mapping[str, Any],
    kind: str,
    matched: tuple[str, ...],
    path: Path,
    *,
    tie: str | None,
) -> Entry:
    slot = Slot(
        rank=setting.rank,
        in_features=math.prod(pair.a.shape[1:]),
        out_features=pair.b.shape[0],
        scaling=scaling_for(setting.alpha, setting.rank, bool(config.get("use_rslora"))),
        min_rank=int(kind in ("attention", "experts")),
        kind=kind,
        experts=pair.a.shape[0] // setting.rank,
        itemsize=pair.a.dtype.itemsize,
        tie=tie,
    )
    slot = checked_slot(slot, name, path)
    return Entry(slot, pair.a_key, pair.b_key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, matched)
