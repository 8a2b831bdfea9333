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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError, RankFlowError
from rankflow.nearest import nearest
from rankflow.roots import f64, root, root_by_qr, root_of_factor
from rankflow.rsvd import Backend, check_backend, dominant_sign, low_rank

Metric = Literal["weights", "outputs", "loss"]
Gauge = Literal["nearest", "keep", "balanced"]
Factor = Literal["A", "B"]

# A direction this far below the strongest one is beyond what float32 factors can show: it counts as deficient.
RANK_EPS = torch.finfo(torch.float32).eps
# Squaring into a Gram matrix halves the digits. Below this share of the largest rank-1 term, factors are used instead.
_GRAM_LIMIT = 1e-4
# A's directions below this share of its size are not relied on when a deficient direction is given a new row.
SPAN_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Cut:
    """A' = N A and B' = B M, with N ``[*e, k - fresh, r]`` and M ``[*e, r, k - fresh]`` in float64.

    `fresh` of the k directions asked for could not be had from the factors at hand: growth has to supply them.
    """

    N: Tensor
    M: Tensor
    fresh: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A module's singular values in a metric, and the cuts they allow. Made by `spectrum`.

    `sigma` ``[*e, r]`` float64, descending. `live` ``[*e, r]`` marks those above rounding: sigma_i > max(eps32 sigma_1,
    noise), where noise is what the arithmetic can produce out of nothing, in units of the largest rank-1 term: 64 eps64
    in metric `weights`, 4 sqrt(eps) for data metrics, whose Gram matrices (of precision eps) are all that is known.
    Directions that the data never excited, as when there were fewer tokens than r, are not live in a data metric.
    `wide` is what `refactor` has to compute in to be within 1e-5 of the best: float32 where factors are bfloat16, and
    their rows and columns well apart (`rankflow.roots`), `sigma` then being good to 1e-5 sigma_1; else float64.

    Differs: the usual eps32 * max(in, out) would call real directions of up to 5e-4 sigma_1 deficient. Factors are
    exact in float64, where B = 0, equal or zero columns show at 1e-16, so eps32 alone tells them apart and everything
    it discards is together below sqrt(r) eps32 sigma_1.
    """

    sigma: Tensor
    live: Tensor
    wide: torch.dtype
    _roots: tuple[Tensor, Tensor]  # [*e, r, r] of A A^T and B^T B
    _directions: Callable[[int], tuple[Tensor, Tensor]] = field(repr=False)  # k -> N [*e, k, r], M [*e, r, k] at a = 1
    outside: float = 0.0  # energy of an update that the factors are only the leading directions of, beside them

    @property
    def rank(self) -> int:
        """Numerical rank; with experts, that of the expert with the largest."""
        return int(self.live.sum(-1).max())

    @property
    def gains(self) -> Tensor:
        """What each direction adds to the energy: sigma squared, summed over experts ``[r]``, non-increasing."""
        return self.sigma.square().reshape(-1, self.sigma.shape[-1]).sum(0)

    @property
    def total(self) -> float:
        """The energy there is."""
        return float(self.gains.sum()) + self.outside

    def energy(self, k: int) -> float:
        """Share of the energy that the best rank-k adapter retains; 1.0 of nothing."""
        return float(self.gains[:k].sum()) / self.total if self.total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank >= 1 that retains at least this share of the energy."""
        return next((k for k in range(1, self.sigma.shape[-1]) if self.energy(k) >= energy), self.sigma.shape[-1])

    def error(self, k: int) -> float:
        """Distance, in the metric, from the adapter to its best rank-k one: the root of the discarded energy."""
        first = torch.arange(self.sigma.shape[-1], device=self.sigma.device) < k
        return math.hypot(float(torch.linalg.vector_norm(self.sigma * ~(self.live & first))), math.sqrt(self.outside))

    def weight_change(self, k: int) -> tuple[float, float]:
        """|B A - B' A'|_F, with B' A' the best rank-k adapter in the metric, and |B A|_F; without the scaling."""
        root_A, root_B = self._roots
        N, M = self._directions(k)
        whole = root_B @ root_A.mT
        lost = whole - root_B @ M @ N @ root_A.mT
        return float(torch.linalg.vector_norm(lost)), float(torch.linalg.vector_norm(whole))

    def cut(self, k: int, gauge: Gauge = "keep") -> Cut:
        """The best rank-k adapter in the metric.

        `balanced` gives every direction's row of A' and column of B' the same norm (in metric `weights`: A' A'^T =
        B'^T B' = diag(sigma / |s|)). `keep` scales that by one number per module and expert so that |A'|_F / |B'|_F is
        what |A|_F / |B|_F was: optimizers step per entry, and a live module that is rebalanced trains differently.
        In both, directions are sorted, so that the first j are the best rank-j adapter. `nearest` gives that up and
        mixes the kept ones until they are next to old ones (`rankflow.nearest`); where nothing is cut, nothing moves.

        Deficient directions among the k are revived: the column of M is exactly 0, and the row of N makes a row of A'
        orthogonal to all the others and of the RMS row norm of A, so the function stays and the direction can learn.
        Where A is zero and B is not (an embedding as PEFT starts it) the two swap roles. Rows that A's row space has
        no room for are counted in `fresh`; an expert with less room than the roomiest has zero rows in their place.

        Raises:
            ConfigError: k below 1, or an unknown gauge.
        """
        if k < 1:
            raise ConfigError(f"cannot cut to rank {k}; the smallest rank is 1, and Drop takes a module out")
        if gauge not in get_args(Gauge):
            raise ConfigError(f"unknown gauge {gauge!r}; known: {', '.join(get_args(Gauge))}")
        top = min(k, self.sigma.shape[-1])
        live = self.live[..., :top]
        N, M = self._directions(top)
        sign = dominant_sign(N) * live
        N, M = N * sign[..., :, None], M * sign[..., None, :]
        count = live.sum(-1)
        spare = None if k == top and bool(live.all()) else self._spare(N)
        revived = torch.zeros_like(count) if spare is None else torch.minimum(spare[2], k - count)

        root_A, root_B = self._roots
        norm_A = torch.linalg.vector_norm(root_A @ N.mT, dim=-2)
        norm_B = torch.linalg.vector_norm(root_B @ M, dim=-2)
        a = torch.where(live, (norm_B / norm_A).sqrt(), 1.0)
        if gauge != "balanced":
            size_A, size_B = (torch.linalg.matrix_norm(root) for root in self._roots)
            added = revived * size_A.square() / self.sigma.shape[-1]
            a = a * _keep_scale((norm_A * norm_B).sum(-1), added, size_A, size_B)[..., None]
        N, M = N * a[..., :, None], M / a[..., None, :]
        if gauge == "nearest":
            N, M = self._nearest(N, M, count)
        if spare is None:
            return Cut(N, M, 0)

        # Live directions are a prefix; the spare ones follow, of which those past their number are zero
        had = int((count + revived).max())
        at = torch.arange(had, device=N.device).expand(*count.shape, had)
        past = at - count[..., None]
        pick = torch.where(past < 0, at, top + past)
        N, M = torch.cat([N, spare[0]], -2), torch.cat([M, spare[1]], -1)
        r = self.sigma.shape[-1]
        N = N.gather(-2, pick[..., :, None].expand(*pick.shape, r))
        M = M.gather(-1, pick[..., None, :].expand(*pick.shape[:-1], r, had))
        return Cut(N, M, k - had)

    def _nearest(self, N: Tensor, M: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The first `count` ``[*e]`` of the directions, each expert's, brought next to old ones."""
        k, r = N.shape[-2:]
        flat_N, flat_M = N.reshape(-1, k, r).clone(), M.reshape(-1, r, k).clone()
        size_A, size_B = (torch.linalg.vector_norm(root, dim=-2).reshape(-1, r) for root in self._roots)
        for e, live in enumerate(count.flatten().tolist()):
            if live:
                found = nearest(flat_N[e, :live], flat_M[e, :, :live], size_A[e], size_B[e])
                flat_N[e, :live], flat_M[e, :, :live] = found
        return flat_N.reshape(N.shape), flat_M.reshape(M.shape)

    def _spare(self, N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions that add nothing to the function beside those of `N`: N ``[*e, r, r]``, M ``[*e, r, r]``, and
        how many of them there are ``[*e]``; the rest are zero."""
        root_A, root_B = self._roots
        rows, number = _orthogonal_rows(root_A, N)
        columns = torch.zeros_like(rows)
        mirrored = (root_A == 0).all(-1).all(-1)
        if bool(mirrored.any()):
            mirror, mirror_number = _orthogonal_rows(root_B, torch.zeros_like(N))
            columns = torch.where(mirrored[..., None, None], mirror.mT, columns)
            number = torch.where(mirrored, mirror_number, number)
        return rows, columns, number


def spectrum(
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    metric: Metric = "weights",
    S_A: Tensor | None = None,
    S_B: Tensor | None = None,
    backend: Backend = "exact",
    oversample: int = 10,
    n_iter: int = 2,
    seed: int = 0,
) -> Spectrum:
    """Singular values of scaling * B A in a metric (see the table above), and everything needed to cut it.

    Args:
        A: ``[*e, r, in]``, any floating dtype; all arithmetic is in float64, but for short sums of bfloat16.
        B: ``[*e, out, r]``.
        scaling: s in DeltaW = s B A; it stays what it is across a cut.
        S_A: ``[*e, r, r]``, E[z z^T], for `outputs` and `loss`; accumulate it in float64.
        S_B: ``[*e, r, r]``, E[d d^T], for `loss`.
        backend: other than `exact`, cuts form DeltaW and take its directions from that randomised SVD
            (`rankflow.rsvd.low_rank`, with `oversample`, `n_iter`, `seed`), as LoRA-Squeeze does; metric `weights`
            only. `sigma`, and so `energy` and `error`, stay exact.

    Raises:
        ConfigError: unknown metric or backend, statistics that the metric lacks or has no use for, their shape, or a
            scaling of zero.
        AdapterError: factors that do not fit each other, or are not finite.
        RankFlowError: statistics that are not finite.
    """
    _check_factors(A, B)
    if not (math.isfinite(scaling) and scaling != 0):
        raise ConfigError(f"scaling is {scaling}; an adapter that adds nothing, or no number, has no spectrum")
    check_backend(backend)
    if backend != "exact" and metric != "weights":
        raise ConfigError(f"SVD backend {backend!r} works in metric 'weights' only; use 'exact' for {metric!r}")
    _check_statistics(A, metric, S_A, S_B)
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

    def exact(k: int) -> tuple[Tensor, Tensor]:
        return inverse[..., :k, None] * (U[..., :k].mT @ R_B), R_A.mT @ Vh[..., :k, :].mT

    def randomised(k: int) -> tuple[Tensor, Tensor]:
        pairs = [
            _randomised_directions(a, b, scaling, k, backend, oversample, n_iter, seed)
            for a, b in zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
        ]
        N, M = (torch.stack(part) for part in zip(*pairs, strict=True))
        return N.reshape(*A.shape[:-2], *N.shape[1:]), M.reshape(*A.shape[:-2], *M.shape[1:])

    wide = torch.promote_types(wide_A, wide_B)
    return Spectrum(sigma, live, wide, (root_A, root_B), exact if backend == "exact" else randomised)


def refactor(A: Tensor, B: Tensor, N: Tensor, M: Tensor, *, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A' = N A ``[*e, k, in]`` and B' = B M ``[*e, out, k]``, in float64 and then rounded to the factor's dtype; given
    `wide`, computed and left in that (see `Spectrum`)."""
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


# -- parts ----------------------------------------------------------------------------------------------------------


def like(t: Tensor, other: Tensor) -> Tensor:
    """In the other's dtype, on its device."""
    return t.to(other.dtype).to(other.device)


def _largest_term(R_A: Tensor, R_B: Tensor) -> Tensor:
    """The largest norm of a single direction's part in the sum B A ``[*e]``."""
    return (torch.linalg.vector_norm(R_A, dim=-2) * torch.linalg.vector_norm(R_B, dim=-2)).amax(-1)


def _keep_scale(kept: Tensor, revived: Tensor, size_A: Tensor, size_B: Tensor) -> Tensor:
    """c such that rows of A' times c, columns of B' over c give |A'|_F / |B'|_F = |A|_F / |B|_F ``[*e]``.

    x = c^2 is the positive root of kept x + revived = (|A| / |B|)^2 kept / x, where `kept` is the squared norm of the
    balanced kept directions, on either side, and `revived` that of the revived rows, which are not scaled.
    """
    ratio = torch.where(size_B > 0, size_A / size_B, 1.0)
    weight = revived / torch.where(kept > 0, kept, 1.0)
    x = 2 * ratio.square() / (weight + (weight.square() + 4 * ratio.square()).sqrt())
    return torch.where(kept > 0, x, 1.0).sqrt()


def _orthogonal_rows(root: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    """Combinations of a factor's rows that are orthogonal to those N makes, and to each other ``[*e, r, r]``, each of
    the factor's RMS row norm, and how many of them there are ``[*e]``, strongest first.

    `root` ``[*e, r, r]`` is the factor in coordinates of its row space: its columns stand for the factor's rows.
    """
    rows = root.mT
    r = rows.shape[-2]
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = torch.where(length > 0, 1 / length, 0.0)  # what spans the row space does not depend on lengths
    kept = N @ rows
    kept_length = torch.linalg.vector_norm(kept, dim=-1, keepdim=True)
    shrink = torch.where(kept_length > 0, 1 / kept_length, 0.0)
    back = torch.linalg.pinv(kept * shrink, rtol=1e-10)
    combine = torch.eye(r, dtype=N.dtype, device=N.device) - rows @ back @ (shrink * N)
    U, strength, _ = torch.linalg.svd(unit * (combine @ rows))
    usable = strength > SPAN_EPS * math.sqrt(r)
    rms = torch.linalg.vector_norm(length, dim=-2, keepdim=True) / math.sqrt(r)
    new = torch.where(usable, 1 / strength, 0.0)[..., None] * rms * (U.mT @ (unit * combine))
    new = new * dominant_sign(new)[..., None]
    return new, usable.sum(-1)


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


def _check_statistics(A: Tensor, metric: Metric, S_A: Tensor | None, S_B: Tensor | None) -> None:
    wanted = {"weights": (), "outputs": ("S_A",), "loss": ("S_A", "S_B")}.get(metric)
    if wanted is None:
        raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(get_args(Metric))}")
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
