"""What an engine that serves adapters does with them, as fields of a record; the records are in `serving/engines/`."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Literal

from rankflow.errors import ConfigError
from rankflow.formats.base import SavedAdapter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.single_file.diffusers import METADATA
from rankflow.plans.peft_patterns import scaling_for
from rankflow.serving.features import (
    ADALORA,
    ALORA,
    MEGATRON,
    MIDDLE,
    NAMED_ADAPTER,
    OTHER_TYPES,
    REPLICATED,
    TRAINED_ROWS,
    TYING,
    WRAPPED,
    config_of,
)

SQUEEZE = "rankflow squeeze"
_EXPERT = re.compile(r"\.experts\.")
_ROUNDING = 1e-6  # scales nearer than this, relatively, are one


class Fate(Enum):
    """Whether an engine says that it does not do what an adapter asks for."""

    REFUSED = "refused"
    SILENT = "silent"
    UNKNOWN = "not known"


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
class Stack:
    """Layers that an engine joins: one with any of `modules`, and none of `unless`, has to have all of `needs`."""

    modules: tuple[str, ...]
    needs: tuple[str, ...]
    otherwise: str
    fate: Fate
    unless: tuple[str, ...] = ()

    def lacking(self, owners: Mapping[str, set[str]]) -> list[str]:
        """Names of the first module that is missing from each owner of some; `owners` maps one to what it has."""
        return [
            f"{owner}.{next(n for n in self.needs if n not in inside)}"
            for owner, inside in owners.items()
            if inside & {*self.modules} and not inside >= {*self.needs} and not inside & {*self.unless}
        ]


@dataclass(frozen=True)
class Engine:
    """What one engine accepts.

    writes: the format that is written for it; "" keeps a source that it reads. reads: the formats it loads.
    scale: how it scales a module of a PEFT adapter: by its own alpha and rank, patterns heeded (`module`), by the
    config's lora_alpha and r (`config`), or by lora_alpha and the tensor's rank (`tensor`). rslora: if it heeds that.
    rows: how many a tensor may have: any number, at most r, or exactly r.
    ranks: the maximal ranks it can be set to, all if empty; above the last nothing is served. setting: what sets it.
    page: of how many ranks the pages are in which it may keep them; 0 if it has none. rslora_experts: as rslora, for
    the experts of a mixture.
    fates: what is not loaded, by the words of `rankflow.serving.features.FEATURES`. stacks: layers that it joins.
    library_names: whether it looks for modules by the names that the libraries at hand have for them.

    What no field says, an engine's file says in a subclass: its own `rank_problems`, `scale_problems` or
    `layer_problems`.
    """

    name: str
    writes: str
    reads: tuple[str, ...] = ("peft",)
    scale: Literal["module", "config", "tensor"] = "module"
    rslora: bool = True
    rslora_experts: bool = True
    rows: Literal["any", "at most r", "r"] = "any"
    ranks: tuple[int, ...] = ()
    setting: str = ""
    page: int = 0
    fates: Mapping[str, Fate] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    library_names: bool = False

    @property
    def pads(self) -> bool:
        """Whether what is written for it has one rank, scale 1 and no patterns."""
        return self.writes == "peft" and self.scale != "module"

    @property
    def fills(self) -> bool:
        """Whether a module of rank 0 is written as zeros, since the engine wants it to be there."""
        return bool(self.stacks)

    def scale_of(self, config: Mapping[str, Any], rank: int, *, expert: bool = False) -> float:
        """Return the number by which the engine multiplies B A of a module of this `rank`, with this PEFT config.

        Raises:
            ValueError: it takes each module's own.
        """
        if self.scale == "module":
            raise ValueError(self.name)
        over = config["r"] if self.scale == "config" else rank
        heeds = self.rslora and (self.rslora_experts or not expert)
        return scaling_for(config["lora_alpha"], over, bool(heeds and config.get("use_rslora")))

    def unheeded(self, config: Mapping[str, Any], *, expert: bool = False) -> list[str]:
        """Return the settings of a PEFT config that would change scales and that the engine ignores."""
        dropped = {"config": ("rank_pattern", "alpha_pattern"), "tensor": ("alpha_pattern",), "module": ()}[self.scale]
        heeded = self.rslora and (self.rslora_experts or not expert)
        return [name for name in (*dropped, *([] if heeded else ["use_rslora"])) if config.get(name)]

    def room(self, most: int) -> int | None:
        """The rank that modules of at most `most` are given room for; None if no setting of the engine serves them."""
        return next((rank for rank in self.ranks if rank >= most), None) if self.ranks else most

    def rank_for(self, most: int) -> int:
        """Return the rank that modules of at most `most` are padded to.

        Raises:
            ConfigError: no setting of the engine serves so many.
        """
        room = self.room(most)
        if room is None:
            raise ConfigError(
                f"{self.name} serves ranks up to {self.ranks[-1]}, and the adapter has {most}; squeeze it, with "
                f"--max-rank {self.ranks[-1]} or a smaller target"
            )
        return room

    def hint(self, most: int) -> str:
        """Return how to start the engine for modules of at most that rank; empty if nothing has to be set."""
        if not self.setting:
            return ""
        hint = f"start {self.name} with {self.setting} {self.rank_for(most)} or more"
        if not self.page or most % self.page == 0:
            return hint
        return f"{hint}; in pages of {self.page} ranks it takes {-(-most // self.page) * self.page}"

    def rewrite(self, adapter: SavedAdapter) -> str:
        """The command that writes an adapter so that the engine loads it rightly."""
        gguf = self.writes == "gguf" and not isinstance(adapter, PeftAdapter)  # which is made of PEFT's alone
        return f"{SQUEEZE} {adapter.path} {'--to-format peft' if gguf else f'--engine {self.name}'}"

    def rank_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Modules whose tensors have other numbers of rows than the engine has room for."""
        if self.rows == "any":
            return []
        r, ranks = config_of(adapter).get("r", 0), adapter.layout.ranks
        wrong = [name for name, rank in ranks.items() if rank > r or (self.rows == "r" and rank != r)]
        if not wrong:
            return []
        does = f"goes by r = {r} for the room it needs, and {wrong[0]} has {ranks[wrong[0]]}"
        return [Problem("rank_pattern", does, Fate.REFUSED, self.rewrite(adapter), tuple(wrong))]

    def scale_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Modules that the engine would scale by another number than the adapter says."""
        if self.scale == "module":
            return []
        config = config_of(adapter)
        return self.misscaled(adapter, lambda rank, expert: self.scale_of(config, rank, expert=expert))

    def misscaled(self, adapter: SavedAdapter, scale: Callable[[int, bool], float]) -> list[Problem]:
        """One problem for each factor by which modules come out too strong or too weak.

        Args:
            scale: what a module is scaled by, given its rank and whether it is an expert.
        """
        wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, slot in adapter.layout.items():
            expert = slot.kind == "experts" or _EXPERT.search(name) is not None
            have, due = scale(slot.rank, expert), slot.scaling
            if not math.isclose(have, due, rel_tol=_ROUNDING):
                strength = f"scales by {have:.4g} and not by {due:.4g}: {have / due:.3g} times as strong"
                why = ", ".join(self.unheeded(config_of(adapter), expert=expert)) or METADATA
                wrong[why, strength].append(name)
        remedy = self.rewrite(adapter)
        return [Problem(why, does, Fate.SILENT, remedy, tuple(names)) for (why, does), names in wrong.items()]

    def layer_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Layers of which the engine needs others beside them, and those are missing."""
        owners: dict[str, set[str]] = defaultdict(set)
        for name in adapter.layout:
            owner, _, last = name.rpartition(".")
            owners[owner].add(last)
        remedy = "train the missing ones too; their shapes are not known without the model"
        return [
            Problem("without", stack.otherwise, stack.fate, remedy, tuple(where))
            for stack in self.stacks
            if (where := stack.lacking(owners))
        ]


# Formats, and fates of features, that several engines share
SINGLE_FILES = ("kohya", "comfyui", "diffusers")
PLAIN_ONLY = {
    ADALORA: Fate.REFUSED,
    OTHER_TYPES: Fate.REFUSED,
    MIDDLE: Fate.REFUSED,
    NAMED_ADAPTER: Fate.REFUSED,
    WRAPPED: Fate.SILENT,
}
OF_PEFT_ALONE = {
    ALORA: Fate.SILENT,
    REPLICATED: Fate.SILENT,
    TRAINED_ROWS: Fate.REFUSED,
    TYING: Fate.UNKNOWN,
    MEGATRON: Fate.UNKNOWN,
}
LINEAR_ONLY = {
    "convolutions": Fate.REFUSED,
    "attention": Fate.REFUSED,
    "experts": Fate.UNKNOWN,
    **PLAIN_ONLY,
    **OF_PEFT_ALONE,
}
