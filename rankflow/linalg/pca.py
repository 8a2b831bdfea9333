"""Principal components of rows that come in batches, in one pass and in the memory of the directions kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # rows taken in at a time


@dataclass(frozen=True)
class Principal:
    """The mean of the rows seen so far and the leading `components` directions of their spread about it, in float64.

    Incremental PCA with a moving mean (Ross et al., Incremental Learning for Robust Visual Tracking, IJCV 2008, section
    3.2). `energy` counts what truncation leaves out too, and is exact; `rows` is exact until there are more directions
    than are kept. An entry that is not finite makes `energy` NaN, and counts as 0 in the rest.
    """

    components: int
    rows: Tensor  # [k <= components, n], S V^T of the centred rows
    mean: Tensor  # [n]
    count: Tensor  # [], rows seen
    energy: Tensor  # [], sum of squared distances from the mean

    @classmethod
    def empty(cls, components: int, n: int, device: torch.device) -> Principal:
        """Return the state before the first row, for rows of length `n`."""
        zeros = torch.zeros(n + 2, dtype=torch.float64, device=device)
        return cls(components, zeros.new_zeros(0, n), zeros[:n], zeros[n], zeros[n + 1])

    def add(self, x: Tensor, seen: Tensor | None = None) -> Principal:
        """Return the state after the rows `x` ``[tokens, n]``, or after those of them that `seen` ``[tokens]``
        marks."""
        seen = torch.ones_like(x[:, 0], dtype=torch.bool) if seen is None else seen.bool()
        state = self
        for block, marked in zip(x.split(BLOCK), seen.split(BLOCK), strict=True):
            state = state._add(block.double(), marked.double()[:, None])
        return state

    def _add(self, x: Tensor, seen: Tensor) -> Principal:
        finite = torch.where(seen > 0, x, 0.0).isfinite().all()
        x = torch.where(seen > 0, x, 0.0).nan_to_num(0.0, 0.0, 0.0)
        new = seen.sum()
        count = self.count + new
        mean = x.sum(0) / new.clamp(min=1)
        spread = (x - mean) * seen
        # The two means differ, and that difference is spread as well
        shift = (self.count * new / count.clamp(min=1)).sqrt() * (mean - self.mean)
        stacked = torch.cat([self.rows, spread, shift[None]])
        energy = self.energy + spread.square().sum() + shift.square().sum()
        return Principal(
            self.components,
            _leading(stacked, self.components),
            self.mean + (mean - self.mean) * new / count.clamp(min=1),
            count,
            torch.where(finite, energy, torch.nan),
        )


def _leading(stacked: Tensor, k: int) -> Tensor:
    """The first k rows of S V^T ``[<= k, n]``, from the eigenvectors of the smaller Gram matrix.

    Several times as fast as an SVD; what is lost are directions under 1e-8 of the first.
    """
    m, n = stacked.shape
    if m < n:
        return torch.linalg.eigh(stacked @ stacked.T)[1].flip(1)[:, :k].T @ stacked
    squares, V = torch.linalg.eigh(stacked.T @ stacked)
    return (squares.clamp(min=0).sqrt() * V).flip(1)[:, :k].T
