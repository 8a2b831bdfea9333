"""Inspect a saved adapter: the spectrum of every module, and how much of its rank it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rankflow.analysis.base_comparison import compare
from rankflow.analysis.intruders import Intruders
from rankflow.calibration.statistics import Statistics
from rankflow.compress.metric import Metric
from rankflow.compress.rules import above_noise
from rankflow.deprecation import renamed_arguments
from rankflow.errors import naming
from rankflow.formats.open import open_adapter
from rankflow.linalg.decompose import MetricName
from rankflow.linalg.parallel import Pool, Progress
from rankflow.linalg.spectrum import Spectrum
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.names import arrange
from rankflow.policies.metrics import averages_of
from rankflow.policies.observation import Signal

ENERGY_AT = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class InspectedSpectrum:
    """A module's spectrum in one metric.

    sigma: singular values, descending, root-sum-square over experts where there are several.
    rank_true: how many of them are more than rounding.
    rank_effective: exp of the entropy of sigma / sum(sigma), Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    rank_stable: sum(sigma^2) / sigma_1^2.
    energy: k -> share of sum(sigma^2) in the k largest.
    """

    sigma: tuple[float, ...]
    rank_true: int
    rank_effective: float
    rank_stable: float
    energy: dict[int, float]


@dataclass(frozen=True)
class InspectedModule:
    """One module, with the spectrum of DeltaW.

    name: the module's, in the base model. kind: the kind of layer, such as linear. rank: rows of A.
    in_features, out_features: what the layer takes and gives. scaling: the factor of B A in DeltaW.
    params: numbers in its factors. sigma: singular values of DeltaW, descending.
    rank_true: how many of them are more than rounding.
    rank_effective: exp of the entropy of sigma / sum(sigma). rank_stable: sum(sigma^2) / sigma_1^2.
    energy: k -> share of sum(sigma^2) in the k largest.
    noise_threshold: the largest singular value that noise of the size of the median one has; 0 where only the leading
    ones are known, as of a full update.
    rank_above_noise: how many are above it, at least 1 unless all are zero; the rank that `squeeze --auto` gives.
    tokens: over how many the direction that was measured least was; null without statistics of data.
    metrics: `outputs` and `loss` -> the spectrum in that metric, where it was measured enough.
    intruders: intruder dimensions, where there was a base to compare with.
    """

    name: str
    kind: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    params: int
    sigma: tuple[float, ...]
    rank_true: int
    rank_effective: float
    rank_stable: float
    energy: dict[int, float]
    noise_threshold: float = 0.0
    rank_above_noise: int = 0
    tokens: int | None = None
    metrics: dict[str, InspectedSpectrum] = field(default_factory=dict)
    intruders: Intruders | None = None


@dataclass(frozen=True)
class InspectedType:
    """Modules of one type, which differ in their layer numbers only.

    type: the modules' name without their layer. modules: how many there are.
    rank, rank_effective, rank_stable, rank_above_noise, energy: means over its modules.
    rank_min, rank_max: the smallest and the largest rank.
    energy_share: its part of the sum of sigma^2 over all modules of the adapter.
    intruders: intruder dimensions in all; null where none of its modules was compared with a base.
    """

    type: str
    modules: int
    rank: float
    rank_min: int
    rank_max: int
    rank_effective: float
    rank_stable: float
    rank_above_noise: float
    energy: dict[int, float]
    energy_share: float
    intruders: int | None = None


@dataclass(frozen=True)
class Inspection:
    """An adapter.

    source: the path that was read. modules: each with its spectrum. params: numbers in all factors.
    bytes: of the LoRA factors. file_bytes: of the file that holds them. carried: tensors that are no factors, which
    a squeeze keeps as they are, as name -> bytes.
    types: the modules summed up by type. notes: what there is to know besides.
    base: the model folder that intruders were looked for in, with cosines below `epsilon`.
    epsilon: a direction with a lower cosine to all of the base is an intruder; null where none were looked for.
    """

    source: str
    modules: tuple[InspectedModule, ...]
    params: int
    bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()
    carried: dict[str, int] = field(default_factory=dict)
    types: tuple[InspectedType, ...] = ()
    base: str | None = None
    epsilon: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of data that any module has a spectrum in."""
        return tuple(dict.fromkeys(metric for m in self.modules for metric in m.metrics))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@renamed_arguments(kind="from_format")
