"""Intruder dimensions: strong directions of W0 + DeltaW that W0 has nothing like.

A left singular vector of W0 + s B A among the first `top_k` is one if its |cosine| with every left singular vector of
W0 is below epsilon (Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228). As
in PEFT's `reduce_intruder_dimension` all min(in, out) vectors of W0 are compared with, yet none of them is computed.

u's squared cosines are masses, at the singular values, of u's spectral measure in W0. n steps of Golub and Kahan's
bidiagonalisation from u, a product with W0 and one with its transpose each, give that measure's Gauss quadrature. A
node whose Ritz pair has converged is a singular value, and its weight the squared cosine. Between two neighbouring
nodes lies no more mass than their weights sum up to (Chebyshev, Markov, Stieltjes), so that once all such sums and all
converged weights are below epsilon^2, no vector of W0 has a cosine of epsilon, however many are still unseen.
Directions that are strangers to W0 spread over its many vectors and are found out after some ten steps. A W0 with more
rows than columns is replaced by the R of its QR decomposition first, as what of u lies outside its range has no part.

Differs: PEFT takes two full SVDs. Singular vectors of W0 to the singular value 0, which are arbitrary, do not count
here; those whose values are within 1e-5 of the largest of each other, which float32 cannot tell apart, count as one;
and the weight of transformers' Conv1D, [in, out], is turned, so that left is always the side of outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.errors import ConfigError

_CONVERGED = 1e-5  # of the largest singular value: how far a Ritz pair may be from a singular one
_STEPS = 512  # after which what is known so far decides


@dataclass(frozen=True)
class Intruders:
    """The intruders of one module.

    top_k: how many of the first directions of W0 + DeltaW were looked at.
    found: those of them that are intruders, by their place from 0 on, strongest first.
    undecided: those for which the limit of steps came before certainty; counted by what was known then.
    """

    top_k: int
    found: tuple[int, ...]
    undecided: tuple[int, ...] = ()


def check_intruder_options(top_k: int, epsilon: float) -> None:
    """
    Raises:
        ConfigError: out of range.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be at least 1")
    if not 0 < epsilon < 1:
        raise ConfigError(f"epsilon is {epsilon}; it is a cosine, above 0 and below 1")


def intruders(W0: Tensor, A: Tensor, B: Tensor, scaling: float, *, top_k: int = 10, epsilon: float = 0.5) -> Intruders:
    """Count them in one module: W0 ``[out, in]``, A ``[r, in]``, B ``[out, r]``."""
    dtype = torch.float64 if W0.dtype == torch.float64 else torch.float32
    W0, A, B = (t.detach().to(dtype) for t in (W0, A, scaling * B))
    U = _top_left(
        lambda x: W0 @ x + B @ (A @ x), lambda y: W0.mT @ y + A.mT @ (B.mT @ y), W0.shape, min(top_k, *W0.shape), dtype
    )
    if W0.shape[0] > W0.shape[1]:  # what of U is outside W0's range is near nothing, and would only be in the way
        Q, W0 = torch.linalg.qr(W0)
        U = Q.mT @ U
    verdicts = _familiar(W0, U, epsilon)
    return Intruders(
        len(verdicts),
        tuple(i for i, (familiar, _) in enumerate(verdicts) if not familiar),
        tuple(i for i, (_, certain) in enumerate(verdicts) if not certain),
    )


# -- parts ----------------------------------------------------------------------------------------------------------

Product = Callable[[Tensor], Tensor]


def _top_left(forth: Product, back: Product, shape: torch.Size, k: int, dtype: torch.dtype) -> Tensor:
    """The k strongest left singular vectors ``[out, k]`` of the matrix with these products, strongest first."""
    import numpy as np
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds

    rows, columns = shape
    if k < min(shape) // 2:
        operator = LinearOperator(
            shape=(rows, columns),
            matvec=lambda x: forth(torch.from_numpy(x).to(dtype)).numpy(),  # type: ignore[call-arg]  # by __new__
            rmatvec=lambda y: back(torch.from_numpy(y).to(dtype)).numpy(),  # type: ignore[call-arg]
            dtype="float64" if dtype == torch.float64 else "float32",
        )
        start = torch.randn(min(shape), generator=torch.Generator().manual_seed(0), dtype=dtype).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                U, sigma, _ = svds(operator, k=k, v0=start)
                return torch.from_numpy(np.asarray(U)[:, np.argsort(sigma)[::-1]].copy()).to(dtype)
            except (ArpackError, RuntimeWarning):
                pass  # singular values that are all alike; they have no order to find
    return torch.linalg.svd(forth(torch.eye(columns, dtype=dtype)), full_matrices=False).U[:, :k]


