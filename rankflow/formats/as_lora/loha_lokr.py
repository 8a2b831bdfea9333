"""PEFT's LoHa and LoKr read as plain LoRA, exactly: their structure gives factors, no matrix [out, in] is decomposed.

LoHa   s (W1a W1b) * (W2a W2b), entry by entry. The entry-by-entry product of sums of rank-1 terms is the sum of all the
       products of a term of one and a term of the other, so its factors are those of pairs (Khatri-Rao products) and
       its rank is at most r^2. Where that is not below the shape's, DeltaW itself is one factor and 1 the other.
LoKr   s W1 (x) W2, and (B1 A1) (x) (B2 A2) = (B1 (x) B2) (A1 (x) A2): its rank is the product of both ranks.

What is cut later is cut from these, so singular values, errors and residuals are exact. A convolution's update is the
matrix ``[out, in * kernel]``. Its kernel is in the file only with Tucker factors (hada_t1, lokr_t2) or a whole lokr_w2;
else it looks like a linear layer, as which PEFT refuses to load it. Tucker factors of a kernel ``[k, 1]`` are taken for
those of a one-dimensional convolution, which PEFT writes alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankflow.formats.as_lora.parts import PREFIX, Factors, Folded, Form, Make, Parts, folded, number, positive
from rankflow.formats.peft_config import pattern_value, patterns_of

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def fold_loha(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a LoHa adapter equals.

    Raises:
        AdapterError: tensors and config that make no LoHa adapter.
    """
    parts = Parts(tensors, LOHA, "LoHa", path)
    modules = {m: loha(parts, m, _scaling(config, m, path)) for m in parts}
    return folded(
        config, modules, parts.rest, ["LoHa, read as the plain LoRA that it equals, of its squared rank"], path
    )


