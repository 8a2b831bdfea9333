"""Every rank decision about a LoRA module is an r x r problem.

DeltaW = s B A with A ``[*e, r, in]`` and B ``[*e, out, r]``, where ``*e`` is nothing, or one dimension of experts that
are all treated alike and apart. Two r x r Gram matrices say what is to be preserved:

========= ============ ============ ====================================================================
metric    S_A          S_B          the best rank-k adapter minimises
========= ============ ============ ====================================================================
weights   A A^T        s^2 B^T B    |change of DeltaW|_F (LoRA-Squeeze, arXiv 2602.10993)
outputs   E[z z^T]     s^2 B^T B    the expected squared change of the layer's output; z = A x
loss      E[z z^T]     E[d d^T]     the expected squared first-order change of the loss, Kronecker-factored;
                                    d = s B^T g with g the gradient at the layer's output
========= ============ ============ ====================================================================

With any roots R_A^T R_A = S_A and R_B^T R_B = S_B, the SVD R_B R_A^T = U diag(sigma) V^T gives the best rank-k adapter
A' = N A, B' = B M with N = diag(a / sigma) U^T R_B and M = R_A^T V diag(1 / a): no matrix is ever inverted, and nothing
of shape [out, in] is formed. The free scale `a` of each direction is the gauge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError, RankFlowError
from rankflow.linalg.spectrum import Directions, Spectrum
from rankflow.linalg.svd import Backend, check_backend, low_rank

MetricName = Literal["weights", "outputs", "loss"]
Factor = Literal["A", "B"]

# A direction this far below the strongest one is beyond what float32 factors can show: it counts as deficient.
RANK_EPS = torch.finfo(torch.float32).eps
# Squaring into a Gram matrix halves the digits. Below this share of the largest rank-1 term, factors are used instead.
_GRAM_LIMIT = 1e-4
# Rows of a bfloat16 factor whose products are summed in float32, before their sums are added up in float64.
_RUN = 512

# Squared sine of the angle between a column and the span of those before it, below which such sums are not relied on.
_APART = 1e-3


def spectrum(
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    metric: MetricName = "weights",
    S_A: Tensor | None = None,
    S_B: Tensor | None = None,
    backend: Backend = "exact",
    oversample: int = 10,
    n_iter: int = 2,
    seed: int = 0,
) -> Spectrum:
    """Return the singular values of scaling * B A in a metric (see the table above), and everything needed to cut it.

    Args:
        A: ``[*e, r, in]``, any floating dtype; all arithmetic is in float64, but for short sums of bfloat16.
        B: ``[*e, out, r]``.
        scaling: s in DeltaW = s B A; it stays what it is across a cut.
        S_A: ``[*e, r, r]``, E[z z^T], for `outputs` and `loss`; accumulate it in float64.
        S_B: ``[*e, r, r]``, E[d d^T], for `loss`.
        backend: other than `exact`, cuts form DeltaW and take its directions from that randomised SVD
            (`rankflow.linalg.svd.low_rank`, with `oversample`, `n_iter`, `seed`), as LoRA-Squeeze does; metric
            `weights` only. `sigma`, and so `energy` and `error`, stay exact.

    Raises:
        ConfigError: unknown metric or backend, statistics that the metric lacks or has no use for, their shape, or a
            scaling of zero.
        AdapterError: factors that do not fit each other, or are not finite.
        RankFlowError: statistics that are not finite.
    """
    _check_factors(A, B)
    _check_scaling(scaling)
    check_backend(backend)
    if backend != "exact" and metric != "weights":
        raise ConfigError(f"SVD backend {backend!r} works in metric 'weights' only; use 'exact' for {metric!r}")
    _check_statistics(A, metric, S_A, S_B)
    found = _decomposed(A, B, scaling, S_A, S_B)

    def randomised(k: int) -> tuple[Tensor, Tensor]:
        pairs = [
            _randomised_directions(a, b, scaling, k, backend, oversample, n_iter, seed)
            for a, b in zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
        ]
        N, M = (torch.stack(part) for part in zip(*pairs, strict=True))
        return N.reshape(*A.shape[:-2], *N.shape[1:]), M.reshape(*A.shape[:-2], *M.shape[1:])

    return found if backend == "exact" else replace(found, _directions=randomised)


def spectra(pairs: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float]) -> list[Spectrum]:
    """Return the spectrum in metric `weights` of each of several modules of one shape, factorised in one batch, which
    keeps a GPU busy. `pairs` holds A ``[*e, r, in]`` and B ``[*e, out, r]`` of each module, `scalings` its scaling.

    Raises:
        ConfigError, AdapterError: as `spectrum` of the first module at fault.
    """
    for (A, B), scaling in zip(pairs, scalings, strict=True):
        _check_factors(A, B)
        _check_scaling(scaling)
    A, B = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    apart = torch.tensor(scalings, dtype=torch.float64, device=A.device).reshape(-1, *[1] * (A.ndim - 1))
    try:
        return _decomposed(A, B, apart, None, None).parts()
    except AdapterError:  # of the stack; say it of the module
        return [spectrum(A, B, scaling) for (A, B), scaling in zip(pairs, scalings, strict=True)]


def refactor(A: Tensor, B: Tensor, N: Tensor, M: Tensor, *, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return A' = N A ``[*e, k, in]`` and B' = B M ``[*e, out, k]``. They are computed in float64 and rounded to the
    factors' dtype; with `wide` they are computed and left in that dtype (see `Spectrum`)."""
    if wide is None:
        new_A, new_B = refactor(f64(A), f64(B), N, M, wide=torch.float64)
        return like(new_A, A), like(new_B, B)
    A, B = A.detach().to(wide), B.detach().to(wide)
    # B M as (M^T B^T)^T: a product with its short side first is twice as fast on the CPU
    return N.detach().to(A) @ A, (M.detach().mT.to(B) @ B.mT).mT


