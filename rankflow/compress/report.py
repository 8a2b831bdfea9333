"""The report of a squeeze."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rankflow.compress.accept import Trial
from rankflow.linalg.decompose import MetricName
from rankflow.linalg.spectrum import Spectrum, relative
from rankflow.plans.layout import Layout
from rankflow.serving.engines import engine_named


@dataclass(frozen=True)
class SqueezedModule:
    """What became of one module.

    name: the module's, in the base model. rank_before, rank_after: rows of A.
    params_before, params_after: numbers in its factors. metric: what its cut preserves.
    energy_kept: the share of the sum of squared singular values, in the module's metric, that is left.
    error: the predicted norm of the change in that metric (`weights`, of DeltaW, Frobenius; `outputs`, of the layer's
    output, root mean square over tokens; `loss`, of the loss, likewise and to first order).
    relative_error: the error over the norm of what the adapter adds.
    weight_error: the relative error of DeltaW, whatever the metric.
    """

    name: str
    rank_before: int
    rank_after: int
    energy_kept: float
    error: float
    params_before: int
    params_after: int
    metric: MetricName
    relative_error: float
    weight_error: float


@dataclass(frozen=True)
class SqueezeReport:
    """What a squeeze did, or with `dry_run` would do.

    source: the path that was read. out: the path that was written. target: the options that say how much.
    metric: what was preserved; `weights` where no module was measured enough for what was asked for.
    backend: what computed the SVD. gauge: how the singular values are shared between A and B.
    dtype: of what was written; null for the source's. dry_run: whether nothing was written.
    modules: what became of each. energy_kept, error, relative_error: over all modules together that were cut in the
    metric. weight_error: the relative error of DeltaW over all modules.
    shortfall: by how much the energy may be below the best there is at this cost, at most.
    bytes_before, bytes_after: of the LoRA factors. file_bytes_before, file_bytes_after: of the files that hold them.
    copied: files beside the adapter. carried: tensors that are no factors, kept as they are, as name -> bytes.
    notes: what there is to know besides. trials: of ranks that were to be accepted. seconds: time it took.
    language_model: whether vLLM and its like may serve it.
    """

    source: str
    out: str | None
    target: dict[str, Any]
    metric: str
    backend: str
    gauge: str
    dtype: str | None
    dry_run: bool
    modules: tuple[SqueezedModule, ...]
    energy_kept: float
    error: float
    relative_error: float
    weight_error: float
    shortfall: float
    bytes_before: int
    bytes_after: int
    file_bytes_before: int | None = None
    file_bytes_after: int | None = None
    copied: tuple[str, ...] = ()
    carried: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0
    language_model: bool = True

    @property
    def params_before(self) -> int:
        return sum(m.params_before for m in self.modules)

    @property
    def params_after(self) -> int:
        return sum(m.params_after for m in self.modules)

    @property
    def ranks(self) -> dict[str, int]:
        return {m.name: m.rank_after for m in self.modules}

    @property
    def serving_bucket(self) -> int | None:
        """The smallest maximal rank that vLLM, which has but a few of them, can be set to for this adapter; None
        where there is none."""
        return engine_named("vllm").room(max(self.ranks.values(), default=0))

    def to_json(self) -> dict[str, Any]:
        more = ("params_before", "params_after", "serving_bucket")
        return {**asdict(self), **{name: getattr(self, name) for name in more}}


def report(
    before: Layout,
    after: Layout,
    spectra: Mapping[str, Spectrum],
    metrics: Mapping[str, MetricName],
    *,
    notes: tuple[str, ...] = (),
    **about: Any,
) -> SqueezeReport:
    """Return the report of a squeeze. `metrics`: module -> that of its spectrum."""
    modules, weights = [], []
    for name, slot in before.items():
        found, rank = spectra[name], after[name].rank
        whole = rank == slot.rank and not found.outside
        error = 0.0 if whole else found.error(rank)
        size = math.sqrt(found.total)
        changed, norm = error, size
        if metrics[name] != "weights":
            changed, norm = (abs(slot.scaling) * norm for norm in found.weight_change(rank))
            changed = 0.0 if rank == slot.rank else changed
        weights.append((changed, norm))
        module = SqueezedModule(
            name,
            rank_before=slot.rank,
            rank_after=rank,
            energy_kept=1.0 if whole else found.energy(rank),
            error=error,
            params_before=slot.rank * slot.params_per_rank,
            params_after=rank * slot.params_per_rank,
            metric=metrics[name],
            relative_error=relative(error, size),
            weight_error=relative(changed, norm),
        )
        modules.append(module)
    metric = next((m.metric for m in modules if m.metric != "weights"), "weights")
    total = math.fsum(spectra[m.name].total for m in modules if m.metric == metric)
    lost = math.fsum(m.error**2 for m in modules if m.metric == metric)
    return SqueezeReport(
        metric=metric,
        modules=tuple(modules),
        energy_kept=1 - lost / total if total > 0 else 1.0,
        error=math.sqrt(lost),
        relative_error=relative(math.sqrt(lost), math.sqrt(total)),
        weight_error=relative(*(math.hypot(*norms) for norms in zip(*weights, strict=True))),
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        notes=(*notes, *_notes(before, after, any(found.outside for found in spectra.values()))),
        **about,
    )


def _notes(before: Layout, after: Layout, sketched: bool) -> tuple[str, ...]:
    notes = []
    if before.ranks == after.ranks and not sketched:
        notes.append("no module is above its target, so every DeltaW is as it was")
    if left := [name for name, slot in after.items() if not slot.rank]:
        notes.append(f"left the adapter, being zero or not worth a direction: {', '.join(left)}")
    return tuple(notes)
