"""Checks before a run begins: whether model, optimizer and lifecycle go together."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.lora.dtensor import REMEDY
from rankflow.observe.averages import sources
from rankflow.observe.probes import Probes
from rankflow.optim.optimizer_state import OnUnknownState, OptimizerState
from rankflow.plans.layout import Layout
from rankflow.policies.gate import Gate
from rankflow.policies.lifecycle import Lifecycle, Phase

_WHOLE = 64  # a module whose greatest rank is above this, and all it can have, is taken for one without a limit


def check_managed(
    adapter: Adapter, lifecycle: Lifecycle, optimizer: Optimizer | None, on_unknown_state: OnUnknownState
) -> None:
    """Check that an adapter trains, and that it and its optimizer can follow the lifecycle.

    Raises:
        AdapterError: nobody trains the adapter, or the lifecycle may change what is tied to its ranks.
        OptimizerError: the optimizer, if there is one yet, does not hold the adapter or could not follow the lifecycle.
    """
    adapter.check_trains()
    if lifecycle.resizes:
        adapter.refuse_resizing()
    if optimizer is not None:
        optimizer_state = OptimizerState(optimizer, adapter, on_unknown_state)
        optimizer_state.check((), {})
        if lifecycle.resizes:
            optimizer_state.check_carried()


def check_capacity(phases: Sequence[Phase], layout: Layout, optimizer_state: OptimizerState | None) -> None:
    """Check that `mode: mask` does under this optimizer what resizing does, with capacities that have an end.

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
                    f"mode: mask gives factors a capacity for every rank that {phase.name} may choose, and {name} may "
                    f'have {slot.max_rank}; set limits, such as limits: {{"*": {{max: 32}}}}'
                )


def check_shards(
    adapter: Adapter, lifecycle: Lifecycle, phases: Sequence[Phase], *, in_loss: bool, resumes: bool
) -> None:
    """Check that a run needs no more of an adapter in shards than there is.

    Raises:
        ConfigError: `adapter` is in shards, and this run would need more of it than there is.
    """
    if not adapter.sharded:
        return
    if lifecycle.mode != "mask":
        raise ConfigError(
            f"the adapter's factors are in shards (FSDP2), which mode: {lifecycle.mode} cannot give other shapes at "
            f"every decision; {REMEDY}, or set mode: mask in the policy file"
        )
    if in_loss:
        raise ConfigError('penalty="in_loss" reads factors that are in shards; use penalty="gradient"')
    for phase in phases:
        gate = phase.policy.gate
        reasons = {
            "passes over data of its own": bool(phase.policy.studies),
            "gates that learn from held-out batches": gate is not None and gate.trained_on == "outer",
            "gates that want factors stored in another form": gate is not None and type(gate).stored is not Gate.stored,
            "gates that a checkpoint would have to bring back": gate is not None and resumes,
        }
        for reason in (reason for reason, met in reasons.items() if met):
            raise ConfigError(f"{phase.name} has {reason}, which needs factors that are not in shards; {REMEDY}")


def check_signals(probes: Probes, phases: Sequence[Phase]) -> None:
    """Raise ConfigError where a phase asks for signals that this model cannot give (`Probes.check`)."""
    for phase in phases:
        for study in phase.policy.studies:
            probes.check(study.signals)
        for due in phase.policy.when.events[:1]:
            probes.check(sources(phase.policy.listen(due)))
