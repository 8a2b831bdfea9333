"""`mode: mask`: factors keep one shape for a whole phase, of a capacity for the largest rank that each module may have.

Rows of A and columns of B beyond a module's rank are zero, both of them. So their gradients are zero, an optimizer
that steps each entry by what it alone has seen leaves them there, and nothing has to be masked in forward or backward:
a decision writes into the tensors there are. Parameters, compiled graphs and reducers of gradients stay what they are;
the memory and arithmetic of what lies beyond the rank is the cost. Between phases, and at the end, factors shrink to
what is needed.
"""

from __future__ import annotations

from dataclasses import replace

from rankflow.lora.adapter import Adapter
from rankflow.plans.layout import Layout
from rankflow.policies.base import Policy


def capacities(policy: Policy, layout: Layout) -> dict[str, int]:
    """Capacity of every module while `policy` is in charge: its greatest rank, or its own where ranks only fall."""
    return {name: max(slot.rank, slot.max_rank if policy.grows else 0) for name, slot in layout.items()}


def lasting(adapter: Adapter, layout: Layout) -> Layout:
    """`layout` with a least rank of 1 where a module adds more than its factors do, a bias or a magnitude: that would
    stay with factors of zeros, so the module cannot leave."""
    stay = {name for name, site in adapter.sites.items() if {"bias", "magnitude"} & site.tensors().keys()}
    return Layout({n: replace(s, min_rank=max(1, s.min_rank)) if n in stay else s for n, s in layout.items()})
