"""Factors that FSDP2 has spread over processes: each has a block of rows of each, as a DTensor.

What is stepped entry by entry is stepped where it lies. What looks at whole factors, or writes to them, has them whole
for that long (`rankflow.distributed.fsdp2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.policies.base import Lifecycle, Phase
from rankflow.policies.gate import Gate

REMEDY = "leave the adapter out of sharding, fully_shard(..., ignored_params=adapter_parameters)"


def rows(t: Any) -> range:
    """Which rows of `t` this process has: a block like those of `torch.chunk`, if `t` is in shards."""
    if not hasattr(t, "device_mesh"):
        return range(len(t))
    block = -(-len(t) // t.device_mesh.size())
    begin = min(block * t.device_mesh.get_local_rank(), len(t))
    return range(begin, min(begin + block, len(t)))


def part(t: Any) -> Tensor:
    """Those rows, sharing memory with `t`."""
    return t.detach().to_local() if hasattr(t, "device_mesh") else t


@torch.no_grad()
def whole(t: Any) -> Any:
    """All of a tensor that is in shards, in memory of its own; other things as they are. All processes have to call."""
    if not hasattr(t, "device_mesh"):
        return t
    full = t.full_tensor()
    return full.clone() if t.device_mesh.size() == 1 else full.contiguous()


@torch.no_grad()
def spread(value: Tensor, like: Any) -> Tensor:
    """`value`, which all processes have whole, in shards as `like` is. No process waits for another."""
    from torch.distributed.tensor import DTensor  # takes a while to import, and is there if anything is in shards

    mine = rows(like)
    local = value[mine.start : mine.stop].clone()
    shape, stride = value.shape, value.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def check_shards(
    adapter: Adapter, lifecycle: Lifecycle, phases: Sequence[Phase], *, in_loss: bool, resumes: bool
) -> None:
    """
    Raises:
        ConfigError: `adapter` is in shards, and this run would need more of it than there is.
    """
    if not adapter.sharded:
        return
    if lifecycle.mode != "mask":
        raise ConfigError(
            f"the adapter's factors are in shards (FSDP2), which mode: {lifecycle.mode} cannot give other shapes at "
            f"every decision; {REMEDY}, or set mode: mask in the policy file"
        )
    if in_loss:
        raise ConfigError('penalty="in_loss" reads factors that are in shards; use penalty="gradient"')
    for phase in phases:
        gate = phase.policy.gate
        reasons = {
            "passes over data of its own": bool(phase.policy.studies),
            "gates that learn from held-out batches": gate is not None and gate.trained_on == "outer",
            "gates that want factors stored in another form": gate is not None and type(gate).stored is not Gate.stored,
            "gates that a checkpoint would have to bring back": gate is not None and resumes,
        }
        for reason in (reason for reason, met in reasons.items() if met):
            raise ConfigError(f"{phase.name} has {reason}, which needs factors that are not in shards; {REMEDY}")
