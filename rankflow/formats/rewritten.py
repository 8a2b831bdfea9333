"""An adapter that is read as it is, and written in another format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.formats.base import SavedAdapter, Source, at_unit_scale, fold
from rankflow.formats.peft_fields import acting, unknown
from rankflow.plans.layout import Layout


class Rewritten(SavedAdapter):
    """A source that is read as it is and written in another format, which a subclass says."""

    def __init__(self, source: Source):
        self._source, self.path, self.sketch = source, source.path, source.sketch
        self.layout, self.entries = source.layout, source.entries
        self._gains: dict[str, float] = {}  # what is multiplied into B as it is read
        self.notes = [*source.notes, f"read as {source.kind}, written as {self.kind}", *lost_fields(source)]

    @property
    def source(self) -> Source:
        return self._source.source

    @property
    def peft_configs(self) -> Sequence[Mapping[str, Any]]:
        return self._source.peft_configs

    @property
    def about(self) -> Mapping[str, Any]:
        return self._source.about

    @property
    def file_bytes(self) -> int:
        return self._source.file_bytes

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._source.factors(name)
        return a, fold(b, self._gains.get(name, 1.0))

    def outside(self, name: str) -> float:
        return self._source.outside(name)

    def beside(self, suffix: str) -> Path:
        return self._source.beside(suffix)

    def fold_scales(self) -> None:
        """Read every module with its scaling in its B."""
        self._gains = {name: slot.scaling for name, slot in self.layout.items()}
        self.entries = at_unit_scale(self.entries)
        self.layout = Layout({name: entry.slot for name, entry in self.entries.items()})


def lost_fields(source: Source) -> list[str]:
    """A note on fields of its config that nobody knows, if there are any."""
    fields = sorted({field for config in source.peft_configs for field in unknown(config)})
    return [f"set in the source and not known here, so it is lost: {', '.join(fields)}"] if fields else []


def check_sayable(config: Mapping[str, Any], path: Path, kind: str, *, but: Collection[str] = ()) -> None:
    """Refuse an adapter of which a format cannot say what it does.

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
