"""Changes to gradients of the factors: those of a policy's penalty are added, and those of shared pairs are summed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.lora.adapter import Adapter
from rankflow.plans.layout import Layout
from rankflow.policies.base import Policy

PenaltyMode = Literal["gradient", "in_loss"]


def penalty_term(policy: Policy, adapter: Adapter) -> Tensor:
    """Mean over the adapter's modules of the policy's penalty; 0 where it has none."""
    sites = [site for site in adapter.sites.values() if site.present]
    if policy.penalty is None or not sites:
        return torch.zeros(())
    terms = [policy.penalty(site.a(), site.b()) for site in sites]
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def add_penalty_gradient(policy: Policy, adapter: Adapter, scale: float) -> None:
    """Add `scale` times the gradient of `penalty_term` to `.grad` of the adapter's trained parameters."""
    factors = [p for p in adapter.parameters() if p.requires_grad]
    with torch.enable_grad():
        term = penalty_term(policy, adapter) * scale
        gradients = torch.autograd.grad(term, factors, allow_unused=True)
    for p, g in zip(factors, gradients, strict=True):
        if g is not None:
            p.grad = g if p.grad is None else p.grad.add_(g)


def unscaled(scaler: Any, optimizer: Optimizer) -> bool:
    """Whether a loss scaler has divided the gradients already, and has looked for infinities in them."""
    if scaler is None or not scaler.is_enabled():
        return False
    return scaler._per_optimizer_states[id(optimizer)]["stage"].name == "UNSCALED"


def scale_in_force(scaler: Any, optimizer: Optimizer) -> float:
    """The factor that gradients carry now: a loss scaler's, or 1 once it has unscaled them."""
    if scaler is None or not scaler.is_enabled() or unscaled(scaler, optimizer):
        return 1.0
    return float(scaler.get_scale())


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
