"""diffusers' single files: `unet.`, `transformer.`, `text_encoder.` names in every spelling diffusers ever wrote.

Where a scale is not 1 it is in the header (`lora_adapter_metadata`, the PEFT config of each component) or in an alpha
per module. Without either the scale is 1, but diffusers before its pull request 14409 reads a file of mixed ranks
wrongly then, so ranks that come to differ are written into the header.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.io.strict_json import strict_object
from rankflow.formats.peft_config import check_config, pattern_value, resized_config, target_modules
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Factor, Fit, Names
from rankflow.formats.single_file.names import BLOCKS, COMPONENTS, component_of, renamed, split
from rankflow.formats.single_file.writer import Module
from rankflow.plans.peft_patterns import scaling_for

METADATA = "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# What the oldest spelling (`to_q_lora.up`) calls the modules of a text encoder, and of anything else
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_OLD = {"to_out": "to_out.0"}
# And XLabs, the layers of FLUX, by the names of its checkpoint (ComfyUI's `convert_uso_lora`)
_XLABS = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",  # of a single block: the first rows of linear1
    "proj_lora": "linear2",
}
_FOREIGN = re.compile(r"^(?:double|single)_blocks\.|\.lora_down\.|\.lora_A\.(?!weight$)")


class DiffusersAdapter(SingleFile):
    """An adapter as diffusers' `save_lora_weights`, `save_lora_adapter` and `save_attn_procs` write it.

    Layout names are `component.module`; where the file names no component, as `save_attn_procs` does not, the module.
    """

    kind = "diffusers"

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        self.configs = read_metadata(metadata, path)
        super().__init__(path, tensors, metadata)
        if "" in self.configs and all(split(name)[0] for name in self.layout):
            raise AdapterError(f"{path}: {METADATA} in its header names no component, and the tensors do; remove it")
        told = METADATA in metadata or any(m.alpha_key for m in self.entries.values())
        if not told and mixed(self.layout.ranks):
            self.notes.append("ranks differ and the file tells no scale: read as 1, as diffusers since 14409 does")

    @classmethod
    def recognises(cls, names: Names) -> Fit:
        if not names.stems:
            return Fit.NONE
        ours = names.roots <= {*COMPONENTS, *BLOCKS} or all(".processor." in stem for stem in names.stems)
        return Fit.LIKELY if ours else Fit.NONE

    @classmethod
    def to_common(cls, names: Collection[str]) -> list[str]:
        if part := next((name for name in names if name.endswith(".linear1_qkv")), None):
            raise ConfigError(f"{part} is some rows of a layer, as only XLabs' files have it; keep the format")
        component = "" if any(split(name)[0] for name in names) else f"{component_of(names)}."
        return [component + name for name in names]

    @classmethod
    def from_common(cls, names: Collection[str]) -> list[str]:
        return [to_diffusers(name) for name in names]

    @classmethod
    def describe(
        cls, metadata: Mapping[str, str], modules: Mapping[str, Module], ranks: Mapping[str, int]
    ) -> dict[str, str]:
        return with_configs(metadata, unit_scales(ranks))

    @classmethod
    def spare(cls, modules: Mapping[str, Module]) -> int:
        return 512 + sum(3 * (len(json.dumps(re.escape(name))) * 2 + 48) for name in modules)

    @property
    def peft_configs(self) -> Sequence[Mapping[str, Any]]:
        return list(self.configs.values())

    def name_of(self, factor: Factor) -> str:
        head, _, last = factor.stem.replace(".processor.", ".").rpartition(".")
        layer = _XLABS.get(f"{last}_lora" if factor.old else last)
        if layer is not None and re.match(r"(?:double|single)_blocks\.", head):
            return f"{head}.{layer}"
        if not factor.old:
            return factor.stem
        return f"{head}.{(_OLD_TEXT if head.startswith('text_encoder') else _OLD).get(last, last)}"

    def scaling(self, name: str, rank: int, alpha: float | None) -> float:
        component, module = split(name)
        config = self.configs.get(component)
        if config is None:
            return super().scaling(name, rank, alpha)
        if alpha is not None:
            raise AdapterError(
                f"{self.path}: {name} has an alpha and the header has {METADATA}; diffusers refuses both, so remove one"
            )
        if rank != pattern_value(config["rank_pattern"], module, config["r"]):
            raise AdapterError(f"{self.path}: {name} has rank {rank}, but {METADATA} in the header says another")
        value = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        return scaling_for(value, rank, bool(config.get("use_rslora")))

    def described(self, ranks: Mapping[str, int]) -> dict[str, str]:
        # A component whose every module left keeps what it said, since no config can say rank 0
        configs = dict(self.configs)
        for component, names in _by_component(ranks).items():
            modules = {module: ([module], self.entries[component + module].slot.scaling) for module in names}
            inside = {module: ranks[component + module] for module in names}
            if component in configs and any(inside.values()):
                configs[component] = resized_config(configs[component], modules, inside)
        silent = {
            name: rank
            for name, rank in ranks.items()
            if split(name)[0] not in configs and not self.entries[name].alpha_key and not self._foreign(name)
        }
        return with_configs(self.metadata, configs | unit_scales(silent, always=bool(configs)))

    def _foreign(self, name: str) -> bool:
        """Whether diffusers gives the module a component by which it then looks into the header, in vain."""
        return not split(name)[0] and _FOREIGN.search(self.entries[name].a_key) is not None


def mixed(ranks: Mapping[str, int]) -> bool:
    """Whether the modules of one component differ in rank; those that left do not count."""
    return any(len({ranks[c + m] for m in ms} - {0}) > 1 for c, ms in _by_component(ranks).items())


def unit_scales(ranks: Mapping[str, int], *, always: bool = False) -> dict[str, dict[str, Any]]:
    """Component -> config by which the scale of its every module is 1. Where no component has mixed ranks that needs
    no telling, and there are none unless `always`; where one has, all do, since diffusers then looks for each."""
    configs = {}
    for component, names in _by_component(ranks).items() if always or mixed(ranks) else ():
        inside = {module: ranks[component + module] for module in names if ranks[component + module]}
        blank = {"peft_type": "LORA", "target_modules": target_modules(inside)}
        if inside:
            configs[component] = resized_config(blank, {module: ([module], 1.0) for module in inside}, inside)
    return configs


def with_configs(metadata: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The header's metadata with the configs of these components."""
    if not configs:
        return dict(metadata)
    packed = {component + field: value for component, config in configs.items() for field, value in config.items()}
    return {**metadata, METADATA: json.dumps(packed, indent=2, sort_keys=True)}


