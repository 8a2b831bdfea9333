"""Write an adapter of one format as another: the same DeltaW with other names and another way to state the scale."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankflow.errors import ConfigError
from rankflow.formats.as_lora.dense import DenseAdapter
from rankflow.formats.base import Put, SavedAdapter, Sketch, at_unit_scale, fold
from rankflow.formats.io.atomic import atomic_folder
from rankflow.formats.io.outputs import check_destination
from rankflow.formats.io.tensors import Spec
from rankflow.formats.io.writers import tensor_writer
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft.files import write_adapter_files
from rankflow.formats.peft_config import resized_config, target_modules
from rankflow.formats.peft_fields import acting, unknown
from rankflow.formats.single_file import names as naming
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter, spare, split, unit_scales, with_configs
from rankflow.formats.single_file.kohya import kohya_metadata, stamp
from rankflow.formats.single_file.writer import Module, check_single, outline, overhead, write_single
from rankflow.plans.layout import Layout

FORMATS = ("peft", "kohya", "diffusers")
Source = SavedAdapter | DenseAdapter
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


class Converted:
    """A saved adapter that is read as it is and written in another format."""

    def __init__(self, source: Source, kind: str, *, keep_names: bool = False):
        """
        Args:
            kind: one of `FORMATS`.
            keep_names: of a source in that format already, leave modules the names that a library gave them.

        Raises:
            ConfigError: that format cannot hold this adapter.
        """
        self.source, self.kind, self.path = source, kind, source.path
        self.layout, self.entries = source.layout, source.entries
        self._gains: dict[str, float] = {}  # what is multiplied into B as it is read
        self.companions = source.companions if kind == "peft" else []
        self.extra_tensors: dict[str, int] = {}
        self.notes = [*source.notes, f"read as {source.kind}, written as {kind}", *lost_fields(source)]
        _check_plain(source, kind)
        self.names = {name: name for name in source.layout} if keep_names else _names(source, kind)
        kept = {k: v for k, v in source.metadata.items() if k != METADATA and k not in _HASHES}
        self.metadata = {"format": "pt", **kept}
        self._modules = {name: self._module(name, stem) for name, stem in self.names.items()}

    def at_unit_scale(self) -> Converted:
        """Return the same adapter with every module's scaling in its B."""
        found = copy.copy(self)
        found._gains = {name: slot.scaling for name, slot in self.layout.items()}
        found.entries = at_unit_scale(self.entries)
        found.layout = Layout({name: entry.slot for name, entry in found.entries.items()})
        return found

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.source.factors(name)
        return a, fold(b, self._gains.get(name, 1.0))

    @property
    def sketch(self) -> Sketch | None:
        return self.source.sketch

    def outside(self, name: str) -> float:
        return self.source.outside(name)

    @property
    def file_bytes(self) -> int:
        return self.source.file_bytes

    @property
    def overhead(self) -> int:
        specs, metadata = self._outline(self.layout.ranks, torch.bfloat16)
        return overhead(specs, metadata, self._modules) + (spare(self._modules) if self.kind == "diffusers" else 128)

    def beside(self, suffix: str) -> Path:
        found = self.source.beside(suffix)
        stem = found if isinstance(self.source, DenseAdapter | PeftAdapter) else found.with_suffix("")
        return stem if self.kind == "peft" else stem.with_name(f"{stem.name}.safetensors")

    def check_out(self, out: Path, *, force: bool) -> None:
        (check_destination if self.kind == "peft" else check_single)(out, self.path, force=force)

    def weights_in(self, out: Path) -> Path:
        return out / "adapter_model.safetensors" if self.kind == "peft" else out

    @contextmanager
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Iterator[Put]:
        self.check_out(out, force=force)
        specs, metadata = self._outline(ranks, dtype)
        if self.kind != "peft":
            with write_single(
                out, self._modules, ranks, specs, metadata, stamp if self.kind == "kohya" else None, {}
            ) as put:
                yield put
            return
        with atomic_folder(out) as folder:
            write_adapter_files(folder, self._config(ranks), self.companions)
            writer = tensor_writer(folder / self.weights_in(out).name, specs, metadata)

            def put_factors(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
                module = self._modules[name]
                for key, t in ((module.a_key, a), (module.b_key, b)):
                    writer.put(key, t.reshape(specs[key][1]))

            yield put_factors
            writer.close()

    def _outline(self, ranks: Mapping[str, int], dtype: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, str]]:
        metadata = self.metadata
        if self.kind == "kohya":
            module = {"ss_network_module": "networks.lora", "ss_network_dim": "", **metadata}
            metadata = kohya_metadata(module, self._modules, ranks)
        elif self.kind == "diffusers":
            metadata = with_configs(metadata, unit_scales({self.names[name]: rank for name, rank in ranks.items()}))
        return outline(self._modules, ranks, dtype), metadata

    def _module(self, name: str, stem: str) -> Module:
        entry = self.entries[name]
        found = Module(entry.slot, "", "", entry.a_shape, entry.b_shape, entry.dtype)
        if self.kind == "kohya":
            keys = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")
            return replace(found, a_key=keys[0], b_key=keys[1], alpha_key=f"{stem}.alpha")
        prefix = "base_model.model." if self.kind == "peft" else ""
        gain = 1.0 if self.kind == "peft" else entry.slot.scaling
        keys = (f"{prefix}{stem}.lora_A.weight", f"{prefix}{stem}.lora_B.weight")
        return replace(found, a_key=keys[0], b_key=keys[1], gain=gain)

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
        }
        if isinstance(self.source, DenseAdapter):
            blank |= self.source.about
        modules = {stem: ([stem], self.layout[name].scaling) for name, stem in present.items()}
        return resized_config(blank, modules, {stem: ranks[name] for name, stem in present.items()})


