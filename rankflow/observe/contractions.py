"""What the backward pass of one layer says about its DeltaW, computed without any [out, in] matrix.

Throughout, g is the gradient at lora_B's output with channels first, ``[out, *positions]``. It is scaling * dL/dy, so
dL/dDeltaW is its contraction with lora_A's input x, divided by scaling; against DeltaW = scaling * B A the two cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from rankflow.linalg.random import keyed_generator

BLOCK = 2**20  # entries of DeltaW in work at a time

Contract = Callable[[Tensor], Tensor]  # rows of g [b, *positions] -> the same rows of its contraction with x [b, n]


def delta_score(A: Tensor, B: Tensor, g: Tensor, contract: Contract, rows: Tensor | None = None) -> Tensor:
    """sum |DeltaW * dL/dDeltaW| over all output rows, or those given: ``[]``, float64 (IncreLoRA, arXiv 2308.12043).

    A ``[r, n]``, B ``[out, r]``, rows ``[m]``. Some rows at a time, so that a block stays within a few MB.
    """
    total = torch.zeros((), dtype=torch.float64, device=g.device)
    count, step = len(B) if rows is None else len(rows), max(1, BLOCK // A.shape[1])
    for i in range(0, count, step):
        pick = slice(i, i + step) if rows is None else rows[i : i + step]
        total += (B[pick] @ A).mul_(contract(g[pick])).abs_().sum()
    return total


def integrated(passes: Sequence[tuple[Tensor, Contract]]) -> Contract:
    """What takes row numbers ``[b]`` to those rows of the sum of all contractions, ``[b, n]``: the g of `delta_score`
    is then ``arange(out)``."""
    return lambda rows: reduce(torch.add, (contract(g[rows]) for g, contract in passes))


def gram(t: Tensor) -> Tensor:
    """Sum over tokens of t t^T, ``[r, r]`` float64, of t ``[tokens, r]``."""
    t = t.double()
    return t.T @ t


def linear_contraction(x: Tensor) -> Contract:
    """Return the contraction of a linear layer, for x ``[*positions, in]``."""
    flat = x.reshape(-1, x.shape[-1])
    return lambda g: g.flatten(1) @ flat


def conv_contraction(conv: nn.Module, x: Tensor) -> Contract:
    """Return the contraction of a convolution, for its input x ``[batch, channels, *space]``; ``n = channels *
    kernel``."""
    at: Any = conv
    padding = at.padding
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(at.dilation, at.kernel_size, strict=True)]
        x, padding = F.pad(x, [side for n in reversed(total) for side in (n // 2, n - n // 2)]), 0
    weight_gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[x.dim() - 3]
    shape = at.weight.shape[1:]

    def contract(g: Tensor) -> Tensor:
        gradient = weight_gradient(x, (len(g), *shape), g.movedim(0, 1), at.stride, padding, at.dilation)
        return gradient.flatten(1)

    return contract


def embedding_contraction(ids: Tensor, vocab: int) -> Contract:
    """Return the contraction of an embedding, for token numbers of any shape; ``n = vocab``."""
    return partial(_scatter, ids.flatten(), vocab)


def touched_columns(ids: Tensor, A: Tensor) -> tuple[Tensor, Contract]:
    """The columns of A ``[r, vocab]`` whose tokens are there, and the contraction onto them alone.

    n is the number of positions, which unlike that of distinct tokens is known without asking the device; columns left
    over get gradient 0.
    """
    tokens, order = ids.flatten().sort()
    first = torch.zeros_like(tokens)
    first[1:] = tokens[1:] != tokens[:-1]
    column = first.cumsum(0)
    columns = torch.zeros_like(tokens).scatter_(0, column, tokens)
    return A[:, columns], partial(_scatter, torch.empty_like(column).scatter_(0, order, column), len(tokens))


def _scatter(index: Tensor, size: int, g: Tensor) -> Tensor:
    return g.new_zeros(len(g), size).index_add_(1, index, g.flatten(1))


class RandomProjection:
    """The random choices of one module at one step: the same in every micro-batch, on every process, after a resume.

    They wait for their first use, on the device that asks.
    """

    def __init__(self, key: tuple[object, ...], sample_rows: int, sketch_rows: int):
        self._key = key
        self._sample_rows = sample_rows
        self.sketch_rows = sketch_rows
        self._made: dict[str, Tensor] = {}

    def rows(self, out: int, device: torch.device) -> Tensor:
        """Distinct row numbers below `out`, ``[min(out, sample_rows)]``."""
        if "rows" not in self._made:
            rows = torch.randperm(out, generator=keyed_generator(*self._key, "rows"))[: self._sample_rows]
            self._made["rows"] = rows.to(device, non_blocking=True)
        return self._made["rows"]

    def some(self, rows: Tensor, n: int, turn: int) -> Tensor:
        """`n` distinct rows of ``[tokens, in]``, or all if there are fewer; others at every `turn`."""
        picked = torch.randperm(len(rows), generator=keyed_generator(*self._key, "some", turn))[:n]
        return rows[picked.to(rows.device)]

    def omega(self, like: Tensor) -> Tensor:
        """Gaussian ``[sketch_rows, out]`` with E[Omega^T Omega] = I, for g `like` ``[out, ...]``."""
        if "omega" not in self._made:
            omega = torch.randn(self.sketch_rows, len(like), generator=keyed_generator(*self._key, "sketch"))
            self._made["omega"] = (omega / math.sqrt(self.sketch_rows)).to(like.device, like.dtype, non_blocking=True)
        return self._made["omega"]
