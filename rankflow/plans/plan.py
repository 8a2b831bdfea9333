"""What exists now (`Slot`, `Layout`) and what is to change (ops, `RankPlan`). Pure data with a JSON form.

A plan is never just a number per module: it says what happens to each direction, so that the same plan applied
to a live model, to its optimizer and to a file gives the same adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from rankflow.errors import PlanError

Init = Literal["zero_b", "grad"]
Carry = Literal["carry", "reset"]


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
        """What the module is now, without limits."""
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


# -- ops ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the directions `idx`, in that order, bit for bit."""

    idx: tuple[int, ...]

    def rank_after(self, rank: int) -> int:
        if len(set(self.idx)) != len(self.idx):
            raise PlanError(f"plan keeps a component twice: {list(self.idx)}")
        if not self.idx:
            raise PlanError("plan keeps no component; use Drop to take a module out of the adapter")
        worst = max(self.idx) if min(self.idx) >= 0 else min(self.idx)
        if not 0 <= worst < rank:
            raise PlanError(
                f"plan keeps component {worst} but rank is {rank}. Plans must be made from the current Layout."
            )
        return len(self.idx)


@dataclass(frozen=True, slots=True, eq=False)
class Refactor:
    """A' = N A, B' = B M with N ``[k, r]`` and M ``[r, k]``, float64 (``[experts, ...]`` for expert tensors)."""

    N: Tensor
    M: Tensor
    metric: str = "weights"

    def rank_after(self, rank: int) -> int:
        if self.N.shape[-1] != rank or self.M.shape[-2] != rank or self.N.shape[-2] != self.M.shape[-1]:
            raise PlanError(
                f"plan refactors with N {list(self.N.shape)} and M {list(self.M.shape)} but rank is {rank}. "
                "Plans must be made from the current Layout."
            )
        if not bool(torch.isfinite(self.N).all() and torch.isfinite(self.M).all()):
            raise PlanError("plan refactors with non-finite matrices")
        return int(self.N.shape[-2])

    @property
    def diagonal(self) -> bool:
        """Whether every direction stays what it is, but for its size."""
        return all(
            m.shape[-2] == m.shape[-1] and torch.equal(m, torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)))
            for m in (self.N, self.M)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Grow:
    """Append `n` directions: new rows of A, exact-zero columns of B, so the function does not change.

    `init="zero_b"` draws A as PEFT would; `init="grad"` takes A from the leading right singular directions of
    `sketch` ``[q, in_features]`` (rows that span where the gradient of DeltaW points) outside A's row space.
    """

    n: int
    init: Init = "zero_b"
    sketch: Tensor | None = None

    def rank_after(self, rank: int) -> int:
        if self.n < 1:
            raise PlanError(f"plan grows by {self.n}; growth is by at least 1")
        if self.init == "grad" and self.sketch is None:
            raise PlanError("plan grows with init 'grad' but brings no gradient sketch")
        return rank + self.n


@dataclass(frozen=True, slots=True)
class Open:
    """The gates of the directions `idx` become `to`, and B' = B v / `to` keeps the function; A stays bit for bit.

    For modules under a gate with a parameter `value` of its own for each direction. To the optimizer these directions
    are new: their state and their updates start as those of growth do, under a gate of `to`.
    """

    idx: tuple[int, ...]
    to: float = 1.0

    def rank_after(self, rank: int) -> int:
        if not (math.isfinite(self.to) and self.to != 0):
            raise PlanError(f"plan opens gates to {self.to}; it takes a finite value other than 0 to keep the function")
        Keep(self.idx).rank_after(rank)  # the same demands on `idx`
        return rank

    def apart(self, rank: int) -> tuple[list[int], list[int]]:
        """The directions that it leaves alone, and the order that takes them followed by `idx` back to what it was."""
        rest = [i for i in range(rank) if i not in self.idx]
        places = {direction: place for place, direction in enumerate([*rest, *self.idx])}
        return rest, [places[i] for i in range(rank)]