def read_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Component, with its dot -> the PEFT config that the header holds for it.

    Raises:
        AdapterError: it is not JSON, or not the config of a LoRA that can be resized.
    """
    if METADATA not in metadata:
        return {}
    try:
        packed = strict_object(metadata[METADATA])
    except ValueError as e:
        raise AdapterError(f"{path}: {METADATA} in its header is not a JSON object ({e}); it is damaged") from None
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in packed.items():
        head, dot, field = key.rpartition(".")
        if dot and head not in COMPONENTS:
            raise AdapterError(f"{path}: {METADATA} in its header is about {head!r}; known are {', '.join(COMPONENTS)}")
        configs[head + dot][field] = value
    return {
        component: check_config({"peft_type": "LORA", **config}, f"{path}: {METADATA}")
        for component, config in configs.items()
    }


def to_diffusers(name: str) -> str:
    """Return diffusers' name of a module, given its common one.

    Raises:
        ConfigError: the name is that of the original checkpoint, which diffusers' differ from.
    """
    if name.partition(".")[0] not in COMPONENTS:
        raise ConfigError(
            f"{name}: goes by the names of the original checkpoint, and which of diffusers' modules that is depends on "
            "the model; keep the format, which diffusers' load_lora_weights translates itself"
        )
    return renamed(name)


def _by_component(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        component, module = split(name)
        found[component].append(module)
    return found
