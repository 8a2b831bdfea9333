"""Scores, limits and a budget in; ranks out. Ties go by (module, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rankflow.plan import Layout, Slot

BudgetKind = Literal["mean_rank", "total_rank", "max_params", "size", "fraction"]


@dataclass(frozen=True)
class Budget:
    """How much adapter there may be. `resolve` turns shares into whole units of rank or of parameters.

    mean_rank: total rank / modules matched at attach (those at rank 0 count), rounded down to a whole total.
    total_rank: sum of ranks. max_params: LoRA parameters. size: bytes of LoRA factors.
    fraction: share (0, 1] of the LoRA parameters at attach.
    """

    kind: BudgetKind
    amount: float

    def resolve(self, layout: Layout) -> Budget:
        """The same budget as `total_rank`, `max_params` or `size` with a whole amount."""
        raise NotImplementedError

    def cost(self, slot: Slot) -> int:
        """What one unit of rank of `slot` costs in this (resolved) budget's unit."""
        raise NotImplementedError

    def spent(self, layout: Layout) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Limit:
    pattern: str
    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class Limits:
    entries: tuple[Limit, ...] = ()
    ties: Mapping[str, Sequence[str]] | tuple = ()
    buckets: tuple[int, ...] = ()
    multiple: int = 1

    def apply(self, layout: Layout) -> Layout:
        raise NotImplementedError