@dataclass(frozen=True, slots=True)
class Drop:
    """The module leaves the adapter: rank 0, nothing computes, nothing trains. `Grow` brings it back."""

    def rank_after(self, rank: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Train:
    """Switch training of the module's factors on or off. In a run, off ends with the phase at the latest."""

    on: bool

    def rank_after(self, rank: int) -> int:
        return rank


@dataclass(frozen=True, slots=True)
class Share:
    """With every other module of `group`, one pair of factors from here on: they start alike and are trained as one,
    on the sum of their gradients, each module holding a copy.

    Goes with `Drop` and `Grow` to one rank in modules of one shape and scaling; their optimizer state starts afresh. A
    module leaves its group when it is resized again, or by `Share(None)`.
    """

    group: str | None

    def rank_after(self, rank: int) -> int:
        return rank


Op = Keep | Refactor | Grow | Open | Drop | Train | Share


def _matrix_digest(t: Tensor) -> str:
    t = t.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()


def _op_to_json(op: Op) -> dict[str, Any]:
    if isinstance(op, Keep):
        return {"op": "keep", "idx": list(op.idx)}
    if isinstance(op, Refactor):
        return {
            "op": "refactor",
            "shape": list(op.N.shape),
            "metric": op.metric,
            "N": _matrix_digest(op.N),
            "M": _matrix_digest(op.M),
        }
    if isinstance(op, Grow):
        out: dict[str, Any] = {"op": "grow", "n": op.n, "init": op.init}
        if op.sketch is not None:
            out |= {"sketch_shape": list(op.sketch.shape), "sketch": _matrix_digest(op.sketch)}
        return out
    if isinstance(op, Open):
        return {"op": "open", "idx": list(op.idx), "to": op.to}
    if isinstance(op, Drop):
        return {"op": "drop"}
    if isinstance(op, Share):
        return {"op": "share", "group": op.group}
    return {"op": "train", "on": op.on}


def _op_matrices(op: Op) -> list[Tensor]:
    if isinstance(op, Refactor):
        return [op.N, op.M]
    if isinstance(op, Grow) and op.sketch is not None:
        return [op.sketch]
    return []


def _op_rank_after(data: Mapping[str, Any], rank: int) -> int:
    """What an op's JSON alone says of the rank, so that a ledger replays without any matrix."""
    match data["op"]:
        case "keep":
            return len(data["idx"])
        case "refactor":
            return int(data["shape"][-2])
        case "grow":
            return rank + int(data["n"])
        case "drop":
            return 0
    return rank


@dataclass(frozen=True)
class RankPlan:
    """Module name -> ordered ops, applied as one stage, and why.

    `state` says what becomes of the optimizer state of the modules touched: `carry` transports it through the ops,
    `reset` starts it afresh and lets the update ramp up over `rewarm` optimizer steps. `margin` says how close the
    decision was (see `rankflow.plans.margins`).
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
            "ops": {name: [_op_to_json(op) for op in ops] for name, ops in self.ops.items()},
        }

    def pack(self) -> Tensor:
        """All matrices as one flat float64 tensor, in the order of `to_json`."""
        parts = [m for ops in self.ops.values() for op in ops for m in _op_matrices(op)]
        flat = [p.detach().to("cpu", torch.float64).reshape(-1) for p in parts]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], flat: Tensor) -> RankPlan:
        """Rebuild a plan from its JSON and its packed matrices.

        Raises:
            PlanError: a matrix does not have the SHA-256 that the JSON states.
        """
        at = 0

        def take(shape: Sequence[int], digest: str) -> Tensor:
            nonlocal at
            size = 1
            for n in shape:
                size *= n
            part = flat[at : at + size].reshape(tuple(shape)).clone()
            at += size
            if _matrix_digest(part) != digest:
                raise PlanError("a plan's matrix does not match its SHA-256; the plan was damaged on the way")
            return part

        def op(d: Mapping[str, Any]) -> Op:
            match d["op"]:
                case "keep":
                    return Keep(tuple(d["idx"]))
                case "refactor":
                    *lead, k, r = d["shape"]
                    return Refactor(take((*lead, k, r), d["N"]), take((*lead, r, k), d["M"]), d["metric"])
                case "grow":
                    sketch = take(d["sketch_shape"], d["sketch"]) if "sketch" in d else None
                    return Grow(d["n"], d["init"], sketch)
                case "open":
                    return Open(tuple(d["idx"]), d["to"])
                case "drop":
                    return Drop()
                case "train":
                    return Train(d["on"])
                case "share":
                    return Share(d["group"])
            raise PlanError(f"unknown op {d['op']!r} in a plan")

        ops = {name: tuple(op(d) for d in items) for name, items in data["ops"].items()}
        return cls(ops, data["reason"], data["state"], data["rewarm"], data.get("margin"))


def replay(layout: Layout, plan: Mapping[str, Any]) -> Layout:
    """The layout after a plan of which only the JSON is at hand."""
    slots = dict(layout)
    for name, ops in plan["ops"].items():
        slot = slots[name]
        rank, trainable, shared = slot.rank, slot.trainable, slot.shared
        for op in ops:
            rank = _op_rank_after(op, rank)
            if op["op"] == "train":
                trainable = op["on"]
            else:
                shared = op.get("group")
        slots[name] = replace(slot, rank=rank, trainable=trainable, shared=shared)
    return Layout(slots)


def _check_shared(slots: Mapping[str, Slot]) -> None:
    """Raise PlanError where modules that share their factors could not have the same."""
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