def inspect(
    src: str | Path,
    *,
    from_format: str | None = None,
    calibration: Statistics | str | Path | None = None,
    base: str | Path | None = None,
    top_k: int = 10,
    epsilon: float = 0.5,
    progress: Progress | None = None,
) -> Inspection:
    """Spectra of an adapter folder or file, as `squeeze` sees them.

    Args:
        from_format: as for `rankflow.squeeze`.
        calibration: statistics of data, or their file: spectra in the metrics that they serve come beside.
        base: folder of the base model, as for `rankflow.squeeze`; and intruder dimensions are counted against its
            weights (`rankflow.analysis.intruders`), among the first `top_k` of each module, by cosines below `epsilon`.

    Raises:
        AdapterError: no LoRA adapter, damaged, or of a variant that cannot be resized; no statistics file.
        ConfigError: the statistics are those of another adapter, or the base is no model's folder, or another model.
    """
    adapter = open_adapter(src, from_format, base)
    layout = adapter.layout
    statistics = Statistics.load(calibration) if isinstance(calibration, str | Path) else calibration
    weights = Metric.of("weights", None, layout, ())
    served = [] if statistics is None else _served(statistics)
    metrics: dict[MetricName, Metric] = {m: Metric.of(m, statistics, layout, ()) for m in served}

    def look(name: str) -> InspectedModule:
        slot = layout[name]
        of_module = name, *adapter.factors(name), slot.scaling
        return _module(
            name,
            slot,
            replace(weights.spectrum(*of_module, "exact"), outside=adapter.outside(name)),
            None if statistics is None else int(statistics.measured[name][Signal.MEASURED].min()),
            {m: _figures(y.spectrum(*of_module, "exact")) for m, y in metrics.items() if y.of_each[name] == m},
        )

    with naming(adapter.path):
        modules = tuple(Pool(None if base else progress, len(layout)).each(look, layout).values())
    notes = [*adapter.notes, *_unmeasured(metrics, layout)]
    if base is not None:
        against = compare(adapter, Path(base), top_k=top_k, epsilon=epsilon, progress=progress)
        modules = tuple(replace(m, intruders=against.found.get(m.name)) for m in modules)
        notes += against.notes
    return Inspection(
        source=str(adapter.path),
        modules=modules,
        params=layout.params,
        bytes=layout.bytes,
        file_bytes=adapter.file_bytes,
        notes=tuple(notes),
        carried=dict(adapter.extra_tensors),
        types=by_type(modules),
        base=None if base is None else str(base),
        epsilon=None if base is None else epsilon,
    )


def by_type(modules: Sequence[InspectedModule]) -> tuple[InspectedType, ...]:
    """Modules summed up by type, in order of first appearance."""
    named = {m.name: m for m in modules}
    members: dict[str, list[InspectedModule]] = {}
    for row in arrange(named):
        members.setdefault(row.label, []).append(named[row.name])
    total = math.fsum(s * s for m in modules for s in m.sigma)
    return tuple(_type(label, group, total) for label, group in members.items())


# -- parts ----------------------------------------------------------------------------------------------------------


def _served(statistics: Statistics) -> list[MetricName]:
    """The metrics of data that there are averages for."""
    known = {signal for averages in statistics.measured.values() for signal in averages}
    metrics: tuple[MetricName, ...] = ("outputs", "loss")
    return [metric for metric in metrics if averages_of(metric) <= known]


def _unmeasured(metrics: Mapping[MetricName, Metric], layout: Layout) -> list[str]:
    lacking = next((y.lacking for y in metrics.values()), ())
    few = f"{', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}"
    said = f"{len(lacking)} of {len(layout)} modules were measured over fewer tokens than they have directions: {few}"
    return [said] if lacking else []


def _figures(found: Spectrum) -> InspectedSpectrum:
    gains = found.gains
    sigma = gains.sqrt()
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    entropy = float(-torch.special.xlogy(share, share).sum())
    zero = not bool(sigma[0] > 0)
    return InspectedSpectrum(
        sigma=tuple(sigma.tolist()),
        rank_true=found.rank,
        rank_effective=0.0 if zero else math.exp(entropy),
        rank_stable=0.0 if zero else found.total / float(gains[0]),
        energy={k: found.energy(k) for k in ENERGY_AT},
    )


def _module(
    name: str, slot: Slot, found: Spectrum, tokens: int | None, metrics: dict[str, InspectedSpectrum]
) -> InspectedModule:
    edge, above = (0.0, found.rank) if found.outside else above_noise(found, slot)
    return InspectedModule(
        name=name,
        kind=slot.kind,
        rank=slot.rank,
        in_features=slot.in_features,
        out_features=slot.out_features,
        scaling=slot.scaling,
        params=slot.rank * slot.params_per_rank,
        **vars(_figures(found)),
        noise_threshold=edge,
        rank_above_noise=above,
        tokens=tokens,
        metrics=metrics,
    )


def _type(label: str, members: Sequence[InspectedModule], total: float) -> InspectedType:
    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(members)

    own = math.fsum(s * s for m in members for s in m.sigma)
    compared = [m.intruders for m in members if m.intruders is not None]
    return InspectedType(
        type=label,
        modules=len(members),
        rank=mean([m.rank for m in members]),
        rank_min=min(m.rank for m in members),
        rank_max=max(m.rank for m in members),
        rank_effective=mean([m.rank_effective for m in members]),
        rank_stable=mean([m.rank_stable for m in members]),
        rank_above_noise=mean([m.rank_above_noise for m in members]),
        energy={k: mean([m.energy[k] for m in members]) for k in members[0].energy},
        energy_share=own / total if total > 0 else 0.0,
        intruders=sum(len(i.found) for i in compared) if compared else None,
    )
