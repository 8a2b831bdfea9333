"""Averaged SGD: beside the parameter, the average of what it was."""

from __future__ import annotations

from rankflow.optim.handler import Handler

HANDLERS = {"torch.optim.ASGD": Handler(points=("ax",))}
