"""`mode: mask`: factors keep one shape for a whole phase, with room for the largest rank that each module may have.

Rows of A and columns of B beyond a module's rank are zero, both of them. So their gradients are zero, an optimizer
that steps each entry by what it alone has seen leaves them there, and nothing has to be masked in forward or backward:
a decision writes into the tensors there are. Parameters, compiled graphs and reducers of gradients stay what they are;
the memory and arithmetic of the room is what that costs. Between phases, and at the end, factors shrink to what is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.plans.plan import Layout
from rankflow.policies.base import Phase, Policy

_WHOLE = 64  # a module whose greatest rank is above this, and all it can have, is taken for one without a limit


def rooms(policy: Policy, layout: Layout) -> dict[str, int]:
    """Room of every module while `policy` is in charge: its greatest rank, or what it has where ranks only fall."""
    return {name: max(slot.rank, slot.max_rank if policy.grows else 0) for name, slot in layout.items()}


def check_rooms(phases: Sequence[Phase], layout: Layout, optimizer_state: OptimizerState | None) -> None:
    """
    Raises:
        ConfigError: an optimizer under which zeros would not stay as they are, or no end to what there may be.
    """
    if optimizer_state is not None and (optimizer_state.handler is None or not optimizer_state.handler.elementwise):
        raise ConfigError(
            f"mode: mask does not come to what resizing does under {optimizer_state.title}, which does not step each "
            "entry by what it alone has seen; use AdamW, or mode: resize"
        )
    for phase in phases:
        if not phase.policy.grows:
            continue
        for name, slot in layout.items():
            if slot.max_rank > _WHOLE and slot.max_rank >= min(slot.in_features, slot.out_features):
                raise ConfigError(
                    f"mode: mask makes room for every rank that {phase.name} may choose, and {name} may have "
                    f'{slot.max_rank}; set limits, such as limits: {{"*": {{max: 32}}}}'
                )


def lasting(adapter: Adapter, layout: Layout) -> Layout:
    """`layout` with a least rank of 1 where a module adds more than its factors do, a bias or a magnitude: that would
    stay with factors of zeros, so the module cannot leave."""
    stay = {name for name, site in adapter.sites.items() if {"bias", "magnitude"} & site.tensors().keys()}
    return Layout({n: replace(s, min_rank=max(1, s.min_rank)) if n in stay else s for n, s in layout.items()})
