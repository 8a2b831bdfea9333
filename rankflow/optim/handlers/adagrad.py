"""Adagrad: a sum of squares, there before the first step."""

from __future__ import annotations

from rankflow.optim.handler import Handler

HANDLERS = {"torch.optim.Adagrad": Handler(second="sum", eager=True)}
