"""Roots R ``[*e, r, r]`` of Gram matrices, R^T R = S: all that a rank decision needs to know of a factor."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a bfloat16 factor whose products are summed in float32, before their sums are added up in float64.
_RUN = 512
# Squared sine of the angle between a column and the span of those before it, below which such sums are not relied on.
_APART = 1e-3


def f64(t: Tensor) -> Tensor:
    """Detached, in float64; on the CPU where the device has no float64."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).double()


def root_of_factor(F: Tensor) -> tuple[Tensor | None, torch.dtype]:
    """The root of F^T F, F ``[*e, n, r]``, by way of that Gram matrix, or None where F is not finite; and the dtype in
    which combinations of F's columns are to be computed: float32 for a bfloat16 F with its columns well apart, whose
    Gram matrix is had at half the cost, else float64.

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
    """R with R^T R = S up to rounding of sqrt(S_ii S_jj) in each entry, so that directions of very different size cost
    no accuracy: Cholesky's (Higham, Accuracy and Stability of Numerical Algorithms, theorem 10.3), or where S is
    singular, and Cholesky may fail, one from the eigenvectors of the correlation matrix."""
    R, failed = torch.linalg.cholesky_ex(S, upper=True)
    if not bool(failed.any()):
        return R
    d = S.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(d > 0, 1 / d, 0.0)
    eigenvalues, Q = torch.linalg.eigh(S * unit[..., :, None] * unit[..., None, :])
    return eigenvalues.clamp(min=0).sqrt()[..., :, None] * Q.mT * d[..., None, :]


def root_by_qr(F: Tensor) -> Tensor:
    """R with R^T R = F^T F, without squaring F ``[*e, n, r]``."""
    R = torch.linalg.qr(f64(F), mode="r").R
    return torch.nn.functional.pad(R, (0, 0, 0, R.shape[-1] - R.shape[-2]))
