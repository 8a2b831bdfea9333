"""Adapters that are one file of tensors, as kohya's, ComfyUI's and diffusers' are: what these have in common.

DeltaW = alpha / r * up down, alpha a number per module in the file and r the rows of down; alpha / r is 1 where there
is none (ComfyUI's `weight_adapter/lora.py`, sd-scripts' `lora.py` and `resize_lora.py`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.parts import MOST
from rankflow.formats.base import Put, SavedAdapter, SavedModule, checked_slot, is_scale
from rankflow.formats.io.tensors import SAFETENSORS_DTYPES, Spec, all_finite
from rankflow.formats.io.writers import SafetensorsWriter
from rankflow.formats.single_file.keys import (
    Factor,
    Fit,
    Names,
    factor_of,
    refuse_empty,
    refuse_unknown_factors,
    refuse_unused_alphas,
)
from rankflow.formats.single_file.lycoris import fold_tucker, refuse_variants
from rankflow.formats.single_file.names import COMPONENTS, renamed, split
from rankflow.formats.single_file.writer import Module, check_single, outline, overhead, write_single
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.names import natural

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SingleFile(SavedAdapter):
    """An adapter in one file, open for reading; tensors stay on disk until asked for.

    A format is a subclass in a file of its own: `recognises` tells its files, `to_common` and `from_common` translate
    names of modules, `place` and `describe` say what is written of an adapter of another format. By a common name a
    module is called by a component and its name in it: `unet.` and so on as diffusers has them, `diffusion_model.` for
    what goes by the names of the model's own checkpoint.

    Tensors other than factors and alphas are kept as they are, and so is the header's metadata but for what says
    ranks. Modules with such tensors of their own stay in the file (`min_rank` 1). `names_in_file` says which key of the
    file is read, and written, as which.
    """

    entries: Mapping[str, Module]
    writes = True  # whether adapters of other formats are written in this one

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        """
        Raises:
            AdapterError: tensors that make no LoRA, or one that cannot be resized.
        """
        self.path = path
        self.names_in_file: Mapping[str, str] = {key: key for key in tensors}
        self.metadata = dict(metadata)
        self._tensors = tensors
        refuse_variants(tensors, path)
        refuse_empty(tensors, path)
        self.entries = self._read()  # type: ignore[reportIncompatibleVariableOverride]
        self.layout = Layout({name: module.slot for name, module in self.entries.items()})
        ours = {k for m in self.entries.values() for k in (m.a_key, m.b_key, m.mid_key, m.alpha_key)}
        self.extra_tensors = {key: tensors[key].nbytes for key in tensors if key not in ours}
        extra = {key: tensors[key] for key in self.extra_tensors}
        refuse_unknown_factors(extra, path)
        refuse_unused_alphas(extra, path)
        self.notes: list[str] = []
        if any("dora_scale" in key or "lora_magnitude" in key for key in tensors):
            self.notes.append("DoRA: magnitudes are kept as they are, so predicted errors are estimates")
        if any(m.mid_key for m in self.entries.values()):
            self.notes.append("Tucker factors (lora_mid) were folded into plain ones, which may take more room")

    # -- what a format says of itself -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def recognises(cls, names: Names) -> Fit:
        """How surely a file with these names is of the format."""

    @classmethod
    @abstractmethod
    def to_common(cls, names: Collection[str]) -> list[str]:
        """The common name of each module.

        Raises:
            ConfigError: there is none.
        """

    @classmethod
    def from_common(cls, names: Collection[str]) -> list[str]:
        """What the format calls each module, given their common names. Needed where `writes`.

        Raises:
            ConfigError: it has no name for one.
        """
        raise NotImplementedError(cls.kind)

    @classmethod
    def place(cls, entry: SavedModule, stem: str) -> Module:
        """Where the factors of another format's module are written, with its scale in B, since no alpha says it."""
        keys = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
        return Module(entry.slot, *keys, entry.a_shape, entry.b_shape, entry.dtype, gain=entry.slot.scaling)

    @classmethod
    def describe(
        cls, metadata: Mapping[str, str], modules: Mapping[str, Module], ranks: Mapping[str, int]
    ) -> dict[str, str]:
        """Metadata of the header of what was another format's; `modules` and `ranks` by the names in the file."""
        return dict(metadata)

    @classmethod
    def spare(cls, modules: Mapping[str, Module]) -> int:
        """Bytes by which the header's metadata may grow with the ranks."""
        return 128

    @classmethod
    def finish(cls, writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> None:
        """Called with the file once its tensors are written."""

    @classmethod
    def places(cls, name: str) -> list[tuple[str, str]]:
        """(component, module) that a name may stand for in a base model; component "" is a base of one model."""
        component, module = split(renamed(name))
        return [(component.removesuffix("."), module)] if component else [(part, name) for part in COMPONENTS]

    def name_of(self, factor: Factor) -> str:
        """The module's name in the layout."""
        return factor.stem

    def scaling(self, name: str, rank: int, alpha: float | None) -> float:
        """Return a module's scaling, by its alpha and rank.

        Raises:
            AdapterError: the file contradicts itself.
        """
        return 1.0 if alpha is None else alpha / rank

    def described(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Metadata of the header at other ranks."""
        return dict(self.metadata)

    # -- as every saved adapter -------------------------------------------------------------------------------------

    @property
    def overhead(self) -> int:
        return overhead(*self._outline(self.layout.ranks, torch.bfloat16), self.entries) + self.spare(self.entries)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        module = self.entries[name]
        a, b = self._tensors[module.a_key], self._tensors[module.b_key]
        mid = None if module.mid_key is None else self._tensors[module.mid_key]
        for key, t in ((module.a_key, a), (module.b_key, b), (module.mid_key, mid)):
            if t is not None and not all_finite(t):
                raise AdapterError(f"{self.path}: {key} has NaN or infinite values; the adapter is damaged")
        if mid is not None:
            a = fold_tucker(mid, a)
        return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)

    def check_out(self, out: Path, *, force: bool) -> None:
        check_single(out, self.path, force=force)

    @contextmanager
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Iterator[Put]:
        self.check_out(out, force=force)
        extra = {key: self._tensors[key] for key in self.extra_tensors}
        specs, metadata = self._outline(ranks, dtype)
        with write_single(out, self.entries, ranks, specs, metadata, self.finish, extra) as put:
            yield put

    def _outline(self, ranks: Mapping[str, int], dtype: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, str]]:
        extra = {key: self._tensors[key] for key in self.extra_tensors}
        specs = outline(self.entries, ranks, dtype) | {k: (t.dtype, tuple(t.shape)) for k, t in extra.items()}
        return specs, self.described(ranks)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Module]:
        keys: dict[str, dict[str, str]] = defaultdict(dict)  # module -> part -> key
        stems: dict[str, str] = {}
        for key, t in self._tensors.items():
            if t.dtype not in SAFETENSORS_DTYPES:
                raise AdapterError(f"{self.path}: {key} is of type {t.dtype}, which no adapter has")
            factor = factor_of(key)
            if factor is None:
                continue
            name = self.name_of(factor)
            if factor.part in keys[name]:
                raise AdapterError(
                    f"{self.path}: {name} is there twice, as {keys[name][factor.part]} and as {key}; remove one, since "
                    "it is chance which of them a program takes"
                )
            keys[name][factor.part] = key
            stems[name] = factor.stem
        if not keys:
            raise AdapterError(f"{self.path}: holds no LoRA factors; it is not a LoRA adapter, or was merged")
        alphas = {name: f"{stem}.alpha" for name, stem in stems.items() if f"{stem}.alpha" in self._tensors}
        if alphas and (missing := [name for name in keys if name not in alphas]):
            raise AdapterError(
                f"{self.path}: {missing[0]} has no alpha while {next(iter(alphas))} has one; the file is incomplete. "
                "Programs take it for rank, that is scale 1; add it if that is meant"
            )
        taken = {key for parts in keys.values() for key in parts.values()} | set(alphas.values())
        deepest = 1 + max(stem.count(".") for stem in stems.values())
        extra = [key.split(".", deepest)[:-1] for key in self._tensors if key not in taken]
        owners = {".".join(parts[:n]) for parts in extra for n in range(1, len(parts) + 1)}
        return {
            name: self._module(name, parts, alphas.get(name), alone=stems[name] not in owners)
            for name, parts in sorted(keys.items(), key=lambda item: natural(item[0]))
        }

    def _module(self, name: str, parts: Mapping[str, str], alpha_key: str | None, alone: bool) -> Module:
        for part in ("down", "up"):
            if part not in parts:
                other = parts.get("up") or parts.get("down") or parts["mid"]
                raise AdapterError(f"{self.path}: {name} has {other} but no {part}; the file is incomplete")
        a, b = self._tensors[parts["down"]], self._tensors[parts["up"]]
        mid = self._tensors[parts["mid"]] if "mid" in parts else None
        shapes = f"down {list(a.shape)}, up {list(b.shape)}" + ("" if mid is None else f", mid {list(mid.shape)}")
        given = [t for t in (a, b, mid) if t is not None]
        if any(t.ndim < 2 or 0 in t.shape for t in given) or any(n != 1 for n in b.shape[2:]):
            raise AdapterError(f"{self.path}: {name} has {shapes}, which are no LoRA factors")
        if any(t.dtype != a.dtype or t.dtype not in FLOATS for t in given):
            raise AdapterError(
                f"{self.path}: {name} has {' and '.join(str(t.dtype) for t in given)} factors; all must be of one type "
                "of at least 16 bits"
            )
        rank = b.shape[1]
        if a.shape[0] != rank or (
            mid is not None
            and (mid.shape[:2] != (rank, rank) or mid.ndim != a.ndim or any(n != 1 for n in a.shape[2:]))
        ):
            raise AdapterError(f"{self.path}: {name} has {shapes}, whose ranks do not agree; the file is damaged")
        alpha = None if alpha_key is None else self._alpha(alpha_key)
        a_shape = tuple(a.shape) if mid is None else (*a.shape[:2], *mid.shape[2:])
        if mid is not None and math.prod(a_shape) > MOST:
            raise AdapterError(f"{self.path}: {name} has {shapes}, which come to {math.prod(a_shape):.3g} numbers")
        slot = Slot(
            rank=rank,
            in_features=math.prod(a_shape[1:]),
            out_features=b.shape[0],
            scaling=self.scaling(name, rank, alpha),
            min_rank=int(not alone),
            kind="conv" if a.ndim > 2 else "linear",
            itemsize=a.dtype.itemsize,
        )
        kept = None if alpha_key is None else self._tensors[alpha_key]
        return Module(
            checked_slot(slot, name, self.path),
            parts["down"],
            parts["up"],
            a_shape,
            tuple(b.shape),
            a.dtype,
            parts.get("mid"),
            alpha_key,
            alpha_dtype=kept.dtype if kept is not None and kept.dtype in FLOATS else torch.float32,
            alpha_shape=() if kept is None else tuple(kept.shape),
        )

    def _alpha(self, key: str) -> float:
        t = self._tensors[key]
        if t.numel() != 1 or t.is_complex():
            raise AdapterError(f"{self.path}: {key} is a tensor of shape {list(t.shape)}, not a number")
        value = float(t)
        if not is_scale(value):
            raise AdapterError(
                f"{self.path}: {key} is {value:g}; programs disagree on it (0 is scale 1 to sd-scripts and no "
                "update to ComfyUI), so set it to what is meant"
            )
        return value
