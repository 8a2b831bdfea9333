"""What an adapter is now: a `Slot` for each module, and the `Layout` of them all. Pure data with a JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True, slots=True)
class Slot:
    """One module's place in the adapter: DeltaW = scaling * B A, A ``[rank, in_features]``, B ``[out_features, rank]``.

    Convolutions count flattened (in_features = channels * kernel); mixture-of-expert tensors hold `experts`
    such pairs of one rank. `min_rank`, `max_rank`, `buckets`, `multiple` and `tie` are what limits allow; slots
    share a `tie` name always have one rank, those of one `shared` group have equal factors (see `Share`).
    """

    rank: int
    in_features: int
    out_features: int
    scaling: float
    min_rank: int = 0
    max_rank: int = 0  # 0: as large as the module's own rank can be
    kind: str = "linear"
    experts: int = 1
    itemsize: int = 4
    buckets: tuple[int, ...] = ()
    multiple: int = 1
    tie: str | None = None
    trainable: bool = True
    shared: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if self.max_rank == 0:
            object.__setattr__(self, "max_rank", max(self.rank, min(self.in_features, self.out_features)))

    @property
    def params_per_rank(self) -> int:
        """Parameters one unit of rank costs."""
        return self.experts * (self.in_features + self.out_features)

    @property
    def summary(self) -> str:
        """The module's rank, size and scaling in words, without limits."""
        size = f"{self.experts} x " * (self.experts > 1) + f"{self.out_features} x {self.in_features}"
        frozen = "" if self.trainable else ", frozen"
        return f"rank {self.rank}, {self.kind} {size}, scaling {self.scaling:g}{frozen}"

    def allows(self, rank: int) -> bool:
        """Whether limits let this module have `rank`. Rank 0, leaving the adapter, is never held to a bucket."""
        if not self.min_rank <= rank <= self.max_rank:
            return False
        return rank == 0 or (rank % self.multiple == 0 and (not self.buckets or rank in self.buckets))


class Layout(Mapping[str, Slot]):
    """Frozen map from module name, as PEFT's `rank_pattern` would name it, to its `Slot`.

    Modules that have left the adapter stay, with rank 0. Order is that of the model's `named_modules`.
    """

    def __init__(self, slots: Mapping[str, Slot]):
        self._slots = dict(slots)

    def __getitem__(self, name: str) -> Slot:
        return self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Layout({len(self)} modules, total rank {self.total_rank}, {self.params:,} parameters)"

    @property
    def ranks(self) -> dict[str, int]:
        return {name: slot.rank for name, slot in self.items()}

    @property
    def total_rank(self) -> int:
        return sum(slot.rank for slot in self.values())

    @property
    def params(self) -> int:
        """LoRA parameters, all modules together."""
        return sum(slot.rank * slot.params_per_rank for slot in self.values())

    @property
    def bytes(self) -> int:
        return sum(slot.rank * slot.params_per_rank * slot.itemsize for slot in self.values())

    @cached_property
    def sharing(self) -> tuple[tuple[str, ...], ...]:
        """The modules of each group that shares one pair of factors, where it has any rank."""
        groups: dict[str, list[str]] = {}
        for name, slot in self.items():
            if slot.shared is not None and slot.rank > 0:
                groups.setdefault(slot.shared, []).append(name)
        return tuple(map(tuple, groups.values()))

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON form: equal on two processes exactly when their layouts are."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=False).encode()).hexdigest()

    def with_ranks(self, ranks: Mapping[str, int]) -> Layout:
        """The same layout with other ranks for the modules named."""
        return Layout({name: replace(slot, rank=ranks.get(name, slot.rank)) for name, slot in self.items()})

    def to_json(self) -> dict[str, Any]:
        return {name: {**asdict(slot), "buckets": list(slot.buckets)} for name, slot in self.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        known = {f.name for f in fields(Slot)}
        return cls({name: Slot(**{k: v for k, v in slot.items() if k in known}) for name, slot in data.items()})
