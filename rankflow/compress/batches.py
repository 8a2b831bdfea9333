"""Modules whose factors are of one shape, to be factorised at once where that pays."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch

from rankflow.plans.plan import Layout

# Of factors in float64 that one batch may hold; a GPU is busy with far less.
_BYTES = 1 << 28


def pays_on(device: torch.device) -> bool:
    """Whether many small factorisations at once are quicker there than one by one; on a CPU, cores share them out."""
    return device.type != "cpu"


def by_shape(layout: Layout, names: Iterable[str], dtypes: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """`names` in groups of one shape and dtype, none larger than memory allows, in the order they begin."""
    groups: dict[Hashable, list[list[str]]] = {}
    for name in names:
        slot = layout[name]
        key = (slot.experts, slot.in_features, slot.out_features, slot.rank, dtypes[name])
        most = max(1, _BYTES // (8 * slot.rank * slot.params_per_rank))
        alike = groups.setdefault(key, [[]])
        if len(alike[-1]) == most:
            alike.append([])
        alike[-1].append(name)
    return [tuple(group) for alike in groups.values() for group in alike]
