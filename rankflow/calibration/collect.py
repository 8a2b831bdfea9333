"""Collect statistics of data on an adapter's modules, on a live model.

::

    statistics = rankflow.calibrate(model, batches)
    statistics.save("stats.safetensors")
    rankflow.squeeze("adapter", target_rank=8, metric="loss", calibration="stats.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankflow.calibration.statistics import Statistics, digest
from rankflow.errors import ConfigError, RankFlowError
from rankflow.gating.parametrize import refuse_gates
from rankflow.linalg.parallel import Progress
from rankflow.lora.adapter import Adapter
from rankflow.observe.averages import Averages, sources
from rankflow.observe.study import check_batches, run_study
from rankflow.policies.metrics import Measured, averages_of
from rankflow.policies.observation import AVERAGED, Signal, Study
from rankflow.training.controller import Controller


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: str = "loss",
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
    base: str = "",
    data: str = "",
    progress: Progress | None = None,
) -> Statistics:
    """Return statistics of data on the adapter of a live model: the averages that policy `squeeze` keeps while
    training.

    The model runs in eval mode and is afterwards what it was. Every token that no attention mask hides counts alike.
    A run that is attached to the model would hear these batches too: calibrate when it is over, or a copy.

    Args:
        batches: iterated once, each moved to the adapter's device.
        metric: `loss`, which serves `outputs` too; `outputs` needs no loss, only a forward pass.
        loss_fn: `loss_fn(model, batch)` gives a loss, the mean over the batch's tokens; `model(**batch).loss` when
            left out.
        base: the name of the model, to write down in the statistics.
        data: where the batches are from, to write down in the statistics.

    Raises:
        ConfigError: no batch, or a metric that takes no data.
        AdapterError: no such adapter, or a layer that has no activations between A and B (DoRA, experts, attention).
        RankFlowError: a batch without a loss.
    """
    check_metric(metric)
    adapter = Adapter(model, adapter_name)
    refuse_gates(adapter.sites.values())
    check_batches(batches, "batches", loss_fn)
    if metric == "outputs" and loss_fn is None:
        loss_fn = _any_scalar  # z does not depend on it; something has to run backward
    total = len(batches) if isinstance(batches, Sized) else 0
    averages = Averages(adapter)
    done = 0
    for done, batch in enumerate(batches, 1):
        study = Study("calibration", sources(AVERAGED), batches=1)
        averages.take(run_study(study, adapter, model, [batch], loss_fn, step=done), AVERAGED, decay=1.0)
        if progress is not None:
            progress(done, max(done, total))
    if not done:
        raise ConfigError("there is no batch to calibrate on")
    return _statistics(adapter, averages.state_dict(), metric, batches=done, base=base, data=data)


def check_metric(metric: str) -> None:
    """
    Raises:
        ConfigError: an unknown metric, or one that takes no data.
    """
    if not averages_of(metric):
        raise ConfigError(f"metric {metric!r} takes no data; calibrate for 'loss' or 'outputs'")


def save_statistics(flow: Controller, path: str | Path, *, force: bool = False) -> Path:
    """Write down what the present policy of a run has measured, for the adapter as it now is; save that beside it.

    Averages fade and are of the steps that the policy listened to, with the factors of then.

    Raises:
        ConfigError: the policy has measured nothing (`squeeze` with metric `outputs` or `loss` does), or `path` cannot
            be written.
        AdapterError: a policy's gate is still in place; call `flow.finish()` first.
    """
    adapter = Adapter(flow.model, flow.adapter_name)
    refuse_gates(adapter.sites.values())
    averages = flow.state_dict()["averages"]
    if not averages:
        raise ConfigError("this run has measured nothing; policy squeeze does, with metric 'outputs' or 'loss'")
    return _statistics(adapter, averages, "loss", data="a training run").save(path, force=force)


def _statistics(
    adapter: Adapter, averages: Mapping[str, Mapping[str, Tensor]], metric: str, **about: Any
) -> Statistics:
    """Return statistics of every module. One that was never heard counts as measured over no token."""
    sites = {name: site for name, site in adapter.sites.items() if site.present}
    signals = averages_of(metric) | {Signal.MEASURED}
    measured: dict[str, Measured] = {}
    for name, site in sites.items():
        nothing = torch.zeros(site.rank, site.rank, dtype=torch.float64)
        empty = {s.value: nothing[0] if s is Signal.MEASURED else nothing for s in signals}
        found = averages.get(name, empty)
        measured[name] = {s: found[s.value] for s in sorted(signals)}
    tokens = max(float(m[Signal.MEASURED].max()) for m in measured.values())
    digests = {name: digest(site.a(), site.b()) for name, site in sites.items()}
    return Statistics(measured, digests, round(tokens), **about)


def _any_scalar(model: nn.Module, batch: Any) -> Tensor:
    found = model(**batch)
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple) else [found]
    scalars = [t.float().mean() for t in values if isinstance(t, Tensor) and t.is_floating_point()]
    if not scalars:
        raise RankFlowError(f"the model's output is {type(found).__name__}, without a tensor; pass loss_fn")
    return torch.stack(scalars).sum()
