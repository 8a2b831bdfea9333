"""Optimizer state of one LoRA factor, apart from how any optimizer stores it, and how it follows a change of rank.

Gradients of A' = N A are covectors, so averages of them map by M^T; squares of them map by the squared map, entry by
entry, bounded so that no step gets larger (`carry_second`). Points that an optimizer keeps beside
the factor (an iterate, of which the factor is an average) map as the factor does, and squares of the lengths of its
steps by the squared map of points, so that a factor which is ten times as large takes steps that are ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rankflow.linalg.decompose import Factor, f64, like

SeedV = Literal["siblings", "mean", "zero"]
SEED_FLOOR = 0.01  # of the siblings' mean: a direction whose partner is 0 has gradients all the same, a step later

View = Callable[[Tensor], Tensor]  # between a factor's stored shape and its canonical one


@dataclass(frozen=True)
class Partner:
    """Squared norms of the other factor's directions, which scale this factor's gradients."""

    new: Tensor  # [*experts, n], of the directions that are new
    old: Tensor  # [*experts], mean over the siblings


@dataclass(frozen=True)
class Level:
    """The typical second moments of modules of the same shape, for directions that have no siblings."""

    second: float  # median over modules of the mean entry
    partner: float  # median over modules of the mean squared norm of the partner's directions


@dataclass(frozen=True)
class Moments:
    """Optimizer state of one factor, canonical: A ``[*experts, r, in]``, B ``[*experts, out, r]``."""

    factor: Factor
    first: Mapping[str, Tensor] = field(default_factory=dict)  # averages linear in the gradient, by state key
    second: Tensor | None = None  # average of squared gradients, or their variance
    peak: Tensor | None = None  # running maximum of `second`
    bounding: str | None = None  # the first moment that `second` must bound
    bias: tuple[float, float] = (1.0, 1.0)  # what the optimizer divides first and second by
    points: Mapping[str, Tensor] = field(default_factory=dict)  # other values of the factor itself, by state key
    strides: Mapping[str, Tensor] = field(default_factory=dict)  # squares of the lengths of its steps, by state key

    @property
    def dim(self) -> int:
        """The dimension that counts directions."""
        return -2 if self.factor == "A" else -1

    def keep(self, idx: Sequence[int]) -> Moments:
        def take(t: Tensor) -> Tensor:
            return t.index_select(self.dim, torch.tensor(idx, dtype=torch.long, device=t.device))

        return self._map(take, take, take, take)

    def refactor(self, N: Tensor, M: Tensor) -> Moments:
        """Return the moments after A' = N A, B' = B M.

        A revived direction's column of B is 0, and so is the gradient its row of A has had, by this map; its second
        moment starts at the least that growth would give it, not at 0.
        """
        first = {key: carry_first(m, N, M, self.factor) for key, m in self.first.items()}
        points = {key: carry_point(z, N, M, self.factor) for key, z in self.points.items()}
        strides = {key: carry_squares(s, N, M, self.factor) for key, s in self.strides.items()}
        second, peak = self.second, self.peak
        if second is not None:
            bound = None if self.bounding is None else first.get(self.bounding)
            least = SEED_FLOOR * second.mean(-2, keepdim=True)
            second = carry_second(second, bound, N, M, self.factor, bias_first=self.bias[0], bias_second=self.bias[1])
            if self.factor == "A":
                revived = (M == 0).all(-2).to(second.device)[..., None]
                second = torch.where(revived, least.to(second.dtype), second)
            if peak is not None:
                peak = torch.maximum(carry_second(peak, None, N, M, self.factor), second)
        return replace(self, first=first, points=points, strides=strides, second=second, peak=peak)

    def over(self, value: Tensor) -> Moments:
        """Return the moments of A' = diag(value) A from those of A. The gradient of A' is that of A over `value`
        ``[r]`` or ``[1]``.

        Rows whose value is 0 had no gradient; they start at 0, under the second moment they had.
        """
        zero = (value == 0)[:, None]

        def divide(t: Tensor, power: int, otherwise: Tensor | float) -> Tensor:
            divided = t.double() / torch.where(value == 0, 1.0, value.double().to(t.device))[:, None] ** power
            bound = torch.finfo(t.dtype).max
            return torch.where(zero.to(t.device), otherwise, divided.clamp(-bound, bound)).to(t.dtype)

        def multiply(t: Tensor, power: int) -> Tensor:
            bound = torch.finfo(t.dtype).max
            return (t.double() * value.double().to(t.device)[:, None] ** power).clamp(-bound, bound).to(t.dtype)

        return self._map(
            lambda t: divide(t, 1, 0.0),
            lambda t: divide(t, 2, t.double()),
            lambda t: multiply(t, 1),
            lambda t: multiply(t, 2),
        )

    def to(self, device: torch.device | str) -> Moments:
        return self._map(*[lambda t: t.to(device)] * 4)

    def grow(
        self, new: Tensor, seed: SeedV, partner: Partner, level: Callable[[], Level | None], gate: float = 1.0
    ) -> Moments:
        """Append the directions that are `new` in the factor, with first moments of 0 and an estimated second moment.

        The gradient of a column of B scales with its row of A, so a sibling's mean is scaled by their squared norms:
        an all-zero second moment under an old step count would overshoot, a plain mean would put a short direction to
        sleep. Where there is no sibling with any history, like modules stand in for them; where none either, 0. Under
        a `gate` all gradients are that many times what they would be without. Points start where the factor does, and
        steps are as long as those of siblings.
        """
        dim = self.dim

        def append(t: Tensor, tail: Tensor | float) -> Tensor:
            added = torch.zeros(new.shape, dtype=t.dtype, device=t.device) + torch.as_tensor(tail, device=t.device)
            return torch.cat([t, added.to(t.dtype)], dim)

        def guess(t: Tensor) -> Tensor | float:
            if seed == "zero":
                return 0.0
            if t.shape[dim] and bool(t.any()):
                mean, old = t.mean(dim, keepdim=True), partner.old[..., None]
            elif (like := level()) is not None:
                mean, old = partner.old.new_tensor([[like.second]]), partner.old.new_tensor([like.partner])
            else:
                return 0.0
            if seed == "mean":
                return mean
            ratio = torch.where(old > 0, partner.new / old.clamp(min=torch.finfo(old.dtype).tiny), 1.0)
            ratio = ratio.clamp(min=SEED_FLOOR).to(t.device, t.dtype)
            return mean * (ratio[..., :, None] if self.factor == "A" else ratio[..., None, :])

        def like_siblings(t: Tensor) -> Tensor | float:
            return t.mean(dim, keepdim=True) if t.shape[dim] and seed != "zero" else 0.0

        return self._map(
            lambda t: append(t, 0.0),
            lambda t: append(t, guess(t) * gate**2),
            lambda t: append(t, new),
            lambda t: append(t, like_siblings(t)),
        )

    def _map(self, first: View, second: View, point: View, stride: View) -> Moments:
        return replace(
            self,
            first={key: first(m) for key, m in self.first.items()},
            points={key: point(z) for key, z in self.points.items()},
            strides={key: stride(s) for key, s in self.strides.items()},
            second=None if self.second is None else second(self.second),
            peak=None if self.peak is None else second(self.peak),
        )


# -- through A' = N A, B' = B M ---------------------------------------------------------------------------------------


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
