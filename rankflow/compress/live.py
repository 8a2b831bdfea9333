"""Squeeze the adapter of a live model, once, as a file is squeezed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rankflow.calibration.statistics import Statistics
from rankflow.compress.metric import Metric
from rankflow.compress.report import SqueezeReport, report
from rankflow.compress.target import Goal, Target
from rankflow.deprecation import renamed_arguments
from rankflow.formats.single_file.names import of_image_model
from rankflow.gating.parametrize import refuse_gates
from rankflow.linalg.parallel import Pool, Progress
from rankflow.linalg.spectrum import Gauge, Spectrum
from rankflow.linalg.svd import Backend, check_backend
from rankflow.lora.adapter import Adapter
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import best_cut, ops_to
from rankflow.surgery.surgeon import Surgeon

if TYPE_CHECKING:
    from typing_extensions import Unpack


@renamed_arguments(statistics="calibration")
def squeeze_model(
    model: nn.Module,
    *,
    metric: str = "weights",
    calibration: Statistics | str | Path | None = None,
    backend: Backend = "exact",
    gauge: Gauge = "keep",
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str = "default",
    progress: Progress | None = None,
    **target: Unpack[Goal],
) -> SqueezeReport:
    """Squeeze an adapter in memory as `rankflow.squeeze` does a file.

    Its factors, its PEFT config and, if given, the optimizer's state shrink in place. Save
    afterwards with `model.save_pretrained`.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: no such adapter, or one that cannot be resized; the model is as it was.
        OptimizerError: an optimizer that does not hold the adapter, or whose state nobody knows how to carry.
    """
    began = time.perf_counter()
    goal = Target(**target)
    check_backend(backend)
    adapter = Adapter(model, adapter_name)
    adapter.refuse_resizing()
    refuse_gates(adapter.sites.values())
    surgeon = Surgeon(adapter, optimizer)
    layout = Layout({name: slot for name, slot in adapter.layout().items() if slot.rank})
    cut_in = Metric.of(metric, calibration, layout, [goal])

    def measure(name: str) -> Spectrum:
        site = adapter.sites[name]
        return cut_in.spectrum(name, site.a(), site.b(), layout[name].scaling, backend)

    spectra = Pool(progress, len(layout)).each(measure, layout)
    ranks = goal.choose(layout, spectra)
    ops = {
        name: ops_to(rank, layout[name].rank, best_cut(partial(spectra.__getitem__, name), cut_in.of_each[name], gauge))
        for name, rank in ranks.items()
    }
    after = surgeon.apply(RankPlan(ops, f"squeeze to {goal.given}"))
    return report(
        layout,
        Layout({name: after[name] for name in layout}),
        spectra,
        cut_in.of_each,
        source=f"adapter {adapter_name!r} of {type(model).__name__}",
        out=None,
        target=goal.given,
        shortfall=goal.shortfall(layout, spectra, ranks, 0),
        backend=backend,
        gauge=gauge,
        dtype=None,
        dry_run=False,
        notes=cut_in.notes,
        seconds=time.perf_counter() - began,
        language_model=not of_image_model(layout),
    )