def orthogonality(A: Tensor, B: Tensor) -> Tensor:
    """|A A^T - 1|_F + |B^T B - 1|_F, mean over experts: 0 where A's rows and B's columns are orthonormal.

    Differentiable. A ``[*e, r, in]``, B ``[*e, out, r]`` (AdaLoRA, arXiv 2303.10512, eq. 4)."""
    A, B = A.float(), B.float()
    one = torch.eye(A.shape[-2], device=A.device)
    return (torch.linalg.matrix_norm(A @ A.mT - one) + torch.linalg.matrix_norm(B.mT @ B - one)).mean()


def orthogonality_term(weight: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """weight / 2 * `orthogonality` as a penalty on (A, B); None for weight 0."""
    return (lambda A, B: weight / 2 * orthogonality(A, B)) if weight > 0 else None


def overlap(A: Tensor, B: Tensor) -> Tensor:
    """Return |off A A^T|_F + |off B^T B|_F, mean over experts, where off sets the diagonal to 0: 0 where A's rows and
    B's columns are orthogonal, whatever their lengths. It is `orthogonality` where these are 1.

    Differentiable. A ``[*e, r, in]``, B ``[*e, out, r]``."""
    grams = A.float() @ A.float().mT, B.float().mT @ B.float()
    off = [gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) for gram in grams]
    return (torch.linalg.matrix_norm(off[0]) + torch.linalg.matrix_norm(off[1])).mean()


