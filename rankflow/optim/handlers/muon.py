"""torch's Muon (torch >= 2.9): momentum, made orthogonal as a matrix."""

from __future__ import annotations

import torch

from rankflow.optim.handler import Handler, State


class MuonHandler(Handler):
    """torch's Muon, whose step depends on the parameter's shape by a factor (out / r for B)."""

    def shape_factor(self, group: State, shape: torch.Size) -> float:
        from torch.optim._muon import _adjust_lr  # torch's own rule, which has changed before

        return float(_adjust_lr(1.0, group["adjust_lr_fn"], shape))

    def rank_exponent(self, group: State) -> float:
        """The step is orthogonal, so it does not grow with the rank, but where it is fitted to AdamW's."""
        return 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else 0.0

    def decay(self, group: State) -> float:
        return 1.0 - float(group["lr"]) * float(group["weight_decay"])


HANDLERS = {"torch.optim.Muon": MuonHandler("momentum_buffer", shape_dependent=True, elementwise=False)}
