"""Adafactor, torch's and transformers': second moments as means of rows and of columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankflow.linalg.decompose import Factor
from rankflow.optim.handler import InGradientUnits, State
from rankflow.optim.moments import Moments, View


class AdafactorHandler(InGradientUnits):
    """Second moments kept as row and column means over the last two dimensions: spread out, mapped, averaged again.

    Spread out they are row col / mean(row), which every map keeps of that form; only grown directions are fitted.
    """

    row_key, col_key = "row_var", "col_var"

    @property
    def keys(self) -> set[str]:
        return {self.row_key, self.col_key}

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {self.row_key: (*shape[:-1], 1), self.col_key: (*shape[:-2], 1, shape[-1])}

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        row, col = (self._spread(state[key].double(), key) for key in (self.row_key, self.col_key))
        mean = row.mean(-2, keepdim=True)
        return Moments(factor, {}, canonical(torch.where(mean > 0, row * col / mean, 0.0)))

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        assert moments.second is not None
        v = raw(moments.second)
        row, col = v.mean(-1, keepdim=True), v.mean(-2, keepdim=True)
        packed = {self.row_key: self._pack(row, self.row_key), self.col_key: self._pack(col, self.col_key)}
        return {**state, **{key: t.to(state[key].dtype).contiguous() for key, t in packed.items()}}

    def _spread(self, t: Tensor, key: str) -> Tensor:
        return t

    def _pack(self, t: Tensor, key: str) -> Tensor:
        return t


class TransformersAdafactorHandler(AdafactorHandler):
    """transformers' Adafactor, without the dimension of size 1 that torch's keeps; with `beta1` it has an average of
    past updates."""

    row_key, col_key = "exp_avg_sq_row", "exp_avg_sq_col"

    @property
    def keys(self) -> set[str]:
        return {*super().keys, "exp_avg"}

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {
            self.row_key: tuple(shape[:-1]),
            self.col_key: (*shape[:-2], shape[-1]),
            "exp_avg": tuple(shape),
        }

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        moments = super().load(factor, state, group, canonical)
        if "exp_avg" not in state:
            return moments
        assert moments.second is not None
        update = canonical(state["exp_avg"])
        return replace(moments, first={"exp_avg": self._to_gradient(update, moments.second, 0.0)})

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        new = super().store(moments, state, group, raw)
        if "exp_avg" in moments.first:
            assert moments.second is not None
            update = self._to_update(moments.first["exp_avg"], moments.second, 0.0, state["exp_avg"])
            new["exp_avg"] = raw(update).contiguous()
        return new

    def _spread(self, t: Tensor, key: str) -> Tensor:
        return t.unsqueeze(-1 if key == self.row_key else -2)

    def _pack(self, t: Tensor, key: str) -> Tensor:
        return t.squeeze(-1 if key == self.row_key else -2)


HANDLERS = {
    "torch.optim.Adafactor": AdafactorHandler(elementwise=False),
    "transformers.Adafactor": TransformersAdafactorHandler(elementwise=False),
}
