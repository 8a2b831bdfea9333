"""The interface of a saved adapter of any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.io.outputs import suffixed
from rankflow.linalg.svd import Backend
from rankflow.plans.layout import Layout, Slot

BASE_COPY = ".base_layer.weight"  # what PEFT saves beside the factors of embeddings: the base model's own weight
Put = Callable[[str, Tensor, Tensor], None]  # module, A [*e, r, in], B [*e, out, r]


@dataclass(frozen=True)
class SavedModule:
    """Where a file keeps one module's factors. Shapes are those of the file (for convolutions with the kernel)."""

    slot: Slot
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Sketch:
    """How many leading directions of a full matrix to take (`rank`), and by which SVD."""

    rank: int = 64
    backend: Backend = "torch"


Saved = TypeVar("Saved", bound=SavedModule)


_SCALES = (1e-30, 1e30)  # beyond these float32 factors have no product
_NUMBERS = (1e-36, 1e36)  # and these are that times, or over, any rank
WIDE = 1024  # a rank that may be above what a module's shape can hold


def is_scale(value: object, limits: tuple[float, float] = _NUMBERS) -> bool:
    """Return whether it is a positive number of a size that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and limits[0] <= value <= limits[1]


def checked_slot(slot: Slot, name: str, path: Path) -> Slot:
    """Return the slot, unless its scaling or rank is one that no adapter has.

    Raises:
        AdapterError: a scaling or a rank that no adapter has. What is computed is r x r, so that a file of thin
            factors of enormous rank would take as much memory as its size squared.
    """
    if not is_scale(slot.scaling, _SCALES):
        raise AdapterError(f"{path}: {name} is scaled by {slot.scaling:g}; the adapter is damaged")
    if slot.rank > max(WIDE, slot.in_features + slot.out_features):
        raise AdapterError(
            f"{path}: {name} has rank {slot.rank} with {slot.in_features} inputs and {slot.out_features} outputs; "
            "the adapter is damaged"
        )
    return slot


def at_unit_scale(entries: Mapping[str, Saved]) -> dict[str, Saved]:
    """Return the same modules with scale 1, for factors that went through `fold`."""
    return {name: replace(entry, slot=replace(entry.slot, scaling=1.0)) for name, entry in entries.items()}


def fold(b: Tensor, scaling: float) -> Tensor:
    """B times its module's scale. All of it goes there: A stays bit for bit, and one factor is rounded once, by nothing
    where the scale is a power of two; the root of the scale, for both, would round twice and be seldom exact itself.
    In float64, so that only the type it is written in rounds."""
    return b if scaling == 1 else b.double() * scaling


class Source(ABC):
    """An adapter that can be read; tensors stay on disk until asked for.

    `layout` and `entries` name the same modules in the same order.
    """

    kind: str
    path: Path
    layout: Layout
    entries: Mapping[str, SavedModule]
    notes: list[str]
    companions: Sequence[Path] = ()  # files beside it that are copied along
    extra_tensors: Mapping[str, int] = MappingProxyType({})  # neither factor nor alpha, and copied: key -> bytes
    metadata: Mapping[str, str] = MappingProxyType({})  # of the file's header
    sketch: Sketch | None = None  # how far full matrices were looked at, if it was made of such

    @property
    def source(self) -> Source:
        """What is read: the adapter itself, but for one that is written in another format than it has."""
        return self

    @property
    def peft_configs(self) -> Sequence[Mapping[str, Any]]:
        """The PEFT configs that come with it: of its folder, or of each component in a header of diffusers'."""
        return ()

    @property
    def about(self) -> Mapping[str, Any]:
        """What PEFT's config says of it, or should say once it has one."""
        return {}

    @property
    def file_bytes(self) -> int:
        """Bytes of its files of tensors."""
        return self.path.stat().st_size

    @abstractmethod
    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return canonical A ``[*e, r, in]`` and B ``[*e, out, r]`` of one module, read-only, in its own dtype.

        Raises:
            AdapterError: a value is NaN or infinite.
        """

    def outside(self, name: str) -> float:
        """Return the energy of the module's update that its factors, read before, leave out. It is 0 but for full
        matrices (`rankflow.formats.as_lora.dense`)."""
        return 0.0

    def beside(self, suffix: str) -> Path:
        """Return the default path of an output: `<source>-<suffix>` beside the source."""
        return suffixed(self.path.resolve() if self.path.name in ("", "..") else self.path, suffix)


class SavedAdapter(Source):
    """An adapter that can be read, and written anew."""

    @property
    @abstractmethod
    def overhead(self) -> int:
        """Bytes of a rewritten file that are no LoRA factors, at most, in whatever dtype and ranks it is written."""

    @abstractmethod
    def check_out(self, out: Path, *, force: bool) -> None:
        """Refuse an output that `rewrite` could not write.

        Raises:
            ConfigError: `rewrite` could not write there without loss.
        """

    def weights_in(self, out: Path) -> Path:
        """Return the file of tensors that `rewrite` writes for `out`."""
        return out

    @abstractmethod
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> AbstractContextManager[Put]:
        """Write the adapter anew at other ranks: yields ``put(name, A, B)``, to be called once for every module with
        a rank, from any thread. `out` appears, whole and on disk, when the block ends well."""
