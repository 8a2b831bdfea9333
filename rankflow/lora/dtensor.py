"""Factors that FSDP2 has spread over processes as DTensors: each process has a block of rows of each factor.

What is stepped entry by entry is stepped where it lies. What looks at whole factors, or writes to them, has them whole
for that long (`rankflow.distributed.fsdp2`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REMEDY = "leave the adapter out of sharding, fully_shard(..., ignored_params=adapter_parameters)"


def rows(t: Any) -> range:
    """Return which rows of `t` this process has: a block like those of `torch.chunk` if `t` is in shards."""
    if not hasattr(t, "device_mesh"):
        return range(len(t))
    block = -(-len(t) // t.device_mesh.size())
    begin = min(block * t.device_mesh.get_local_rank(), len(t))
    return range(begin, min(begin + block, len(t)))


def part(t: Any) -> Tensor:
    """Return the rows of `t` that this process has; they share memory with `t`."""
    return t.detach().to_local() if hasattr(t, "device_mesh") else t


@torch.no_grad()
def whole(t: Any) -> Any:
    """Return all of a tensor that is in shards, in new memory, and other things as they are. All processes have to call
    it."""
    if not hasattr(t, "device_mesh"):
        return t
    full = t.full_tensor()
    return full.clone() if t.device_mesh.size() == 1 else full.contiguous()


@torch.no_grad()
def spread(value: Tensor, like: Any) -> Tensor:
    """Return `value`, which all processes have whole, in shards as `like` is. No process waits for another."""
    from torch.distributed.tensor import DTensor  # takes a while to import, and is there if anything is in shards

    mine = rows(like)
    local = value[mine.start : mine.stop].clone()
    shape, stride = value.shape, value.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
