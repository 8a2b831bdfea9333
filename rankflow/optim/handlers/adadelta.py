"""Adadelta: a second moment, and one of its own steps."""

from __future__ import annotations

from rankflow.optim.handler import Handler

HANDLERS = {"torch.optim.Adadelta": Handler(second="square_avg", strides=("acc_delta",))}