def _check_plain(source: Source, kind: str) -> None:
    if source.extra_tensors:
        raise ConfigError(
            f"{source.path}: has more than LoRA factors ({next(iter(source.extra_tensors))}), which {kind} would lose; "
            "keep the format"
        )
    for name, slot in source.layout.items():
        if slot.kind not in ("linear", "conv") or slot.tie is not None:
            raise ConfigError(f"{source.path}: {name} is of kind {slot.kind}, which only {source.kind} can hold")
    for config in configs_of(source) if kind != "peft" else ():
        check_sayable(config, source.path, kind)
    if kind != "peft" and _about(source).get("fan_in_fan_out"):
        raise ConfigError(f"{source.path}: fan_in_fan_out transposes its updates, as peft alone does; keep it")


def check_sayable(config: Mapping[str, Any], path: Path, kind: str, *, but: Collection[str] = ()) -> None:
    """
    Args:
        but: fields that the format has a place for.

    Raises:
        ConfigError: the adapter does what only a PEFT config says, and `kind` has none.
    """
    if lost := [field for field in acting(config) if field not in but]:
        raise ConfigError(
            f"{path}: {lost[0]} is set, which {kind} has no place for, so that the adapter would do something else; "
            "keep the peft format"
        )


def configs_of(source: Source) -> list[Mapping[str, Any]]:
    """The PEFT configs that come with an adapter: of its folder, or of each component in a header of diffusers'."""
    if isinstance(source, Converted):
        return configs_of(source.source)
    if isinstance(source, DiffusersAdapter):
        return list(source.configs.values())
    return [source.config] if isinstance(source, PeftAdapter) else []


def lost_fields(source: Source) -> list[str]:
    """Return the note about fields that are not known."""
    fields = sorted({field for config in configs_of(source) for field in unknown(config)})
    return [f"set in the source and not known here, so it is lost: {', '.join(fields)}"] if fields else []


def _about(source: Source) -> Mapping[str, Any]:
    """Return what PEFT's config says about an adapter."""
    if isinstance(source, Converted):
        return _about(source.source)
    return (
        source.config if isinstance(source, PeftAdapter) else source.about if isinstance(source, DenseAdapter) else {}
    )


def _names(source: Source, kind: str) -> dict[str, str]:
    """Return module -> its name in the other format."""
    names = list(source.layout)
    if part := next((name for name in names if name.endswith(".linear1_qkv")), None):
        raise ConfigError(
            f"{source.path}: {part} is some rows of a layer, as only XLabs' files have it; keep the format"
        )
    if source.kind == "kohya":
        common = [naming.from_kohya(name, names) for name in names]
    elif isinstance(source, DenseAdapter) and kind == "peft":
        return {name: name for name in names}
    elif source.kind == "peft":
        component = naming.from_peft(names)
        common = [f"{component}.{name}" for name in names]
    elif source.kind == "comfyui":
        common = [naming.from_comfyui(name) for name in names]
    else:
        component = "" if any(split(name)[0] for name in names) else f"{naming.from_peft(names)}."
        common = [component + name for name in names]
    if kind == "kohya":
        new = [naming.to_kohya(name, common) for name in common]
    elif kind == "peft":
        cut = naming.to_peft(common)
        new = [name[cut:] for name in common]
    else:
        new = [naming.to_diffusers(name) for name in common]
    if twice := [name for name, n in Counter(new).items() if n > 1]:
        raise ConfigError(f"{source.path}: two modules would both be called {twice[0]} in the {kind} format")
    return dict(zip(names, new, strict=True))
