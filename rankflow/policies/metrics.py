"""Choose the metric that each module is cut in by how well it was measured, and compute its spectrum in that metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.linalg.decompose import MetricName, spectrum
from rankflow.linalg.spectrum import Spectrum
from rankflow.linalg.svd import Backend
from rankflow.policies.observation import Signal

Measured = Mapping[Signal, Tensor]  # of one module: `MEASURED` and the averages there are, if it was heard at all

_GRAMS: Mapping[str, Mapping[str, Signal]] = {
    "weights": {},
    "outputs": {"S_A": Signal.MEAN_ZZ},
    "loss": {"S_A": Signal.MEAN_ZZ, "S_B": Signal.MEAN_DD},
}


def averages_of(metric: str) -> frozenset[Signal]:
    """Return the averages that a metric needs.

    Raises:
        ConfigError: there is no such metric.
    """
    if metric not in _GRAMS:
        raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(get_args(MetricName))}")
    return frozenset(_GRAMS[metric].values())


def metric_of_each(
    metric: MetricName, measured: Mapping[str, Measured], ranks: Mapping[str, int], *, shared: bool
) -> tuple[dict[str, MetricName], list[str]]:
    """Return module -> the metric it is cut in, and the modules that were not measured enough for `metric`.

    A module with a direction that was measured over fewer tokens than it has directions is cut by its weights: its
    averages have no full rank, and what they do not show would be lost. Where modules compete for one budget
    (`shared`), all are then: energies in different metrics are in different units.
    """
    wanted = averages_of(metric)
    lacking = [name for name, rank in ranks.items() if wanted and not _enough(measured.get(name, {}), rank)]
    fallen = set(ranks) if lacking and shared else set(lacking)
    return {name: "weights" if name in fallen else metric for name in ranks}, lacking


def _enough(measured: Measured, rank: int) -> bool:
    return Signal.MEASURED in measured and float(measured[Signal.MEASURED].min()) >= rank


def spectrum_in(
    metric: MetricName, A: Tensor, B: Tensor, scaling: float, measured: Measured, backend: Backend = "exact"
) -> Spectrum:
    """Return the spectrum in `metric`, with the averages of `measured` that the metric needs."""
    S_A, S_B = (measured[_GRAMS[metric][name]] if name in _GRAMS[metric] else None for name in ("S_A", "S_B"))
    return spectrum(A, B, scaling, metric=metric, S_A=S_A, S_B=S_B, backend=backend)
