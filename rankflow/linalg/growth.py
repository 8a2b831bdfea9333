"""New rows for A: drawn as PEFT draws a fresh adapter's, or pointing where the gradient of DeltaW does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankflow.errors import ConfigError, RankFlowError
from rankflow.linalg.decompose import f64, like
from rankflow.linalg.spectrum import SPAN_EPS
from rankflow.linalg.svd import dominant_sign


def new_rows(n: int, A: Tensor, generator: torch.Generator, *, kind: str = "linear") -> Tensor:
    """Return `n` new rows for A ``[*e, n, in]``, drawn as PEFT draws a fresh A, in A's dtype and on its device.

    Uniform within 1 / sqrt(in) (Kaiming with a = sqrt(5)) from a CPU `generator`, whatever A's dtype. A may have no
    rows: only its other dimensions count.

    Differs: PEFT starts an embedding with A = 0 and a standard normal B. New columns of B are 0 here, always, so for
    kind `embedding` it is the rows of A that are standard normal.
    """
    shape = (*A.shape[:-2], n, A.shape[-1])
    if kind == "embedding":
        rows = torch.randn(shape, generator=generator)
    else:
        rows = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(A.shape[-1])
    return rows.to(A.device, A.dtype)


def gradient_directions(A: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of DeltaW's gradient that lie outside the row space of A ``[*e, m, in]``, strongest first:
    (strengths ``[*e, k]``, directions ``[*e, k, in]``), float64.

    Singular values and right singular directions of `sketch` ``[*e, q, in]`` outside A's row space, as many as are more
    than rounding, 1e-5 of the sketch's norm (of experts, as many as the one with the fewest has).

    Raises:
        ConfigError: a sketch whose shape does not fit A.
        RankFlowError: a sketch that is not finite.
    """
    if sketch.ndim != A.ndim or sketch.shape[:-2] != A.shape[:-2] or sketch.shape[-1] != A.shape[-1]:
        raise ConfigError(
            f"gradient sketch {list(sketch.shape)} does not fit A {list(A.shape)}; the last dims must agree"
        )
    if not bool(sketch.isfinite().all()):
        raise RankFlowError(f"gradient sketch {list(sketch.shape)} holds NaN or infinity; skip this decision")
    outside = f64(sketch)
    size = torch.linalg.matrix_norm(outside)[..., None]
    _, span, basis = torch.linalg.svd(f64(A), full_matrices=False)
    basis = basis * (span > SPAN_EPS * torch.linalg.vector_norm(span, dim=-1, keepdim=True))[..., None]
    outside = outside - outside @ basis.mT @ basis
    _, strength, directions = torch.linalg.svd(outside, full_matrices=False)
    usable = int((strength > 1e-5 * size).sum(-1).min())
    return strength[..., :usable], directions[..., :usable, :]


def rows_from_sketch(n: int, A: Tensor, sketch: Tensor, *, kind: str = "linear") -> Tensor:
    """Return up to `n` new rows for A ``[*e, m, in]``, m <= n: the leading `gradient_directions`. The largest entry of
    each row is positive, and each has A's RMS row norm (that of `new_rows` where A has no rows, or is 0). Fewer than n
    rows come back if the sketch has no more outside A's row space; `new_rows` makes up the number.

    Raises:
        ConfigError, RankFlowError: see `gradient_directions`.
    """
    rows = gradient_directions(A, sketch)[1][..., :n, :]
    norm = torch.linalg.matrix_norm(f64(A))[..., None, None] / math.sqrt(max(1, A.shape[-2]))
    norm = torch.where(norm > 0, norm, math.sqrt(A.shape[-1]) if kind == "embedding" else math.sqrt(1 / 3))
    return like(rows * dominant_sign(rows)[..., None] * norm, A)
