"""Hard-concrete gates: z = clamp(t (zeta - gamma) + gamma, 0, 1), t the sigmoid of (logit + logistic noise) / beta. It
is exactly 0 or exactly 1 with some probability, and in between has a gradient.

Louizos, Welling & Kingma, "Learning sparse neural networks through L0 regularization" (arXiv 1712.01312), section 2.3;
constants and the rule for inference are those of Bayesian Bits (van Baalen et al., arXiv 2005.07093). Elementwise in
logits of any shape.
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
