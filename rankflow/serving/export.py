"""Write an adapter so that an engine loads it rightly: its format, one padded rank, scales in the factors.

Zero rows of A and zero columns of B add nothing to DeltaW. With alpha = r and no patterns every engine's rule for the
scale gives 1, and so does PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import ConfigError, naming
from rankflow.formats.base import SavedAdapter, Sketch
from rankflow.formats.convert import AsPeft, AsSingleFile
from rankflow.formats.open import converted, open_adapter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter
from rankflow.serving.check import lasting
from rankflow.serving.engine import Engine, Fate, Problem
from rankflow.serving.engines import engine_named
from rankflow.serving.features import other_names


@dataclass(frozen=True)
class Fitting:
    """engine: what is to load the adapter. rank: what its modules are padded to; the engine's choice if left out.
    to_format: the format to write; the engine's, or the source's. base: the base model's folder, for GGUF and for what
    `open_adapter` takes it for.

    Raises:
        ConfigError: things that do not go together.
    """

    engine: Engine | None = None
    rank: int | None = None
    to_format: str | None = None
    base: Path | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank {self.rank} cannot be padded to; give a whole number, at least 1")
        if self.engine is None:
            return
        if self.to_format not in (None, self.engine.writes or self.to_format):
            raise ConfigError(
                f"{self.engine.name} is written {self.engine.writes}; leave out the format {self.to_format}"
            )
        if self.rank is not None and self.engine.ranks and self.rank not in self.engine.ranks:
            raise ConfigError(
                f"rank {self.rank} is none of those {self.engine.name} can be set to: "
                f"{', '.join(map(str, self.engine.ranks))}"
            )

    @property
    def pads(self) -> bool:
        return self.rank is not None or (self.engine is not None and self.engine.pads)

    @property
    def suffix(self) -> str:
        """What the default name of an output ends in where ranks stay as they are."""
        return (
            self.engine.name
            if self.engine is not None
            else f"pad{self.rank}"
            if self.rank
            else self.to_format or "kept"
        )

    def open(self, src: str | Path, kind: str | None, sketch: Sketch | None = None) -> SavedAdapter:
        """Return the adapter, read as it is and written as the engine needs it.

        Raises:
            AdapterError: as `open_adapter`.
            ConfigError: a format that cannot hold it, or something in it that the engine does not load.
        """
        source = open_adapter(src, kind, self.base, sketch)
        found = [] if self.engine is None else lasting(source, self.engine)
        if self.engine is not None and (worst := self.refusal(found)):
            raise ConfigError(f"{source.path}: {worst.where}: {self.engine.name} {worst.does}; {worst.remedy}")
        adapter = self.written(source)
        adapter.notes.extend(f"{p.where}: {self.engine.name} {p.does}" for p in found if self.engine is not None)
        return adapter

    def format_for(self, kind: str) -> str:
        """Return the format that is asked for of a source of this format."""
        return self.to_format or (self.engine.writes if self.engine is not None else "") or kind

    def refusal(self, found: Sequence[Problem]) -> Problem | None:
        """What of the lasting problems is a reason to write nothing: one of which is known what comes of it."""
        return next((problem for problem in found if problem.fate is not Fate.UNKNOWN), None)

    def written(self, source: SavedAdapter) -> SavedAdapter:
        """Return the same adapter as it would be written.

        Raises:
            ConfigError: a format that cannot hold it.
        """
        with naming(source.path):
            return self._written(source)

    def _written(self, source: SavedAdapter) -> SavedAdapter:
        to = self.format_for(source.kind)
        if self.engine is not None and to not in self.engine.reads and not self.engine.writes:
            to = "diffusers"
        if to == source.kind == "diffusers" and self.engine is not None:
            respelt = not self.engine.library_names and other_names(source)
            if respelt or METADATA in source.metadata:
                # Scales in the factors, since not everything reads the header
                return AsSingleFile(source, DiffusersAdapter, keep_names=self.engine.library_names)
        adapter = source if to == source.kind else self._converted(source, to)
        return (
            adapter.at_unit_scale()
            if self.pads and isinstance(adapter, PeftAdapter | AsPeft) and to == "peft"
            else adapter
        )

    def _converted(self, source: SavedAdapter, to: str) -> SavedAdapter:
        """Return the adapter in another format, or as it is if it cannot be converted and the engine reads it
        anyway."""
        try:
            return converted(source, to, self.base)
        except ConfigError:
            loads = () if self.engine is None or self.to_format is not None else self.engine.reads
            if source.kind not in loads or to not in loads:
                raise
            return source

    def ranks(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The rows that each module is written with, where it needs so many.

        Raises:
            ConfigError: more are needed than there may be.
        """
        if not self.pads:
            return dict(ranks)
        most = max(ranks.values())
        rows = self.rank or (self.engine.rank_for(most) if self.engine is not None else most)
        if rows < most:
            name = next(name for name, rank in ranks.items() if rank == most)
            raise ConfigError(
                f"{name} has rank {most}, above the {rows} to pad to; squeeze with --max-rank {rows} first"
            )
        fills = self.engine is not None and self.engine.fills
        return {name: rows if rank or fills else 0 for name, rank in ranks.items()}

    def notes(self, ranks: Mapping[str, int]) -> list[str]:
        """What to say about modules of these ranks once they are written."""
        if not self.pads:
            return []
        rows = max(self.ranks(ranks).values())
        hint = self.engine.hint(rows) if self.engine is not None else ""
        return [f"every module is written with rank {rows}, zeros where it has less", *([hint] if hint else [])]


def fitting_for(
    engine: str | None, *, rank: int | None = None, to_format: str | None = None, base: str | Path | None = None
) -> Fitting:
    """Return how an adapter is written for an engine of this name, at this rank, in this format.

    Raises:
        ConfigError: no such engine, or things that do not go together.
    """
    return Fitting(engine_named(engine) if engine else None, rank, to_format, None if base is None else Path(base))


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[*e, r, in]`` and B ``[*e, out, r]`` padded with zeros to `rank`."""
    more = rank - a.shape[-2]
    return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