def overlap_term(weight: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """weight / 2 * `overlap` as a penalty on (A, B); None for weight 0."""
    return (lambda A, B: weight / 2 * overlap(A, B)) if weight > 0 else None


# -- parts ----------------------------------------------------------------------------------------------------------


def _decomposed(A: Tensor, B: Tensor, scaling: float | Tensor, S_A: Tensor | None, S_B: Tensor | None) -> Spectrum:
    """Return the exact spectrum. A and B may have any number of leading dimensions, over which `scaling` may differ."""
    (root_A, wide_A), (root_B, wide_B) = root_of_factor(A.mT), root_of_factor(B)
    if root_A is None or root_B is None:
        bad, shape = ("A", A.shape) if root_A is None else ("B", B.shape)
        raise AdapterError(f"{bad} {list(shape)} holds NaN or infinity; restore it from a good checkpoint")
    R_A = root_A if S_A is None else root(f64(S_A))
    R_B = scaling * root_B if S_B is None else root(f64(S_B))
    core = R_B @ R_A.mT
    if not bool(core.square().sum().isfinite()):
        raise AdapterError("a DeltaW is too large for float64; restore it from a good checkpoint")
    U, sigma, Vh = torch.linalg.svd(core)
    scale = _largest_term(R_A, R_B)
    noise = 64 * torch.finfo(torch.float64).eps
    if S_A is not None:
        noise = 4 * math.sqrt(max(torch.finfo(S.dtype).eps for S in (S_A, S_B) if S is not None))
    elif bool((sigma[..., -1] < _GRAM_LIMIT * scale).any()):
        root_A, root_B = root_by_qr(A.mT), root_by_qr(B)
        R_A, R_B = root_A, scaling * root_B
        U, sigma, Vh = torch.linalg.svd(R_B @ R_A.mT)
    live = sigma > torch.maximum(RANK_EPS * sigma[..., 0], noise * scale)[..., None]
    inverse = torch.where(live, 1 / sigma, 0.0)
    wide = torch.promote_types(wide_A, wide_B)
    return Spectrum(sigma, live, wide, (root_A, root_B), Directions(inverse, U, Vh, R_A, R_B))


def like(t: Tensor, other: Tensor) -> Tensor:
    """Return `t` in the dtype of `other` and on its device."""
    return t.to(other.dtype).to(other.device)


def _largest_term(R_A: Tensor, R_B: Tensor) -> Tensor:
    """The largest norm of a single direction's part in the sum B A ``[*e]``."""
    return (torch.linalg.vector_norm(R_A, dim=-2) * torch.linalg.vector_norm(R_B, dim=-2)).amax(-1)


def _randomised_directions(
    A: Tensor, B: Tensor, s: float, k: int, backend: Backend, oversample: int, n_iter: int, seed: int
) -> tuple[Tensor, Tensor]:
    """N and M at a = 1 of one A, B whose singular vectors come from a randomised SVD of the update itself.

    s B M N A is then the update projected on the row (or column) space that was found: no worse than U diag(S) Vh.
    """
    wide = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    available = min(k, A.shape[-1], B.shape[-2])
    U, S, Vh = low_rank(
        s * B.to(wide) @ A.to(wide), available, backend, oversample=oversample, n_iter=n_iter, seed=seed
    )
    inverse = torch.where(S > 0, 1 / S, 0.0).double()
    N = inverse[:, None] * (f64(U).mT @ (s * f64(B)))
    M = f64(A) @ f64(Vh).mT
    pad = k - available
    return torch.nn.functional.pad(N, (0, 0, 0, pad)), torch.nn.functional.pad(M, (0, pad))


def _check_scaling(scaling: float) -> None:
    if not (math.isfinite(scaling) and scaling != 0):
        raise ConfigError(f"scaling is {scaling}; an adapter that adds nothing, or no number, has no spectrum")


def _check_factors(A: Tensor, B: Tensor) -> None:
    for name, factor in (("A", A), ("B", B)):
        if factor.ndim not in (2, 3) or not factor.is_floating_point():
            raise AdapterError(
                f"{name} is {factor.dtype} {list(factor.shape)}; a LoRA factor is a floating-point matrix, "
                "or a stack of them, one per expert"
            )
    if A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise AdapterError(
            f"A {list(A.shape)} and B {list(B.shape)} do not fit: B's columns must be as many as A's rows"
        )
    if min(*A.shape, *B.shape) == 0:
        raise AdapterError(f"A {list(A.shape)} and B {list(B.shape)} are empty; a module at rank 0 has no spectrum")


def _check_statistics(A: Tensor, metric: MetricName, S_A: Tensor | None, S_B: Tensor | None) -> None:
    wanted = {"weights": (), "outputs": ("S_A",), "loss": ("S_A", "S_B")}.get(metric)
    if wanted is None:
        raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(get_args(MetricName))}")
    shape = (*A.shape[:-1], A.shape[-2])
    for name, S in (("S_A", S_A), ("S_B", S_B)):
        if (S is not None) != (name in wanted):
            raise ConfigError(
                f"metric {metric!r} takes {' and '.join(wanted) or 'no statistics'}, but {name} was "
                f"{'given' if S is not None else 'not given'}"
            )
        if S is None:
            continue
        if S.shape != shape or not S.is_floating_point():
            raise ConfigError(f"{name} is {S.dtype} {list(S.shape)}; for A {list(A.shape)} it must be {list(shape)}")
        if not bool(S.isfinite().all()):
            raise RankFlowError(f"{name} {list(shape)} is not finite; skip this decision, or use metric 'weights'")


