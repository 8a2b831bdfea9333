"""What is to change in an adapter: a `RankPlan` of ops for each module. Pure data with a JSON form.

A plan is never just a number per module: it says what happens to each direction, so that the same plan applied
to a live model, to its optimizer and to a file gives the same adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rankflow.errors import PlanError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow, Op, Share, Train, matrix_digest, op_from_json, op_to_json

Carry = Literal["carry", "reset"]


@dataclass(frozen=True)
class RankPlan:
    """Module name -> ordered ops, applied as one stage, and why.

    `state` says what becomes of the optimizer state of the modules touched: `carry` transports it through the ops,
    `reset` starts it afresh and lets the update ramp up over `rewarm` optimizer steps. `margin` says how close the
    decision was (see `rankflow.plans.allocate`).
    """

    ops: Mapping[str, Sequence[Op]] = field(default_factory=dict)
    reason: str = ""
    state: Carry = "carry"
    rewarm: int = 0
    margin: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", {name: tuple(ops) for name, ops in self.ops.items() if len(ops)})

    def __bool__(self) -> bool:
        return bool(self.ops)

    def apply_to(self, layout: Layout) -> Layout:
        """The layout after this plan. Pure: this is also the check of a plan against a layout.

        Raises:
            PlanError: the plan names a module, a component or a rank that the layout or its limits do not have.
        """
        slots = dict(layout)
        for name, ops in self.ops.items():
            if name not in slots:
                raise PlanError(f"{name}: plan names a module that the adapter does not have")
            slot = slots[name]
            rank, trainable, shared = slot.rank, slot.trainable, slot.shared
            for op in ops:
                if rank == 0 and not isinstance(op, Grow | Train | Share):
                    raise PlanError(
                        f"{name}: plan has {type(op).__name__} but the module is at rank 0; only Grow brings it back"
                    )
                try:
                    rank = op.rank_after(rank)
                except PlanError as e:
                    raise PlanError(f"{name}: {e}") from None
                if isinstance(op, Train):
                    trainable = op.on
                else:
                    shared = op.group if isinstance(op, Share) else None
            if rank != slot.rank and not slot.allows(rank):
                raise PlanError(
                    f"{name}: plan gives rank {rank} but limits allow {slot.min_rank} to {slot.max_rank}"
                    + (f" in {list(slot.buckets)}" if slot.buckets else "")
                    + (f" in multiples of {slot.multiple}" if slot.multiple > 1 else "")
                )
            slots[name] = replace(slot, rank=rank, trainable=trainable, shared=shared)
        _check_shared(slots)
        ties: dict[str, tuple[str, int]] = {}
        for name, slot in slots.items():
            if slot.tie is not None:
                first, rank = ties.setdefault(slot.tie, (name, slot.rank))
                if rank != slot.rank:
                    raise PlanError(
                        f"{first} and {name} are tied ({slot.tie}) but the plan gives them ranks {rank} and {slot.rank}"
                    )
        if slots and not any(slot.rank for slot in slots.values()):
            raise PlanError("plan leaves no module in the adapter; PEFT cannot load an adapter without one")
        return Layout(slots)

    def to_json(self) -> dict[str, Any]:
        """Ranks, metrics and SHA-256 of the matrices; the matrices themselves are what `pack` gives."""
        return {
            "reason": self.reason,
            "state": self.state,
            "rewarm": self.rewarm,
            "margin": self.margin,
            "ops": {name: [op_to_json(op) for op in ops] for name, ops in self.ops.items()},
        }

    def pack(self) -> Tensor:
        """All matrices as one flat float64 tensor, in the order of `to_json`."""
        parts = [m for ops in self.ops.values() for op in ops for m in op.tensors()]
        flat = [p.detach().to("cpu", torch.float64).reshape(-1) for p in parts]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], flat: Tensor | None = None) -> RankPlan:
        """Rebuild a plan from its JSON and its packed matrices. Without them its matrices have shapes only, which is
        all that `apply_to` needs.

        Raises:
            PlanError: a matrix does not have the SHA-256 that the JSON states.
        """
        at = 0

        def take(shape: Sequence[int], digest: str) -> Tensor:
            nonlocal at
            if flat is None:
                return torch.empty(tuple(shape), device="meta")
            size = math.prod(shape)
            part = flat[at : at + size].reshape(tuple(shape)).clone()
            at += size
            if matrix_digest(part) != digest:
                raise PlanError("a plan's matrix does not match its SHA-256; the plan was damaged on the way")
            return part

        ops = {name: tuple(op_from_json(d, take) for d in items) for name, items in data["ops"].items()}
        return cls(ops, data["reason"], data["state"], data["rewarm"], data.get("margin"))


def _check_shared(slots: Mapping[str, Slot]) -> None:
    """Raise PlanError if modules that share their factors could not have equal ones."""
    firsts: dict[str, str] = {}
    for name, slot in slots.items():
        if slot.shared is None:
            continue
        first = firsts.setdefault(slot.shared, name)
        alike = [
            (s.rank, s.in_features, s.out_features, s.scaling, s.kind, s.experts, s.trainable)
            for s in (slots[first], slot)
        ]
        if alike[0] != alike[1]:
            raise PlanError(f"{first} and {name} share their factors but differ in shape, rank, scaling or training")
