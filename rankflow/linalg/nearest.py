"""Among the equivalent factors of one update, those nearest to the ones that training had."""

from __future__ import annotations

import torch
from torch import Tensor

_CONDITION = 100.0  # of what the new directions share with the old: past it, factors would lose digits to cancellation


def nearest(N: Tensor, M: Tensor, size_A: Tensor, size_B: Tensor) -> tuple[Tensor, Tensor]:
    """G N and M G^-1 for the G that leaves each new direction next to an old one, at the same size.

    With A' = N A and B' = B M, only P = M N ``[r, r]``, a projector of rank k, matters to the function. Gaussian
    elimination with diagonal pivots finds the k old directions I that P keeps most of. With the polar form Q H of
    P[I, I], N' = H^(-1/2) Q^T P[I, :] and M' = P[:, I] H^(-1/2) map I onto itself by H^(1/2) and Q H^(1/2), as near to
    the identity as a symmetric split can be; where P = 1, N' = M' = 1. An optimizer that works entry by entry, as Adam
    does, sees hardly another problem, which no map of its second moments could make up for.

    Old directions are first brought to |a_i| = |b_i|, so that their scales do not count. Where no k of them stand for
    what is kept (condition of P[I, I] above 100), N and M come back as they are.

    Args:
        N: ``[k, r]`` float64 with N M = 1.
        M: ``[r, k]``.
        size_A: norms of A's rows ``[r]``.
        size_B: norms of B's columns ``[r]``.
    """
    k, r = N.shape
    if k == r:
        one = torch.eye(r, dtype=N.dtype, device=N.device)
        return one, one.clone()
    scale = torch.where((size_A > 0) & (size_B > 0), (size_A / size_B).sqrt(), 1.0).cpu()
    projector = M.cpu() @ N.cpu() * scale / scale[:, None]  # on the CPU: pivots are read one by one
    rest, old = projector, []
    for _ in range(k):
        diagonal = rest.diagonal().clone()
        diagonal[old] = -torch.inf
        old.append(int(diagonal.argmax()))
        pivot = diagonal[old[-1]].clamp(min=torch.finfo(N.dtype).eps)
        rest = rest - torch.outer(rest[:, old[-1]], rest[old[-1]]) / pivot
    old.sort()
    U, S, Vh = torch.linalg.svd(projector[old][:, old])
    if S[0] > _CONDITION * S[-1]:
        return N, M
    root = S.sqrt()
    new_N = Vh.mT @ ((U / root).mT @ projector[old])
    new_M = projector[:, old] @ ((Vh.mT / root) @ Vh)
    return (new_N * scale[old, None] / scale).to(N.device), (new_M * scale[:, None] / scale[old]).to(M.device)
