"""A module's singular values in a metric, and the best adapters of smaller rank that they allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.linalg.svd import dominant_sign

Gauge = Literal["nearest", "keep", "balanced"]

# A's directions below this share of its size are not relied on when a deficient direction is given a new row.
SPAN_EPS = 1e-6
_CONDITION = 100.0  # of what the new directions share with the old: past it, factors would lose digits to cancellation


@dataclass(frozen=True, eq=False)
class Cut:
    """A' = N A and B' = B M, with N ``[*e, k - fresh, r]`` and M ``[*e, r, k - fresh]`` in float64.

    `fresh` of the k directions asked for could not be had from the factors at hand: growth has to supply them.
    """

    N: Tensor
    M: Tensor
    fresh: int


@dataclass(frozen=True, eq=False)
class Directions:
    """The SVD U diag(1 / `inverse`) Vh of R_B R_A^T, all ``[*e, r, r]``, from which cuts of the factors are made."""

    inverse: Tensor
    U: Tensor
    Vh: Tensor
    R_A: Tensor
    R_B: Tensor

    def __call__(self, k: int) -> tuple[Tensor, Tensor]:
        """Return N ``[*e, k, r]`` and M ``[*e, r, k]`` with the free scale a = 1."""
        return self.inverse[..., :k, None] * (self.U[..., :k].mT @ self.R_B), self.R_A.mT @ self.Vh[..., :k, :].mT

    def __getitem__(self, i: int) -> Directions:
        return Directions(self.inverse[i], self.U[i], self.Vh[i], self.R_A[i], self.R_B[i])


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A module's singular values in a metric, and the cuts they allow. Made by `spectrum`.

    `sigma` ``[*e, r]`` float64, descending. `live` ``[*e, r]`` marks those above rounding: sigma_i > max(eps32 sigma_1,
    noise), where noise is what the arithmetic can produce out of nothing, in units of the largest rank-1 term: 64 eps64
    in metric `weights`, 4 sqrt(eps) for data metrics, whose Gram matrices (of precision eps) are all that is known.
    Directions that the data never excited, as when there were fewer tokens than r, are not live in a data metric.
    `wide` is what `refactor` has to compute in to be within 1e-5 of the best: float32 where factors are bfloat16, and
    their rows and columns well apart (`rankflow.linalg.decompose`); `sigma` is then good to 1e-5 sigma_1. Else float64.

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

    def parts(self) -> list[Spectrum]:
        """Return the spectra along the first dimension of an exact spectrum."""
        directions, (root_A, root_B) = self._directions, self._roots
        assert isinstance(directions, Directions)
        return [
            replace(self, sigma=s, live=l, _roots=(root_A[i], root_B[i]), _directions=directions[i])
            for i, (s, l) in enumerate(zip(self.sigma, self.live, strict=True))
        ]

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
        """The energy of all directions, and of what lies outside the factors."""
        return float(self.gains.sum()) + self.outside

    def energy(self, k: int) -> float:
        """Share of the energy that the best rank-k adapter retains; 1.0 of nothing."""
        return float(self.gains[:k].sum()) / self.total if self.total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank >= 1 that retains at least this share of the energy."""
        return next((k for k in range(1, self.sigma.shape[-1]) if self.energy(k) >= energy), self.sigma.shape[-1])

    def error(self, k: int) -> float:
        """Return the distance in the metric from the adapter to the best one of rank k: the root of the discarded
        energy."""
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
        mixes the kept ones until they are next to old ones (`rankflow.linalg.spectrum`); where nothing is cut, nothing
        moves.

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
        """Return N and M with the first `count` ``[*e]`` directions of each expert brought nearest to old ones."""
        k, r = N.shape[-2:]
        flat_N, flat_M = N.reshape(-1, k, r).clone(), M.reshape(-1, r, k).clone()
        size_A, size_B = (torch.linalg.vector_norm(root, dim=-2).reshape(-1, r) for root in self._roots)
        for e, live in enumerate(count.flatten().tolist()):
            if live:
                found = nearest(flat_N[e, :live], flat_M[e, :, :live], size_A[e], size_B[e])
                flat_N[e, :live], flat_M[e, :, :live] = found
        return flat_N.reshape(N.shape), flat_M.reshape(M.shape)

    def _spare(self, N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return directions that add nothing to the function, beside those of `N`: N ``[*e, r, r]``, M ``[*e, r, r]``,
        and how many there are ``[*e]``. The rest are zero."""
        root_A, root_B = self._roots
        rows, number = _orthogonal_rows(root_A, N)
        columns = torch.zeros_like(rows)
        mirrored = (root_A == 0).all(-1).all(-1)
        if bool(mirrored.any()):
            mirror, mirror_number = _orthogonal_rows(root_B, torch.zeros_like(N))
            columns = torch.where(mirrored[..., None, None], mirror.mT, columns)
            number = torch.where(mirrored, mirror_number, number)
        return rows, columns, number


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
    """Return combinations of a factor's rows that are orthogonal to those that N makes and to each other ``[*e, r,
    r]``, strongest first, and how many there are ``[*e]``. Each has the factor's RMS row norm.

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


def relative(distance: float, norm: float) -> float:
    """`distance` over `norm`; infinite where the norm is 0 and the distance is not."""
    return distance / norm if norm > 0 else math.inf if distance > 0 else 0.0


def nearest(N: Tensor, M: Tensor, size_A: Tensor, size_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return G N and M G^-1, with the G that brings each new direction nearest to an old one, at the same size.

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
