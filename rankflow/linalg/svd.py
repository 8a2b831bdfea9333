"""Truncated SVD of a dense update, exact or randomised, behind one function.

LoRA factors do not need any of this (see `rankflow.linalg.decompose`): it serves updates that come as a full matrix,
and lets the exact factor method be compared with the randomised SVD of LoRA-Squeeze (arXiv 2602.10993).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rankflow.errors import ConfigError, RankFlowError

Backend = Literal["exact", "torch", "fbpca", "sklearn"]

Triple = tuple[Tensor, Tensor, Tensor]

# Two of the backends draw from global generators only: seeding and putting back must not interleave between threads
_GLOBAL_RANDOM = threading.Lock()


def check_backend(backend: str) -> None:
    """Raise ConfigError unless `backend` is one of `Backend`."""
    if backend not in get_args(Backend):
        raise ConfigError(f"unknown SVD backend {backend!r}; known: {', '.join(get_args(Backend))}")


def low_rank(
    delta: Tensor, k: int, backend: Backend = "exact", *, oversample: int = 10, n_iter: int = 2, seed: int = 0
) -> Triple:
    """The `k` leading singular triples of a dense update: delta ~ U diag(S) Vh.

    Args:
        delta: ``[out, in]``. Half precision is computed in float32, anything else in its own precision.
        k: 1 to min(out, in).
        backend: `exact` is the full SVD; `torch` (`torch.svd_lowrank`), `fbpca` and `sklearn` are randomised range
            finders (Halko et al., arXiv 0909.4061) with k + `oversample` probes and `n_iter` power iterations.
        seed: of the probes. Global random state, torch's and numpy's, is left as it was.

    Returns:
        U ``[out, k]``, S ``[k]`` descending, Vh ``[k, in]``, in the precision of the computation. Each column of U
        has its largest entry positive, so that equal inputs give equal factors.

    Raises:
        ConfigError: unknown backend, its package missing, or k, `oversample` or `n_iter` out of range.
        RankFlowError: delta is not a matrix, not finite, or its singular values are not.
    """
    check_backend(backend)
    if delta.ndim != 2:
        raise RankFlowError(f"low_rank takes one matrix [out, in]; got a tensor of shape {list(delta.shape)}")
    if not 1 <= k <= min(delta.shape):
        raise ConfigError(f"cannot take {k} directions of a {delta.shape[0]} x {delta.shape[1]} matrix")
    if oversample < 0 or n_iter < 0:
        raise ConfigError(f"oversample {oversample} and n_iter {n_iter} must not be negative")
    if not bool(delta.isfinite().all()):
        raise RankFlowError(f"a {delta.shape[0]} x {delta.shape[1]} update holds NaN or infinity; nothing to factor")
    delta = delta.detach()
    if delta.device.type not in ("cpu", "cuda"):
        delta = delta.cpu()  # only these two random states can be put back
    if delta.dtype != torch.float64:
        delta = delta.float()
    probes = min(k + oversample, *delta.shape)
    size = float(delta.abs().max())
    scale = 2.0 ** (math.frexp(size)[1] - 1) if size > 0 else 1.0  # a power of two: squares fit, and no digit changes
    U, S, Vh = _BACKENDS[backend](delta / scale, k, probes, n_iter, seed)
    S = S * scale
    if not bool(S.isfinite().all()):
        raise RankFlowError(
            f"a {delta.shape[0]} x {delta.shape[1]} update is too large for {delta.dtype}; nothing to cut"
        )
    sign = dominant_sign(U.mT)
    return U * sign, S, Vh * sign[:, None]


def dominant_sign(rows: Tensor) -> Tensor:
    """The sign of each row's largest entry ``[..., n]``; the first one where several are largest to rounding."""
    size = rows.abs()
    first = (size >= size.amax(-1, keepdim=True) * (1 - 1e-6)).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(rows.gather(-1, first).squeeze(-1) < 0, -1.0, 1.0).to(rows.dtype)


def _exact(delta: Tensor, k: int, probes: int, n_iter: int, seed: int) -> Triple:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k]


def _torch(delta: Tensor, k: int, probes: int, n_iter: int, seed: int) -> Triple:
    on_gpu = delta.device.type == "cuda"
    with _GLOBAL_RANDOM, torch.random.fork_rng(devices=[delta.device] if on_gpu else []):
        # torch.manual_seed would also seed the devices that are not forked
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(delta.device):
                torch.cuda.manual_seed(seed)
        U, S, V = torch.svd_lowrank(delta, q=probes, niter=n_iter)
    return U[:, :k], S[:k], V[:, :k].mT


def _fbpca(delta: Tensor, k: int, probes: int, n_iter: int, seed: int) -> Triple:
    try:
        import fbpca
    except ImportError:
        raise _missing("fbpca", "fbpca") from None
    with _GLOBAL_RANDOM, _numpy_seeded(seed):
        found = fbpca.pca(delta.cpu().numpy(), k, raw=True, n_iter=n_iter, l=probes)
    return _from_numpy(found, delta)


def _sklearn(delta: Tensor, k: int, probes: int, n_iter: int, seed: int) -> Triple:
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        raise _missing("sklearn", "scikit-learn") from None
    found = randomized_svd(
        delta.cpu().numpy(),
        k,
        n_oversamples=probes - k,
        n_iter=n_iter,  # pyright: ignore[reportArgumentType]  (typed by its default "auto"; documented as int too)
        power_iteration_normalizer="QR",  # the default does not normalise at all for so few iterations
        random_state=seed,
    )
    return _from_numpy(found, delta)


_BACKENDS: dict[str, Callable[[Tensor, int, int, int, int], Triple]] = {
    "exact": _exact,
    "torch": _torch,
    "fbpca": _fbpca,
    "sklearn": _sklearn,
}


def _from_numpy(found: Any, like: Tensor) -> Triple:
    U, S, Vh = (torch.as_tensor(part.copy()).to(like) for part in found)
    return U, S, Vh


def _missing(backend: str, package: str) -> ConfigError:
    return ConfigError(
        f'SVD backend {backend!r} needs {package}, which is not installed: pip install "rankflow-lora[rsvd]"'
    )


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, the only one fbpca draws from, and put it back afterwards."""
    import numpy as np

    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
