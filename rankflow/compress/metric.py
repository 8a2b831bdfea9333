"""Choose the metric that each module of an adapter is cut in, and its averages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankflow.calibration.statistics import Statistics
from rankflow.compress.target import Target
from rankflow.errors import ConfigError
from rankflow.linalg.decompose import MetricName
from rankflow.linalg.spectrum import Spectrum
from rankflow.linalg.svd import Backend
from rankflow.plans.layout import Layout
from rankflow.policies.metrics import averages_of, metric_of_each, spectrum_in


@dataclass(frozen=True)
class Metric:
    """The metric that an adapter is cut in.

    name: what was asked for. of_each: module -> the metric it is cut in, its weights where it was not measured enough.
    lacking: those modules.
    """

    name: MetricName
    of_each: Mapping[str, MetricName]
    lacking: tuple[str, ...] = ()
    statistics: Statistics | None = None

    @classmethod
    def of(
        cls, metric: str, statistics: Statistics | str | Path | None, layout: Layout, targets: Iterable[Target]
    ) -> Metric:
        """
        Raises:
            ConfigError: a metric without the statistics that it takes, with some it has no use for, with those of
                another adapter, or with a target that it has no meaning for.
            AdapterError: no statistics file.
        """
        if bool(averages_of(metric)) != (statistics is not None):
            raise ConfigError(
                f"metric {metric!r} needs statistics of data, which an adapter alone does not have: calibrate it "
                "(`rankflow calibrate`), or use metric 'weights'"
                if statistics is None
                else "metric 'weights' has no use for statistics of data; choose metric 'outputs' or 'loss'"
            )
        known: MetricName = metric  # type: ignore[assignment]  # averages_of has looked
        if statistics is None:
            return cls(known, dict.fromkeys(layout, known))
        found = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
        found.check(layout, metric)
        targets = list(targets)
        if any(target.auto for target in targets):
            raise ConfigError(f"auto knows the noise of weights only; with metric {metric!r} give another target")
        shared = any(target.shared for target in targets)
        metrics, lacking = metric_of_each(known, found.measured, layout.ranks, shared=shared)
        return cls(known, metrics, tuple(lacking), found)

    def spectrum(self, name: str, A: Tensor, B: Tensor, scaling: float, backend: Backend) -> Spectrum:
        """Return the spectrum of one module in its metric.

        Raises:
            ConfigError: the statistics are those of other factors.
        """
        if self.statistics is None:
            return spectrum_in("weights", A, B, scaling, {}, backend)
        self.statistics.check_factors(name, A, B)
        measured = {s: t.to(A.device) for s, t in self.statistics.measured[name].items()}
        return spectrum_in(self.of_each[name], A, B, scaling, measured, backend)

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.lacking:
            return ()
        few = ", ".join(itertools.islice(self.lacking, 3)) + (" and others" if len(self.lacking) > 3 else "")
        fallen = sum(metric != self.name for metric in self.of_each.values())
        return (
            f"{fallen} of {len(self.of_each)} modules are cut by their weights, as there are directions measured over "
            f"fewer tokens than their module has directions: in {few}",
        )
