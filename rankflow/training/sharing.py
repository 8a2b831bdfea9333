"""Modules that share one pair of factors: each holds a copy, and what is the same and steps alike stays the same."""

from __future__ import annotations

import torch
from torch import nn

from rankflow.lora.adapter import Adapter
from rankflow.plans.plan import Layout


def share_gradients(adapter: Adapter, layout: Layout) -> None:
    """Give all modules of a group (`Layout.sharing`) the sum of their gradients: that of the pair they share.

    Equal copies with equal optimizer state then take equal steps, bit for bit. Where a copy has had no gradient it
    counts as 0; where none has, none gets one.
    """
    for names in layout.sharing:
        sites = [adapter.sites[name] for name in names]
        _sum([site.A for site in sites])
        _sum([site.B for site in sites])


def _sum(copies: list[nn.Parameter]) -> None:
    gradients = [p.grad for p in copies if p.grad is not None]
    if gradients:
        total = torch.stack([g.to(gradients[0].device) for g in gradients]).sum(0)
        for p in copies:
            if p.requires_grad:
                p.grad = total.to(p.device, copy=True)
