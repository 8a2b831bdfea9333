"""Squeeze a saved adapter to one target or several, and decompose every module once for all of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankflow.calibration.statistics import Statistics
from rankflow.compress.accept import Judge, accepted, contradictions, search
from rankflow.compress.cutting import Cutting
from rankflow.compress.metric import Metric
from rankflow.compress.output import Output, OutputOptions
from rankflow.compress.report import SqueezeReport, report
from rankflow.compress.residual import check_residual
from rankflow.compress.target import Target
from rankflow.deprecation import renamed_arguments
from rankflow.errors import ConfigError, naming
from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import SavedAdapter, Sketch
from rankflow.formats.io.atomic import is_plain
from rankflow.formats.io.outputs import Around, Reads, check_apart, check_harmless
from rankflow.formats.io.tensors import TENSOR_FILES
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.single_file.names import of_image_model
from rankflow.linalg.parallel import Pool, Progress, usable
from rankflow.linalg.spectrum import Gauge
from rankflow.linalg.svd import Backend, check_backend
from rankflow.plans.layout import Layout
from rankflow.serving.export import Fitting, fitting_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@renamed_arguments(statistics="calibration", kind="from_format", gate="accept", keep_tail="keep_residual")
def squeeze_each(
    src: str | Path,
    targets: Sequence[Target],
    outs: Sequence[str | Path] | None = None,
    *,
    metric: str = "weights",
    calibration: Statistics | str | Path | None = None,
    backend: Backend | None = None,
    device: str = "cpu",
    canonical: bool = False,
    accept: Judge | None = None,
    from_format: str | None = None,
    base: str | Path | None = None,
    fitting: Fitting | None = None,
    around: Around | None = None,
    progress: Progress | None = None,
    **output: Unpack[OutputOptions],
) -> list[SqueezeReport]:
    """Squeeze to several targets, and return a report for each; every module is decomposed once.

    With `canonical` modules that keep their rank have their directions sorted too. `fitting`: in place of
    the one that `output` and `base` come to. `around`: what the caller reads and writes besides, which outputs have to
    spare. `output`: the fields of `rankflow.Output`.

    With `accept` only the first of `targets`, which are uniform ranks and grow, that it accepts is written, to the one
    of `outs`.

    Raises:
        ConfigError, AdapterError: as `squeeze`; nothing is written if one of the targets or outputs cannot be had, or
            none is accepted.
    """
    began = time.perf_counter()
    if backend is not None:
        check_backend(backend)
    how = Output(**output)
    where, wanted = usable(device), _dtype(how.dtype)
    fitting = fitting or fitting_for(how.engine, to_format=how.to_format, base=base)
    adapter = fitting.open(src, from_format, _sketch(targets, backend))
    if adapter.sketch is not None:
        backend, used = "exact", adapter.sketch.backend  # of what the full matrices came down to
    else:
        used = backend = backend or "exact"
    suffixes = [fitting.suffix if target.keep else target.suffix for target in targets]
    suffixes = suffixes if accept is None else ["accepted"]
    paths = [Path(out) for out in outs] if outs is not None else [adapter.beside(suffix) for suffix in suffixes]
    if len({os.path.realpath(path) for path in paths}) < len(suffixes):
        raise ConfigError(f"{len(suffixes)} targets need as many different outputs")
    if fitting.pads and any(target.size is not None for target in targets):
        raise ConfigError(
            "size is for ranks that differ, and zeros fill all up to the largest; give target_rank instead"
        )
    residual = None if how.keep_residual is None else Path(how.keep_residual)
    if residual is not None:
        _check_residual_kept(adapter, len(suffixes), metric, how.gauge, fitting)
    there = [path for path in (*paths, residual) if path is not None and os.path.lexists(path)]
    if not how.dry_run:
        for path in paths:
            adapter.check_out(path, force=how.force)
        if residual is not None:
            check_residual(residual, paths[0], force=how.force)
        found = around or Around()
        measured = None if isinstance(calibration, Statistics) else calibration
        reads: Reads = {
            "its own source": adapter.path,
            "its statistics": measured,
            "its base": fitting.base or getattr(adapter, "config", {}).get("base_model_name_or_path"),
            **found.reads,
        }
        writes = [*paths, *([] if residual is None else [residual]), *found.writes]
        for path in writes:
            check_harmless(path, reads)
        check_apart(writes)
    layout = adapter.layout
    with naming(adapter.path, calibration):
        cut_in = Metric.of(metric, calibration, layout, targets)
    sized = Layout({n: replace(s, itemsize=(wanted or s).itemsize) for n, s in layout.items()})  # as it is written
    cutting = Cutting(adapter, cut_in, where, backend, how.gauge, wanted, canonical)
    once = len(suffixes) == 1 and (not how.dry_run or accept is not None)
    at_once = once and not cutting.batched and not targets[0].needs_spectra
    passes = (0 if at_once else 1) + (0 if how.dry_run else len(targets))
    pool = Pool(progress if accept is None else None, passes * len(layout))
    if not at_once:
        cutting.measure(pool)

    def produce(target: Target, ranks: Mapping[str, int], out: Path | None, residual: Path | None) -> SqueezeReport:
        if out is not None:
            cutting.write(pool, ranks, out, fitting, residual=residual, force=out in there)
        return report(
            layout,
            sized.with_ranks(ranks),
            cutting.spectra,
            cut_in.of_each,
            source=str(adapter.path),
            out=None if out is None else str(out),
            target=target.given,
            shortfall=target.shortfall(sized, cutting.spectra, ranks, adapter.overhead),
            backend=used,
            gauge=how.gauge,
            dtype=None if wanted is None else str(wanted).removeprefix("torch."),
            dry_run=how.dry_run,
            file_bytes_before=adapter.file_bytes,
            file_bytes_after=None if out is None or is_plain(out) else adapter.weights_in(out).stat().st_size,
            carried=dict(adapter.extra_tensors),
            copied=() if out is None else tuple(file.name for file in adapter.companions),
            notes=(*adapter.notes, *cut_in.notes, *fitting.notes(ranks)),
            seconds=time.perf_counter() - began,
            language_model=fitting.format_for(adapter.kind) in ("peft", FULL) and not of_image_model(layout),
        )

    with naming(adapter.path):
        chosen = [target.choose(sized, cutting.spectra, adapter.overhead) for target in targets]
        for ranks in chosen:
            fitting.ranks(ranks)  # refuses what cannot be, before the first is written
    ends = [None if how.dry_run else path for path in paths]
    if accept is None:
        return [produce(*each, residual) for each in zip(targets, chosen, ends, strict=True)]

    uniform = {target.target_rank or 0: (target, ranks) for target, ranks in zip(targets, chosen, strict=True)}

    def accepts(rank: int) -> bool:
        with tempfile.TemporaryDirectory(prefix="rankflow-") as folder:
            ending = adapter.beside("").suffix  # and nothing else of a name that a stranger gave
            candidate = Path(folder) / f"r{rank}{ending if ending in (*TENSOR_FILES, '.gguf') else ''}"
            produce(*uniform[rank], candidate, None)
            return accept(candidate)

    trials = search(list(uniform), accepts)
    target, ranks = uniform[accepted(trials)]
    found = produce(target, ranks, ends[0], residual)
    return [replace(found, trials=tuple(trials), notes=(*found.notes, *contradictions(trials)))]


def _sketch(targets: Sequence[Target], backend: Backend | None) -> Sketch:
    """Return how many directions of full matrices these targets need."""
    known = Sketch()
    highest = max((target.highest or known.rank for target in targets), default=known.rank)
    return Sketch(highest, backend or known.backend)


def _check_residual_kept(adapter: SavedAdapter, outputs: int, metric: str, gauge: Gauge, fitting: Fitting) -> None:
    """
    Raises:
        ConfigError: what is cut off would not put the source back, or there is nowhere to keep it.
    """
    if outputs > 1 or gauge != "balanced":
        raise ConfigError(
            "a residual is that of one output with directions sorted: give one target, and gauge 'balanced'"
        )
    if replace(fitting, base=None) != Fitting():
        raise ConfigError(
            "a residual belongs to an adapter that is not made for an engine or another format; leave it out"
        )
    if not isinstance(adapter, PeftAdapter):
        raise ConfigError(f"{adapter.path}: residuals are kept of adapters in PEFT's format, read and written, only")
    if metric != "weights":
        raise ConfigError(f"a cut by metric {metric!r} leaves nothing that puts it back; keep residuals with 'weights'")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return found