def fold_lokr(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a LoKr adapter equals.

    Raises:
        AdapterError: tensors and config that make no LoKr adapter.
    """
    parts = Parts(tensors, LOKR, "LoKr", path)
    modules = {m: lokr(parts, m, _scaling(config, m, path)) for m in parts}
    return folded(
        config, modules, parts.rest, ["LoKr, read as the plain LoRA that it equals, of the product of its ranks"], path
    )


def _scaling(config: Mapping[str, Any], module: str, path: Path) -> float:
    name = module.removeprefix(PREFIX)
    r, alpha = (
        pattern_value(patterns_of(config, f"{field}_pattern", path), name, number(config, own, path))
        for field, own in (("rank", "r"), ("alpha", "alpha"))
    )
    return positive(alpha, "alpha_pattern", path) / positive(r, "rank_pattern", path)


def loha(parts: Parts, module: str, scaling: float) -> Factors:
    """Return the factors of one LoHa module.

    Raises:
        AdapterError: the module's tensors do not fit each other.
    """
    tucker = "hada_t1" in parts[module]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a1, b1, a2, b2 = parts.of(module, *names)
    shape: tuple[int, ...]
    if tucker:
        t1, t2 = parts.of(module, "hada_t1", "hada_t2")
        parts.require(
            module,
            all(t.ndim == 2 for t in (a1, b1, a2, b2)) and a1.shape[1] == a2.shape[1] and b1.shape[1] == b2.shape[1]
            and t1.ndim == t2.ndim == 4 and t1.shape[2:] == t2.shape[2:]
            and (len(a1), len(b1)) == t1.shape[:2] and (len(a2), len(b2)) == t2.shape[:2],
        )  # fmt: skip
        out, inside, shape = a1.shape[1], b1.shape[1] * math.prod(t1.shape[2:]), (b1.shape[1], *kernel_of(t1))
        ranks = len(a1), len(a2)
        lefts = (lambda: wide(a1).mT), (lambda: wide(a2).mT)
        rights = (lambda: tucker_rows(t1, b1)), (lambda: tucker_rows(t2, b2))
    else:
        parts.require(
            module,
            all(t.ndim == 2 for t in (a1, b1, a2, b2)) and a1.shape[0] == a2.shape[0] and b1.shape[1] == b2.shape[1]
            and a1.shape[1] == b1.shape[0] and a2.shape[1] == b2.shape[0],
        )  # fmt: skip
        out, inside, shape, ranks = a1.shape[0], b1.shape[1], (b1.shape[1],), (len(b1), len(b2))
        lefts = (lambda: wide(a1)), (lambda: wide(a2))
        rights = (lambda: wide(b1)), (lambda: wide(b2))

    def a_rows() -> Tensor:
        first, second = rights[0](), rights[1]()
        return torch.einsum("in,jn->ijn", first, second).flatten(0, 1)

    def b_columns() -> Tensor:
        first, second = lefts[0](), lefts[1]()
        return torch.einsum("mi,mj->mij", first, second).flatten(1)

    rank = ranks[0] * ranks[1]
    if rank < min(out, inside):
        return shaped(rank, a_rows, b_columns, shape, out, scaling)
    whole = lambda: (lefts[0]() @ rights[0]()) * (lefts[1]() @ rights[1]())  # noqa: E731
    found = dense(whole, out, inside, shape, scaling)
    return found._replace(size=max([found.size, *(r * inside for r in ranks if tucker)]))


def lokr(parts: Parts, module: str, scaling: float) -> Factors:
    """Return the factors of one LoKr module.

    Raises:
        AdapterError: the module's tensors do not fit each other.
    """
    found = parts[module]
    left, right = _outer(parts, module, "lokr_w1"), _outer(parts, module, "lokr_w2")
    kernel: tuple[int, ...] = ()
    if "lokr_w2" in found and found["lokr_w2"].ndim == 3:
        return _lokr_1d(left, found["lokr_w2"], scaling)
    if "lokr_w2" in found:
        kernel = tuple(found["lokr_w2"].shape[2:])
    elif "lokr_t2" in found:
        kernel = kernel_of(found["lokr_t2"])
    rank, out, inside = left.rank * right.rank, left.out * right.out, left.inside * right.inside
    shape = (inside // math.prod(kernel), *kernel)
    return shaped(rank, lambda: kron(left.a(), right.a()), lambda: kron(left.b(), right.b()), shape, out, scaling)


def _lokr_1d(left: _Outer, w2: Tensor, scaling: float) -> Factors:
    """A one-dimensional convolution with a whole W2 ``[k, n, kernel]``: PEFT hands torch.kron the two as they are. It
    lines up their last dimensions, so that what comes out is no Kronecker product of ``[out, in * kernel]``."""
    k, n, kernel = w2.shape
    out, inside = left.out * k, left.inside * n
    whole = lambda: kron(left.b() @ left.a(), wide(w2)).reshape(out, -1)  # noqa: E731
    return dense(whole, out, inside * kernel, (inside, kernel), scaling)


class _Outer(NamedTuple):
    """One of the two that a Kronecker product is of: B ``[out, rank]`` and A ``[rank, in * kernel]``, when asked."""

    b: Make
    a: Make
    out: int
    rank: int
    inside: int


def _outer(parts: Parts, module: str, part: str) -> _Outer:
    found = parts[module]
    if part in found:
        t = found[part]
        parts.require(module, t.ndim >= 2 and 0 not in t.shape)
        flat = lambda: wide(t).flatten(1)  # noqa: E731
        rows, columns = t.shape[0], math.prod(t.shape[1:])
        if rows <= columns:
            return _Outer(lambda: torch.eye(rows, dtype=flat().dtype), flat, rows, rows, columns)
        return _Outer(flat, lambda: torch.eye(columns, dtype=flat().dtype), rows, columns, columns)
    a, b = parts.of(module, f"{part}_a", f"{part}_b")
    if part == "lokr_w2" and "lokr_t2" in found:
        t = found["lokr_t2"]
        parts.require(module, t.ndim == 4 and a.ndim == b.ndim == 2 and (len(a), len(b)) == t.shape[:2])
        return _Outer(lambda: wide(a).mT, lambda: tucker_rows(t, b), a.shape[1], len(a), b.shape[1] * t[0, 0].numel())
    parts.require(module, a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0])
    return _Outer(lambda: wide(a), lambda: wide(b), a.shape[0], a.shape[1], b.shape[1])


# -- shared with what single files hold -------------------------------------------------------------------------------


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def kron(first: Tensor, second: Tensor) -> Tensor:
    return torch.kron(first.contiguous(), second.contiguous())  # which refuses some transposed matrices


def tucker_rows(t: Tensor, b: Tensor) -> Tensor:
    """``[i, in * kernel]`` of a core ``[i, j, *kernel]`` and ``[j, in]``."""
    return torch.einsum("ij...,jn->in...", wide(t), wide(b)).flatten(1)


def kernel_of(t: Tensor) -> tuple[int, ...]:
    k = tuple(t.shape[2:])
    return k[:1] if k[1] == 1 else k


def shaped(rank: int, a, b, shape: tuple[int, ...], out: int, scaling: float) -> Factors:
    """Factors whose A is that of a convolution where `shape` ``(in, *kernel)`` has a kernel."""
    ones = (1,) * (len(shape) - 1)
    return Factors(
        rank,
        lambda: a().reshape(rank, *shape).contiguous(),
        lambda: b().reshape(out, rank, *ones).contiguous(),
        rank * max(out, math.prod(shape)),
        scaling,
    )


def dense(whole, out: int, inside: int, shape: tuple[int, ...], scaling: float) -> Factors:
    """A matrix as the product of itself and 1, on the side that has less."""
    rank = min(out, inside)
    one = lambda: torch.eye(rank, dtype=whole().dtype)  # noqa: E731
    a, b = (whole, one) if out <= inside else (one, whole)
    return shaped(rank, a, b, shape, out, scaling)


FORMS = (Form("LOHA", fold_loha), Form("LOKR", fold_lokr))
