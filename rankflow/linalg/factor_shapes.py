"""A LoRA factor's two shapes: as its layer stores it, and canonical, with experts and directions as dimensions."""

from __future__ import annotations

from torch import Tensor


def canonical_a(t: Tensor, experts: int) -> Tensor:
    """Return a stored A, which is expert-major, as ``[*experts, r, in]``."""
    return t.reshape(experts, -1, t.shape[-1]) if experts > 1 else t.flatten(1)


def canonical_b(t: Tensor, experts: int) -> Tensor:
    """Return a stored B, whose columns are rank-major and expert-minor, as ``[*experts, out, r]``."""
    return t.reshape(t.shape[0], -1, experts).permute(2, 0, 1) if experts > 1 else t.flatten(1)


def stored_a(t: Tensor, experts: int) -> Tensor:
    """The way back of `canonical_a`, but for the kernel dimensions of a convolution."""
    return t.reshape(-1, t.shape[-1]) if experts > 1 else t


def stored_b(t: Tensor, experts: int) -> Tensor:
    """Return B from `canonical_b` in its stored shape, without the kernel dimensions of a convolution."""
    return t.permute(1, 2, 0).reshape(t.shape[1], -1) if experts > 1 else t
