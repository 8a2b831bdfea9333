"""Hard-concrete gates, and quantisation of a tensor to 2, 4, 8, 16 or 32 bits by such gates, which double the bits one
after the other: Bayesian Bits (van Baalen et al., arXiv 2005.07093, section 2).

A gate is z = clamp(t (zeta - gamma) + gamma, 0, 1), t the sigmoid of (logit + logistic noise) / beta, after Louizos,
Welling & Kingma (arXiv 1712.01312, section 2.3). It is exactly 0 or exactly 1 with some probability, and in between has
a gradient. Constants and the rule for inference are those of Bayesian Bits. Elementwise in logits of any shape.

x is clipped to [-c, c] and rounded to the 2-bit grid, what that leaves over to the 4-bit grid, and so on:

    x_q = x2 + z4 (e4 + z8 (e8 + z16 (e16 + z32 e32))),    s2 = 2c / 3,    s_b = s_{b/2} / (2^{b/2} + 1)

Grids are symmetric with 3, 15, 255, ... levels, so 0 stays 0. With gates of 0 and 1 the sum is x rounded once, at the
step of the last bits that are on. Rounding lets gradients straight through; those of c come from clipped entries (PACT,
arXiv 1805.06085) and from the steps. Everything is float32.

Differs: from the released code,
- x is clamped instead of passed through two ReLUs, which is the same function but loses small values to rounding;
- the clip is at (1 - 1e-6) c: float32 does not hold 1 - 1e-7 well enough for 16 bits, and x would round off the grid;
- a gate is never cut off from its chain for good because its logit fell below -2.
"""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

BETA, ZETA, GAMMA = 2 / 3, 1.1, -0.1
MOST_CLOSED = 0.34  # at inference a gate whose P(z = 0) is below this is on
_SHIFT = BETA * math.log(-GAMMA / ZETA)
THRESHOLD = _SHIFT + math.log(1 / MOST_CLOSED - 1)  # the logit above which that is so, -0.9353


def sample(logit: Tensor, u: Tensor) -> Tensor:
    """z for uniform noise `u`, which is kept within [1e-6, 1 - 1e-6]: its logarithms must be finite."""
    u = u.clamp(1e-6, 1 - 1e-6)
    t = torch.sigmoid((torch.log(u) - torch.log1p(-u) + logit) / BETA)
    return (t * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chain(z: Tensor) -> Tensor:
    """z1, z1 z2, z1 z2 z3, ... along the last dimension, for gates that count only while all before them are on.

    Not `cumprod`, whose backward pass waits for the device to see whether there are zeros.
    """
    return torch.stack([*accumulate(z.unbind(-1), mul)], -1)


def probability(logit: Tensor) -> Tensor:
    """Q = P(z > 0)."""
    return torch.sigmoid(logit - _SHIFT)


def is_on(logit: Tensor) -> Tensor:
    """The gate at inference, bool: on where P(z = 0) < 0.34."""
    return torch.sigmoid(_SHIFT - logit) < MOST_CLOSED


WIDTHS = (4, 8, 16, 32)  # what gates can add to the 2 bits that are always there
FULL = 32  # bits of what is not quantised
_INSIDE = 1 - 1e-6


def width(chain: Tensor) -> Tensor:
    """Bits ``[...]`` of tensors with a chain ``[..., 4]``, z4, z4 z8, ..., of zeros and ones."""
    return 2 ** (1 + chain.sum(-1)).long()


def step(c: Tensor, chain: Tensor) -> Tensor:
    """Step ``[...]`` of the grid of range `c` ``[...]`` at a chain ``[..., 4]`` of zeros and ones."""
    s = 2 * c / 3
    for bits, on in zip(WIDTHS, chain.unbind(-1), strict=True):
        s = s / (1 + on * 2 ** (bits // 2))
    return s


def nested(x: Tensor, c: Tensor, chain: Tensor) -> Tensor:
    """x_q of any x, at range `c` ``[]`` and gates in [0, 1] whose running products are `chain` ``[4]``."""
    x, s = _clip(x, c), 2 * c / 3
    quantised = residual_of = s * _round(x / s)
    for bits, on in zip(WIDTHS, chain.unbind(-1), strict=True):
        s = s / (1 + 2 ** (bits // 2))
        e = s * _round((x - residual_of) / s)
        quantised, residual_of = quantised + on * e, residual_of + e
    return quantised


def integers(x: Tensor, c: Tensor, step: Tensor) -> Tensor:
    """x on the grid of that step, in whole steps (as float32)."""
    return _round(_clip(x, c) / step)


def rounded(x: Tensor, c: Tensor, step: Tensor) -> Tensor:
    """x on the grid of that step: what `nested` comes to with gates of 0 and 1, in one rounding."""
    return step * integers(x, c, step)


def _clip(x: Tensor, c: Tensor) -> Tensor:
    c = c * _INSIDE
    return torch.clamp(x, -c, c)


def _round(x: Tensor) -> Tensor:
    """Nearest integer, never -0, with the gradient of x."""
    return x + (x.round() - x).detach()


# -- what it saves ----------------------------------------------------------------------------------------------------


def bit_operations(
    rank: int,
    in_features: int,
    out_features: int,
    *,
    bits_a: int = FULL,
    bits_b: int = FULL,
    bits_e: int = 0,
    frozen: bool = False,
) -> int:
    """Bit operations per token of one module: multiply-accumulates, each times the bits of weight and of activation.

    The adapter has rank * in at `bits_a`, rank * out at `bits_b`, and rank at `bits_e` where there is a diagonal
    between them; `frozen` adds in * out of the frozen weights at 32 bits. Activations are not quantised and have 32
    bits throughout. An embedding looks its rows up: give it 0 `in_features`.
    """
    adapter = rank * (in_features * bits_a + out_features * bits_b + bits_e) * FULL
    return adapter + (in_features * out_features * FULL * FULL if frozen else 0)
