"""Which modules of a saved adapter its base model has, by the names that whatever loads both goes by.

An adapter of names from before a library renamed its modules loads nothing, in silence. What a base has is told by the
model that transformers would build of its config, or else by the headers of its files; no weight is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankflow.errors import ConfigError
from rankflow.formats.base import SavedAdapter
from rankflow.formats.io.models import is_model, open_model
from rankflow.formats.io.pretrained import build, load_config
from rankflow.formats.io.tensors import TENSOR_FILES, open_tensors
from rankflow.formats.peft_fields import is_set
from rankflow.formats.single_file import names as naming
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.names import COMPONENTS

# What checkpoints of one file have in front of the names of a component
_IN_CHECKPOINTS = {
    "model.diffusion_model.": "diffusion_model",
    "diffusion_model.": "diffusion_model",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_ALONE = ""  # what a base that is one model is called here; it may be any component
_TIED = ("lm_head", "embed_out")  # left out of files where they are one with the embeddings
# How names of the models' own checkpoints begin
_BLOCKS = re.compile(r"(?:input_blocks|output_blocks|middle_block|double_blocks|single_blocks|joint_blocks)[._]")


@dataclass(frozen=True)
class Absent:
    """modules: of the adapter, which the base does not have. unseen: those of which it cannot be told."""

    modules: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass
class _Part:
    """One model of a base. names: of its modules and parameters. prefix: of the model within; names in a file may have
    it or lack it. transforms: how transformers renames what it loads."""

    names: set[str]
    prefix: str = ""
    transforms: Sequence[Any] = ()
    _spelt: dict[str, set[str]] = field(default_factory=dict)

    def has(self, module: str) -> bool:
        """Whether it has a module, or a parameter, of this name or of one that comes to be this one as it is loaded."""
        inner = f"{self.prefix}."
        spellings = [module, *([inner + module, module.removeprefix(inner)] if self.prefix else [])]
        return any(name in self.names or _loaded_as(name, self.transforms) in self.names for name in spellings)

    def spelt(self, component: str) -> set[str]:
        """The names as image models' formats have them, were this that component; with dots, and without."""
        if component not in self._spelt:
            names = {naming.renamed(f"{component}.{name}").removeprefix(f"{component}.") for name in self.names}
            self._spelt[component] = names | {name.replace(".", "_") for name in names}
        return self._spelt[component]


def absent_from(adapter: SavedAdapter, base: str | Path) -> Absent:
    """The modules of an adapter that are not in the base model.

    Args:
        base: the folder of a model of transformers' or diffusers', or of a pipeline; a checkpoint file; or the name of
            a model of which transformers has the config on this machine.

    Raises:
        ConfigError: no model there, or one of which neither config nor files tell the modules.
        AdapterError: a file of it is damaged.
    """
    parts = _parts(base)
    names = tuple(adapter.layout)
    if any(is_set(config.get("layer_replication")) for config in adapter.peft_configs):
        return Absent((), names)  # for a model whose layers are others than the base's
    source = adapter.source
    if not isinstance(source, SingleFile):
        return Absent(tuple(name for name in names if not any(part.has(name) for part in parts.values())), ())
    places = {name: source.places(name) for name in names}
    found = {name for name in names if any(_is_in(parts, component, module) for component, module in places[name])}
    heard = {places[name][0][0] for name in found}
    gone, unseen = [], []
    for name in names:
        if name not in found:
            told = _told(parts, places[name], heard, alone=_ALONE in parts, file=Path(base).is_file())
            (gone if told else unseen).append(name)
    return Absent(tuple(gone), tuple(unseen))


def _is_in(parts: Mapping[str, _Part], component: str, module: str) -> bool:
    part = parts.get(component) or parts.get(_ALONE)
    return part is not None and module in part.spelt(component)


def _told(
    parts: Mapping[str, _Part], places: Sequence[tuple[str, str]], heard: Collection[str], *, alone: bool, file: bool
) -> bool:
    """Whether it is certain that the base does not have what it was not found to have."""
    if alone and heard and not any(component in heard for component, _ in places):
        return False  # it is another component that the base is
    there = [parts.get(component) or parts.get(_ALONE) for component, _ in places]
    if not any(there):
        return not file  # a checkpoint may have the component under names of its own
    # Names of the model's own checkpoint, and diffusers' for the same, are not translated without the model
    theirs = any(_BLOCKS.match(name) for part in there if part is not None for name in part.names)
    return theirs == any(_BLOCKS.match(module) for _, module in places)


# -- what a base has ------------------------------------------------------------------------------------------------


def _parts(base: str | Path) -> dict[str, _Part]:
    path = Path(base)
    if path.is_file() and path.suffix in TENSOR_FILES:
        return _of_checkpoint(open_tensors(path)[0])
    inside = {c: path / c for c in COMPONENTS if (path / c / "config.json").is_file() or is_model(path / c)}
    if inside and not is_model(path):
        return {component: _model(folder) for component, folder in inside.items()}
    return {_ALONE: _model(base)}


def _of_checkpoint(keys: Iterable[str]) -> dict[str, _Part]:
    names = _modules(keys)
    parts: dict[str, _Part] = {}
    for prefix, component in _IN_CHECKPOINTS.items():
        if inside := {name.removeprefix(prefix) for name in names if name.startswith(prefix)}:
            parts.setdefault(component, _Part(set())).names.update(inside)
    return parts or {_ALONE: _Part(names)}


def _model(base: str | Path) -> _Part:
    """One model: as transformers builds it, where it does, or else as its files name it."""
    path = Path(base)
    try:
        return _built(base)
    except ConfigError:
        if not is_model(path):
            raise
    names = _modules(open_model(path))
    tied = {f"{inner}{head}" for head in _TIED for inner in ("", "model.")}
    return _Part(names | (set() if any(name.endswith(_TIED) for name in names) else tied))


def _built(base: str | Path) -> _Part:
    config = load_config(base, local_files_only=True)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that computes nothing
        model = build(config, base)
    names = _modules(name for name, _ in model.named_parameters(remove_duplicate=False))
    return _Part(names, model.base_model_prefix, _transforms(model))


def _modules(keys: Iterable[str]) -> set[str]:
    """Names of tensors, and of the modules whose they are."""
    return {name for key in keys for name in (key, key.rpartition(".")[0]) if name}


def _transforms(model: Any) -> list[Any]:
    """How transformers renames tensors as it loads them, and PEFT those of an adapter; from transformers 5 on. PEFT
    does not put a level in front, or take one off (run with 0.21.2: CLIP's `text_model`)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:
        return []
    return [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]


def _loaded_as(module: str, transforms: Sequence[Any]) -> str:
    if not transforms:
        return module
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return rename_source_key(f"{module}.weight", renamings, converters)[0].removesuffix(".weight")
