"""One resize of a live adapter, for those who set ranks themselves: `rankflow.resize`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.optim import Optimizer

from rankflow.errors import ConfigError
from rankflow.gating.parametrize import refuse_gates
from rankflow.linalg.decompose import spectrum
from rankflow.linalg.spectrum import Spectrum
from rankflow.lora.adapter import Adapter
from rankflow.lora.site import Site
from rankflow.optim.optimizer_state import OnUnknownState
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import best_cut, ops_to
from rankflow.surgery.surgeon import Surgeon


def resize(
    model: nn.Module,
    ranks: int | Mapping[str, int],
    optimizer: Optimizer | None = None,
    metric: str = "weights",
    adapter_name: str = "default",
    *,
    seed: int = 0,
    on_unknown_state: OnUnknownState = "error",
) -> Layout:
    """Give modules of a live adapter other ranks, once, and carry the optimizer's state along.

    Args:
        model: has a PEFT LoRA adapter.
        ranks: one rank for all modules, or names or globs of names to ranks; of several that match, the last counts.
            Smaller ranks keep the best approximation, larger ones add directions that do not change the output, 0
            takes a module out.
        optimizer: its state follows; None where there is none yet.
        metric: `weights`; the others need data, which a policy collects.
        adapter_name: which adapter.
        seed: of new directions.
        on_unknown_state: `reset` starts optimizer state that nobody knows how to resize afresh.

    Returns:
        The layout after it.

    Raises:
        ConfigError: a pattern that matches no module, or another metric.
        AdapterError, OptimizerError, PlanError: see `Surgeon.apply`.
    """
    if metric != "weights":
        raise ConfigError(f"metric {metric!r} needs statistics of data; attach the squeeze policy, or use 'weights'")
    adapter = Adapter(model, adapter_name)
    adapter.refuse_resizing()
    refuse_gates(adapter.sites.values())
    surgeon = Surgeon(adapter, optimizer, seed=seed, on_unknown_state=on_unknown_state, warmup=0)
    layout = surgeon.layout
    wanted: dict[str, int] = {}
    for pattern, rank in ({"*": ranks} if isinstance(ranks, int) else ranks).items():
        hits = [pattern] if pattern in layout else fnmatch.filter(layout, pattern)
        if not hits:
            raise ConfigError(
                f"{pattern!r} matches no module of adapter {adapter_name!r}; its first is {next(iter(layout))}"
            )
        wanted |= dict.fromkeys(hits, rank)
    sites = surgeon.adapter.sites
    ops = {
        name: ops_to(rank, layout[name].rank, best_cut(partial(_spectrum, sites[name])))
        for name, rank in wanted.items()
    }
    return surgeon.apply(RankPlan(ops, reason="resize"))


def _spectrum(site: Site) -> Spectrum:
    return spectrum(site.a().detach(), site.b().detach(), site.scaling)
