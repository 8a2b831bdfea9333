"""Write an adapter of one format as another: the same DeltaW with other names and another way to state the scale."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rankflow.errors import ConfigError
from rankflow.formats.as_lora.dense import DenseAdapter
from rankflow.formats.base import Put, Source
from rankflow.formats.io.atomic import atomic_folder
from rankflow.formats.io.outputs import check_destination
from rankflow.formats.io.tensors import Spec
from rankflow.formats.io.writers import tensor_writer
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft.files import write_adapter_files
from rankflow.formats.peft_config import resized_config, target_modules
from rankflow.formats.rewritten import Rewritten, check_sayable
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.diffusers import METADATA
from rankflow.formats.single_file.names import component_length, component_of
from rankflow.formats.single_file.writer import Module, check_single, outline, overhead, write_single

_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


class Converted(Rewritten):
    """A source that is written under other names: `names` says what each of its modules is called then."""

    def __init__(self, source: Source):
        """
        Raises:
            ConfigError: the format cannot hold this adapter.
        """
        super().__init__(source)
        _check_plain(source, self.kind)
        self.names = _paired(source, self._new_names(), self.kind)
        kept = {k: v for k, v in source.metadata.items() if k != METADATA and k not in _HASHES}
        self.metadata = {"format": "pt", **kept}
        self._modules = {name: self._module(name) for name in self.names}

    @abstractmethod
    def _new_names(self) -> list[str]:
        """What the modules are called in the format, in order of the layout."""

    @abstractmethod
    def _module(self, name: str) -> Module:
        """Where the factors of a module are written."""

    def _outline(self, ranks: Mapping[str, int], dtype: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, str]]:
        return outline(self._modules, ranks, dtype), dict(self.metadata)

    @property
    def overhead(self) -> int:
        return overhead(*self._outline(self.layout.ranks, torch.bfloat16), self._modules) + 128

    def beside(self, suffix: str) -> Path:
        found = super().beside(suffix)
        return found.with_suffix("") if isinstance(self._source, SingleFile) else found


class AsPeft(Converted):
    """A source that is written as PEFT's folder."""

    kind = "peft"

    def __init__(self, source: Source):
        super().__init__(source)
        self.companions = source.companions

    def _new_names(self) -> list[str]:
        if isinstance(self._source, DenseAdapter):  # whose names are the base model's, as PEFT's are
            return list(self.layout)
        common = common_names(self._source)
        cut = component_length(common)
        return [name[cut:] for name in common]

    def at_unit_scale(self) -> AsPeft:
        """The same with every module's scaling in its B."""
        found = copy.copy(self)
        found.fold_scales()
        return found

    def check_out(self, out: Path, *, force: bool) -> None:
        check_destination(out, self.path, force=force)

    def weights_in(self, out: Path) -> Path:
        return out / "adapter_model.safetensors"

    @contextmanager
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Iterator[Put]:
        self.check_out(out, force=force)
        specs, metadata = self._outline(ranks, dtype)
        with atomic_folder(out) as folder:
            write_adapter_files(folder, self._config(ranks), self.companions)
            writer = tensor_writer(folder / self.weights_in(out).name, specs, metadata)

            def put_factors(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
                module = self._modules[name]
                for key, t in ((module.a_key, a), (module.b_key, b)):
                    writer.put(key, t.reshape(specs[key][1]))

            yield put_factors
            writer.close()

    def _module(self, name: str) -> Module:
        entry, stem = self.entries[name], f"base_model.model.{self.names[name]}"
        keys = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
        return Module(entry.slot, *keys, entry.a_shape, entry.b_shape, entry.dtype)

    def _config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        present = {name: stem for name, stem in self.names.items() if ranks[name]}
        blank = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "bias": "none",
            "inference_mode": True,
            "lora_dropout": 0.0,
            "target_modules": target_modules(present.values()),
            "task_type": None,
            **self.about,
        }
        modules = {stem: ([stem], self.layout[name].scaling) for name, stem in present.items()}
        return resized_config(blank, modules, {stem: ranks[name] for name, stem in present.items()})


class AsSingleFile(Converted):
    """A source that is written as a single file of some format.

    Args:
        keep_names: of a source in that format already, leave modules the names that a library gave them.
    """

    def __init__(self, source: Source, to: type[SingleFile], *, keep_names: bool = False):
        self.kind, self._to, self._keep_names = to.kind, to, keep_names
        super().__init__(source)

    def _new_names(self) -> list[str]:
        return list(self.layout) if self._keep_names else self._to.from_common(common_names(self._source))

    @property
    def overhead(self) -> int:
        return super().overhead - 128 + self._to.spare(self._modules)

    def beside(self, suffix: str) -> Path:
        stem = super().beside(suffix)
        return stem.with_name(f"{stem.name}.safetensors")

    def check_out(self, out: Path, *, force: bool) -> None:
        check_single(out, self.path, force=force)

    @contextmanager
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Iterator[Put]:
        self.check_out(out, force=force)
        specs, metadata = self._outline(ranks, dtype)
        with write_single(out, self._modules, ranks, specs, metadata, self._to.finish, {}) as put:
            yield put

    def _module(self, name: str) -> Module:
        return self._to.place(self.entries[name], self.names[name])

    def _outline(self, ranks: Mapping[str, int], dtype: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, str]]:
        modules = {self.names[name]: module for name, module in self._modules.items()}
        own = {self.names[name]: ranks[name] for name in self._modules}
        return outline(self._modules, ranks, dtype), self._to.describe(self.metadata, modules, own)


def common_names(source: Source) -> list[str]:
    """What formats of image models call the modules of a source among themselves, in order of its layout.

    Raises:
        ConfigError: that is not known.
    """
    names = list(source.layout)
    if isinstance(source.source, SingleFile):
        return source.source.to_common(names)
    component = component_of(names)
    return [f"{component}.{name}" for name in names]


def _paired(source: Source, names: list[str], kind: str) -> dict[str, str]:
    """Module -> what it is called in the other format."""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ConfigError(f"{source.path}: two modules would both be called {twice[0]} in the {kind} format")
    return dict(zip(source.layout, names, strict=True))


def _check_plain(source: Source, kind: str) -> None:
    if source.extra_tensors:
        raise ConfigError(
            f"{source.path}: has more than LoRA factors ({next(iter(source.extra_tensors))}), which {kind} would lose; "
            "keep the format"
        )
    for name, slot in source.layout.items():
        if slot.kind not in ("linear", "conv") or slot.tie is not None:
            raise ConfigError(f"{source.path}: {name} is of kind {slot.kind}, which only {source.kind} can hold")
    for config in source.peft_configs if kind != PeftAdapter.kind else ():
        check_sayable(config, source.path, kind)
    if kind != PeftAdapter.kind and source.about.get("fan_in_fan_out"):
        raise ConfigError(f"{source.path}: fan_in_fan_out transposes its updates, as peft alone does; keep it")
