"""SGD with momentum."""

from __future__ import annotations

from rankflow.optim.handler import Handler

HANDLERS = {"torch.optim.SGD": Handler("momentum_buffer")}