def _familiar(W: Tensor, U: Tensor, epsilon: float) -> list[tuple[bool, bool]]:
    """Of every column of U ``[out, k]``: whether its product with a left singular vector of W ``[out, in]``, out <= in,
    is epsilon or more, and whether that is certain."""
    verdicts: dict[int, tuple[bool, bool]] = {}
    columns = list(range(U.shape[1]))  # that are not decided yet
    size = torch.linalg.vector_norm(U, dim=0)
    left, right = [U.mT / torch.where(size > 0, size, 1)[:, None]], []  # each [columns, out] or [columns, in]
    diagonal, below = [], []  # each [columns], of the lower bidiagonal L: W^T left = right L^T
    scale = torch.zeros(len(columns), dtype=W.dtype)
    steps, look = min(_STEPS, len(W) + 1), 8
    for n in range(1, steps + 1):
        v = left[-1] @ W
        v = _without(v - below[-1][:, None] * right[-1], right) if right else v
        a = torch.linalg.vector_norm(v, dim=1)
        scale = torch.maximum(scale, a)
        closed = a <= _CONVERGED * scale
        right.append(v / torch.where(closed, 1, a)[:, None])
        u = _without(right[-1] @ W.mT - a[:, None] * left[-1], left)
        b = torch.linalg.vector_norm(u, dim=1)
        scale = torch.maximum(scale, b)
        ended = closed | (b <= _CONVERGED * scale)
        left.append(u / torch.where(ended, 1, b)[:, None])
        diagonal.append(torch.where(closed, 0, a))
        below.append(torch.where(ended, 0, b))
        if n < min(look, steps) and not bool(ended.any()):
            continue
        look = math.ceil(1.25 * n)
        going = []
        for j, column in enumerate(columns):
            known, bound, guess = _masses(torch.stack(diagonal)[:, j], torch.stack(below)[:, j])
            limit = (epsilon / float(size[column])) ** 2 if size[column] > 0 else math.inf
            certain = known >= limit or bound < limit
            if certain or n == steps:
                verdicts[column] = (guess >= limit, certain)
            else:
                going.append(j)
        columns, scale = [columns[j] for j in going], scale[going]
        if not columns:
            break
        if len(going) < len(a):
            left, right, diagonal, below = ([x[going] for x in part] for part in (left, right, diagonal, below))
    return [verdicts[i] for i in range(U.shape[1])]


def _masses(diagonal: Tensor, below: Tensor) -> tuple[float, float, float]:
    """The largest squared cosine with a singular vector that has been found, the largest that any can have, and the
    largest as far as it is known; the last of `below` is what is left over."""
    n = len(diagonal)
    L = torch.diag(diagonal.double()) + torch.diag(below[: n - 1].double(), -1)
    P, sigma, Qh = torch.linalg.svd(L)
    weight = P[0].square()
    found = below[-1].double() * Qh[:, -1].abs() <= _CONVERGED * sigma[0]
    weight = torch.where(found & (sigma <= _CONVERGED * sigma[0]), 0, weight)  # W has no vector there
    loose = torch.nn.functional.pad(torch.where(found, 0, weight), (1, 1))
    known = float(torch.where(found, weight, 0).max())
    return known, max(known, float((loose[1:] + loose[:-1]).max())), float(weight.max())


def _without(x: Tensor, basis: list[Tensor]) -> Tensor:
    """x ``[columns, d]`` made orthogonal to the vectors of the basis, each ``[columns, d]``; twice is enough."""
    Q = torch.stack(basis, 1)
    for _ in range(2):
        x = x - (Q.mT @ (Q @ x[:, :, None]))[:, :, 0]
    return x
