"""Importance: sensitivity |w * dL/dw|, smoothed over steps and weighted by how uncertain it is (AdaLoRA's)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def smoothed(i: Number, u: Number, s: Number, beta1: float, beta2: float) -> tuple[Number, Number]:
    """I' = beta1 I + (1 - beta1) s and U' = beta2 U + (1 - beta2) |s - I'| (AdaLoRA, arXiv 2303.10512, eqs. 9, 10)."""
    i = beta1 * i + (1 - beta1) * s  # type: ignore[assignment]
    return i, beta2 * u + (1 - beta2) * abs(s - i)  # type: ignore[return-value]