# -- roots R ``[*e, r, r]`` of Gram matrices, R^T R = S: all that a rank decision needs to know of a factor ---------


def f64(t: Tensor) -> Tensor:
    """Return `t` detached and in float64, on the CPU if its device has no float64."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).double()


def root_of_factor(F: Tensor) -> tuple[Tensor | None, torch.dtype]:
    """Return a root of F^T F, F ``[*e, n, r]``, computed from that Gram matrix, and the dtype to compute combinations
    of F's columns in. The root is None if F is not finite. The dtype is float32 for a bfloat16 F whose columns are well
    apart, whose Gram matrix then costs half as much, else float64.

    Products of bfloat16 numbers are exact in float32 (and in TF32 and the like), so only sums over `_RUN` rows round
    there, and the entries of the Gram matrix are good to a few 1e-8 sqrt(S_ii S_jj). Such a change moves the best cut
    by the square of what it moves singular values by, an optimum being flat, and those it moves by 1e-5 sigma_1 at
    most where columns are apart, whatever their sizes. Where they are not, or one is zero, not finite, or of a size
    that leaves float32's range when squared, the last digits count. All of this shows on the diagonal of Cholesky's
    root: its squares are the squared distances of each column from the span of those before it.
    """
    if F.dtype == torch.bfloat16:
        runs = (rows.detach().float() for rows in F.split(_RUN, -2))
        S = torch.stack([f64(rows.mT @ rows) for rows in runs]).sum(0)
        R, failed = torch.linalg.cholesky_ex(S, upper=True)
        size = S.diagonal(dim1=-2, dim2=-1)
        apart = R.diagonal(dim1=-2, dim2=-1).square() >= _APART * size
        if bool((apart & (size > 1e-20) & (size < 1e30) & (failed == 0)[..., None]).all()):
            return R, torch.float32
    F = f64(F)
    S = F.mT @ F
    finite = bool(S.diagonal(dim1=-2, dim2=-1).isfinite().all())
    return root(S) if finite else None, torch.float64


def root(S: Tensor) -> Tensor:
    """Return R with R^T R = S, up to rounding of sqrt(S_ii S_jj) in each entry, so that directions of very different
    size cost no accuracy. R is Cholesky's factor (Higham, Accuracy and Stability of Numerical Algorithms, theorem
    10.3). Where S is singular and Cholesky may fail, R comes from the eigenvectors of the correlation matrix."""
    R, failed = torch.linalg.cholesky_ex(S, upper=True)
    if not bool(failed.any()):
        return R
    d = S.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(d > 0, 1 / d, 0.0)
    eigenvalues, Q = torch.linalg.eigh(S * unit[..., :, None] * unit[..., None, :])
    return eigenvalues.clamp(min=0).sqrt()[..., :, None] * Q.mT * d[..., None, :]


def root_by_qr(F: Tensor) -> Tensor:
    """Return R with R^T R = F^T F, without squaring F ``[*e, n, r]``."""
    R = torch.linalg.qr(f64(F), mode="r").R
    return torch.nn.functional.pad(R, (0, 0, 0, R.shape[-1] - R.shape[-2]))
