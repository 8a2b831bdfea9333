"""Optimizer moments through A' = N A, B' = B M, as averages of gradients and of their squares transform."""

from __future__ import annotations

import torch
from torch import Tensor

from rankflow.linalg.decompose import Factor, f64, like


def carry_first(m: Tensor, N: Tensor, M: Tensor, factor: Factor) -> Tensor:
    """First moments through A' = N A, B' = B M: M^T m of A, m N^T of B, as gradients transform.

    Exact, for any linear average of gradients, where DeltaW does not change; `m` has its factor's canonical shape.
    """
    bound = torch.finfo(m.dtype).max
    return like(_carry(m, N, M, factor).clamp(-bound, bound), m)


def carry_point(z: Tensor, N: Tensor, M: Tensor, factor: Factor) -> Tensor:
    """Another point in the space of factors through A' = N A, B' = B M, as the factor itself: N z of A, z M of B."""
    bound = torch.finfo(z.dtype).max
    return like(_carry(z, f64(M).mT, f64(N).mT, factor).clamp(-bound, bound), z)


def carry_squares(s: Tensor, N: Tensor, M: Tensor, factor: Factor) -> Tensor:
    """Squares of a factor's steps through A' = N A, B' = B M, by the squared map of points: (N*N) s of A, s (M*M) of B.

    Exact where directions are only scaled or reordered; mixed, steps of different directions count as independent.
    """
    return carry_second(s, None, f64(M).mT, f64(N).mT, factor)


def carry_second(
    v: Tensor,
    m: Tensor | None,
    N: Tensor,
    M: Tensor,
    factor: Factor,
    *,
    bias_first: float = 1.0,
    bias_second: float = 1.0,
) -> Tensor:
    """Second moments through A' = N A, B' = B M: max((M*M)^T v, m'^2) of A, max(v (N*N)^T, m'^2) of B, entrywise.

    `m` is the first moment after `carry_first`, None where the optimizer has none. The two are compared as the update
    sees them, divided by their bias corrections `bias_first` = 1 - beta1^t and `bias_second` = 1 - beta2^t (1.0 for an
    optimizer without), and the result is stored as `v` was. Squared maps drop the covariances between directions;
    without the max, |m'| / sqrt(v') could so grow by sqrt(r). With it, it never passes max(1, before).
    """
    carried = _carry(v, f64(N).square(), f64(M).square(), factor)
    if m is not None:
        carried = torch.maximum(carried, bias_second * (f64(m) / bias_first).square())
    carried = carried.clamp(max=torch.finfo(v.dtype).max)
    stored = like(carried, v)
    short = (f64(stored) < carried).to(v.device)  # rounding down, or to zero, would undo the bound
    return torch.where(short, torch.nextafter(stored, torch.full_like(stored, torch.inf)), stored)


def _carry(moment: Tensor, N: Tensor, M: Tensor, factor: Factor) -> Tensor:
    moment64 = f64(moment)
    if factor == "A":
        return f64(M).mT.to(moment64.device) @ moment64
    return moment64 @ f64(N).mT.to(moment64.device)
