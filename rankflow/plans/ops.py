"""What can be done to a module's directions, one class an op. Pure data with a JSON form, matrices apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rankflow.errors import PlanError

Init = Literal["zero_b", "grad"]
Json = Mapping[str, Any]
Matrix = Callable[[Sequence[int], str], Tensor]  # of this shape, whose SHA-256 this is


class Op:
    """What all ops have: the rank they lead to, and a JSON form, to which their matrices are added apart."""

    __slots__ = ()

    def rank_after(self, rank: int) -> int:
        """The module's rank after this, if it is `rank` before.

        Raises:
            PlanError: it does not fit a module of `rank`.
        """
        raise NotImplementedError

    def to_json(self) -> Json:
        return {}

    def tensors(self) -> list[Tensor]:
        """Matrices of which the JSON form has but the SHA-256, in the order in which `from_json` asks for them."""
        return []

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Op:
        return cls()


@dataclass(frozen=True, slots=True)
class Keep(Op):
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

    def to_json(self) -> Json:
        return {"idx": list(self.idx)}

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Keep:
        return cls(tuple(data["idx"]))


@dataclass(frozen=True, slots=True, eq=False)
class Refactor(Op):
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
        if not self.N.is_meta and not bool(torch.isfinite(self.N).all() and torch.isfinite(self.M).all()):
            raise PlanError("plan refactors with non-finite matrices")
        return int(self.N.shape[-2])

    @property
    def diagonal(self) -> bool:
        """Whether every direction stays what it is, but for its size."""
        return all(
            m.shape[-2] == m.shape[-1] and torch.equal(m, torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)))
            for m in (self.N, self.M)
        )

    def to_json(self) -> Json:
        shape, digests = list(self.N.shape), {"N": matrix_digest(self.N), "M": matrix_digest(self.M)}
        return {"shape": shape, "metric": self.metric, **digests}

    def tensors(self) -> list[Tensor]:
        return [self.N, self.M]

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Refactor:
        *lead, k, r = data["shape"]
        return cls(matrix((*lead, k, r), data["N"]), matrix((*lead, r, k), data["M"]), data["metric"])


@dataclass(frozen=True, slots=True, eq=False)
class Grow(Op):
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

    def to_json(self) -> Json:
        found = {"n": self.n, "init": self.init}
        if self.sketch is None:
            return found
        return {**found, "sketch_shape": list(self.sketch.shape), "sketch": matrix_digest(self.sketch)}

    def tensors(self) -> list[Tensor]:
        return [] if self.sketch is None else [self.sketch]

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Grow:
        sketch = matrix(data["sketch_shape"], data["sketch"]) if "sketch" in data else None
        return cls(data["n"], data["init"], sketch)


@dataclass(frozen=True, slots=True)
class Open(Op):
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
        """Return the directions other than `idx`, and the order that brings them, followed by `idx`, back to where they
        were."""
        rest = [i for i in range(rank) if i not in self.idx]
        places = {direction: place for place, direction in enumerate([*rest, *self.idx])}
        return rest, [places[i] for i in range(rank)]

    def to_json(self) -> Json:
        return {"idx": list(self.idx), "to": self.to}

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Open:
        return cls(tuple(data["idx"]), data["to"])


@dataclass(frozen=True, slots=True)
class Drop(Op):
    """The module leaves the adapter: rank 0, nothing computes, nothing trains. `Grow` brings it back."""

    def rank_after(self, rank: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Train(Op):
    """Switch training of the module's factors on or off. In a run, off ends with the phase at the latest."""

    on: bool

    def rank_after(self, rank: int) -> int:
        return rank

    def to_json(self) -> Json:
        return {"on": self.on}

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Train:
        return cls(data["on"])


@dataclass(frozen=True, slots=True)
class Share(Op):
    """Train one pair of factors together with every other module of `group`. All start alike and train on the sum of
    their gradients, and each module holds a copy.

    Goes with `Drop` and `Grow` to one rank in modules of one shape and scaling; their optimizer state starts afresh. A
    module leaves its group when it is resized again, or by `Share(None)`.
    """

    group: str | None

    def rank_after(self, rank: int) -> int:
        return rank

    def to_json(self) -> Json:
        return {"group": self.group}

    @classmethod
    def from_json(cls, data: Json, matrix: Matrix) -> Share:
        return cls(data["group"])


NAMED: dict[str, type[Op]] = {
    "keep": Keep,
    "refactor": Refactor,
    "grow": Grow,
    "open": Open,
    "drop": Drop,
    "train": Train,
    "share": Share,
}


def op_to_json(op: Op) -> Json:
    """The op's JSON form, which says what it is by the key `op`; of matrices the SHA-256."""
    name = next(name for name, cls in NAMED.items() if type(op) is cls)
    return {"op": name, **op.to_json()}


def op_from_json(data: Json, matrix: Matrix) -> Op:
    """
    Raises:
        PlanError: no op is called so.
    """
    if data["op"] not in NAMED:
        raise PlanError(f"unknown op {data['op']!r} in a plan")
    return NAMED[data["op"]].from_json(data, matrix)


def matrix_digest(t: Tensor) -> str:
    """SHA-256 of the matrix in float64."""
    t = t.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()
