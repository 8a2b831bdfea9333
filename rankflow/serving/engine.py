"""What an engine that serves adapters does with them, as fields of a record; the records are in `serving/engines/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from rankflow.errors import ConfigError
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
)


class Fate(Enum):
    """Whether an engine says that it does not do what an adapter asks for."""

    REFUSED = "refused"
    SILENT = "silent"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Stack:
    """Layers that an engine joins: one with any of `modules`, and none of `unless`, has to have all of `needs`."""

    modules: tuple[str, ...]
    needs: tuple[str, ...]
    otherwise: str
    fate: Fate
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """What one engine accepts.

    writes: the format that is written for it; "" keeps a source that it reads. reads: the formats it loads.
    scale: how it scales a module of a PEFT adapter: by its own alpha and rank, patterns heeded (`module`), by the
    config's lora_alpha and r (`config`), or by lora_alpha and the tensor's rank (`tensor`). rslora: if it heeds that.
    rows: how many a tensor may have: any number, at most r, exactly r, or one number for all modules of a type.
    ranks: the maximal ranks it can be set to, all if empty; above the last nothing is served. setting: what sets it.
    page: of how many ranks the pages are in which it may keep them; 0 if it has none. rslora_experts: as rslora, for
    the experts of a mixture.
    fates: what is not loaded, by the words of `rankflow.serving.features.FEATURES`. stacks: layers that it joins.
    every_layer: whether a type of module that one layer lacks is left out of all. library_names: whether it looks for
    modules by the names that the libraries at hand have for them.
    """

    name: str
    writes: str
    reads: tuple[str, ...] = ("peft",)
    scale: Literal["module", "config", "tensor"] = "module"
    rslora: bool = True
    rslora_experts: bool = True
    rows: Literal["any", "at most r", "r", "one a type"] = "any"
    ranks: tuple[int, ...] = ()
    setting: str = ""
    page: int = 0
    fates: Mapping[str, Fate] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    every_layer: bool = False
    library_names: bool = False

    @property
    def pads(self) -> bool:
        """Whether what is written for it has one rank, scale 1 and no patterns."""
        return self.writes == "peft" and self.scale != "module"

    @property
    def fills(self) -> bool:
        """Whether a module of rank 0 is written as zeros, since the engine wants it to be there."""
        return self.every_layer or bool(self.stacks)

    def scale_of(self, config: Mapping[str, Any], rank: int, *, expert: bool = False) -> float:
        """By what it multiplies B A of a module whose tensors have `rank`, with this PEFT config.

        Raises:
            ValueError: it takes each module's own.
        """
        if self.scale == "module":
            raise ValueError(self.name)
        over = config["r"] if self.scale == "config" else rank
        heeds = self.rslora and (self.rslora_experts or not expert)
        return config["lora_alpha"] / (math.sqrt(over) if heeds and config.get("use_rslora") else over)

    def unheeded(self, config: Mapping[str, Any], *, expert: bool = False) -> list[str]:
        """The settings of a PEFT config that would change scales and are not looked at."""
        dropped = {"config": ("rank_pattern", "alpha_pattern"), "tensor": ("alpha_pattern",), "module": ()}[self.scale]
        heeded = self.rslora and (self.rslora_experts or not expert)
        return [name for name in (*dropped, *([] if heeded else ["use_rslora"])) if config.get(name)]

    def room(self, most: int) -> int | None:
        """The rank that modules of at most `most` are given room for; None if no setting of the engine serves them."""
        return next((rank for rank in self.ranks if rank >= most), None) if self.ranks else most

    def rank_for(self, most: int) -> int:
        """The rank that modules of at most `most` are padded to.

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
        """How to start the engine for modules of at most that rank; empty where nothing is to be set."""
        if not self.setting:
            return ""
        hint = f"start {self.name} with {self.setting} {self.rank_for(most)} or more"
        if not self.page or most % self.page == 0:
            return hint
        return f"{hint}; in pages of {self.page} ranks it takes {-(-most // self.page) * self.page}"


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
