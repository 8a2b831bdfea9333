"""Adapters that are not training: squeeze a saved one to a smaller rank, or look into it. No base model is needed.

rankflow.squeeze("out/checkpoint-500", target_rank=8)        # writes out/checkpoint-500-r8
rankflow.squeeze("out/checkpoint-500", "small", energy=0.9)  # ranks that keep 90 % of every module's energy
rankflow.inspect("out/checkpoint-500").modules[0].rank_effective
"""

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
from rankflow.compress.report import SqueezeReport, report
from rankflow.compress.residual import check_residual
from rankflow.compress.target import Goal, Target, every_rank
from rankflow.deprecation import renamed_arguments
from rankflow.errors import ConfigError, naming
from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import SavedAdapter, Sketch
from rankflow.formats.io.atomic import is_plain
from rankflow.formats.io.outputs import Around, Reads, check_apart, check_harmless
from rankflow.formats.io.tensors import TENSOR_FILES
from rankflow.formats.open import open_adapter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.single_file.names import of_image_model
from rankflow.linalg.parallel import Pool, Progress, usable
from rankflow.linalg.spectrum import Gauge
from rankflow.linalg.svd import Backend, check_backend
from rankflow.plans.layout import Layout
from rankflow.serving.export import Fitting, fitting_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SqueezeReport", "Target", "canonicalize", "pad", "squeeze", "squeeze_each"]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@renamed_arguments(
    statistics="calibration", kind="from_format", to="to_format", gate="accept", keep_tail="keep_residual"
)
def squeeze(
    src: str | Path,
    out: str | Path | None = None,
    *,
    metric: str = "weights",
    calibration: Statistics | str | Path | None = None,
    backend: Backend | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    gauge: Gauge = "balanced",
    force: bool = False,
    dry_run: bool = False,
    keep_residual: str | Path | None = None,
    accept: Judge | None = None,
    from_format: str | None = None,
    to_format: str | None = None,
    engine: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
    **target: Unpack[Goal],
) -> SqueezeReport:
    """The best adapter of smaller rank, from a saved one; the source is only read.

    Every module becomes the truncated SVD of its DeltaW (LoRA-Squeeze, arXiv 2602.10993, computed exactly from r x r
    matrices), with its scaling unchanged. See `rankflow.Target` for the targets, of which one is to be given. Modules
    at or below their new rank stay as they are, bit for bit. A uniform `target_rank` keeps directions that are zero,
    so that a fresh adapter (B = 0) still learns afterwards; targets that look at singular values drop them.

    Args:
        src: adapter folder, its `.safetensors` or `.bin` file with `adapter_config.json` beside it, or a single file
            as kohya's sd-scripts, LyCORIS, ComfyUI or diffusers write it; or the folder of a whole fine-tuned model,
            of which the difference from `base` is taken, up to the highest rank asked for, or 64 where none is.
        out: folder or file to write; `<src>-r8` and the like beside the source if left out.
        metric: what is preserved: `weights`, or what data make of them: `outputs` of layers, or the `loss`.
        calibration: statistics of data, for the latter two: a `Statistics` of this very adapter, or its file.
        backend: `exact`, or a randomised SVD of the full update, as the paper's (`rankflow.linalg.svd`). Left out, it
        is
            `exact` from factors, and `torch` where the update comes as a full matrix.
        dtype: of the factors written (`float32`, `bfloat16`, `float16`); that of the source if left out.
        gauge: `balanced` splits singular values evenly between A and B; `keep` keeps |A| / |B|.
        force: replace `out` if it is an adapter.
        dry_run: compute the report and write nothing.
        keep_residual: a `.safetensors` file for what is cut off, with which `rankflow.expand` goes back; `out` and it
            appear together or not at all, but for what `rankflow.formats.io.atomic.together` says.
        accept: in place of a target: takes the path of a candidate and says whether it is good enough; the smallest
            uniform rank that it accepts is written, to `<src>-accepted` if `out` is left out. Found by bisection.
        from_format: the source's format (`peft`, `kohya`, `comfyui`, `diffusers`, `full`); told from its tensors if
            left out.
        to_format: the output's format (`peft`, `kohya`, `diffusers`, `gguf`); the source's if left out.
        engine: what is to load it (`rankflow.serving.engines`): written so that it is scaled as it should be,
        padded
            with zeros to one rank where the engine wants that.
        base: the base model's folder: what a whole model is compared with, whose shapes some adapters need, and whose
            config.json `gguf` reads; the one the adapter names if left out.
        target: the fields of `rankflow.Target`.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: a source that is no LoRA adapter, damaged, or of a variant that cannot be resized.
    """
    (found,) = squeeze_each(
        src,
        [Target(**target)] if accept is None else every_rank(open_adapter(src, from_format, base).layout, **target),
        None if out is None else [out],
        metric=metric,
        calibration=calibration,
        backend=backend,
        dtype=dtype,
        device=device,
        gauge=gauge,
        force=force,
        dry_run=dry_run,
        keep_residual=keep_residual,
        accept=accept,
        from_format=from_format,
        fitting=fitting_for(engine, to_format=to_format, base=base),
        progress=progress,
    )
    return found


@renamed_arguments(kind="from_format", to="to_format")
def pad(
    src: str | Path,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    engine: str | None = None,
    force: bool = False,
    from_format: str | None = None,
    to_format: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> SqueezeReport:
    """The same adapter with zeros to one rank in every module, in PEFT's format also with alpha equal to it and no
    patterns; and whatever else `engine` wants. DeltaW stays as it is.

    Raises:
        ConfigError, AdapterError: as `squeeze`.
    """
    if rank is None and engine is None:
        raise ConfigError("padding needs a rank or an engine; give --rank or --engine")
    outs = None if out is None else [out]
    fitting = fitting_for(engine, rank=rank, to_format=to_format, base=base)
    (found,) = squeeze_each(
        src, [Target(keep=True)], outs, force=force, from_format=from_format, fitting=fitting, progress=progress
    )
    return found


@renamed_arguments(statistics="calibration", kind="from_format", gate="accept", keep_tail="keep_residual")
def squeeze_each(
    src: str | Path,
    targets: Sequence[Target],
    outs: Sequence[str | Path] | None = None,
    *,
    metric: str = "weights",
    calibration: Statistics | str | Path | None = None,
    backend: Backend | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    gauge: Gauge = "balanced",
    force: bool = False,
    dry_run: bool = False,
    keep_residual: str | Path | None = None,
    canonical: bool = False,
    accept: Judge | None = None,
    from_format: str | None = None,
    fitting: Fitting | None = None,
    around: Around | None = None,
    progress: Progress | None = None,
) -> list[SqueezeReport]:
    """`squeeze` to several targets, every module decomposed once; one output and one report for each.

    With `canonical` modules that keep their rank have their directions sorted too. `fitting`: how outputs are written.
    `around`: what the caller reads and writes besides, which outputs have to spare.
    With `accept` only the first of `targets`, which are uniform ranks and grow, that it accepts is written, to the one
    of `outs`.

    Raises:
        ConfigError, AdapterError: as `squeeze`; nothing is written if one of the targets or outputs cannot be had, or
            none is accepted.
    """
    began = time.perf_counter()
    if backend is not None:
        check_backend(backend)
    where, wanted = usable(device), _dtype(dtype)
    fitting = fitting or Fitting()
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
    residual = None if keep_residual is None else Path(keep_residual)
    if residual is not None:
        _check_residual_kept(adapter, len(suffixes), metric, gauge, fitting)
    there = [path for path in (*paths, residual) if path is not None and os.path.lexists(path)]
    if not dry_run:
        for path in paths:
            adapter.check_out(path, force=force)
        if residual is not None:
            check_residual(residual, paths[0], force=force)
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
    cutting = Cutting(adapter, cut_in, where, backend, gauge, wanted, canonical)
    once = len(suffixes) == 1 and (not dry_run or accept is not None)
    at_once = once and not cutting.batched and not targets[0].needs_spectra
    passes = (0 if at_once else 1) + (0 if dry_run else len(targets))
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
            gauge=gauge,
            dtype=None if wanted is None else str(wanted).removeprefix("torch."),
            dry_run=dry_run,
            file_bytes_before=adapter.file_bytes,
            file_bytes_after=None if out is None or is_plain(out) else adapter.weights_in(out).stat().st_size,
            carried=dict(adapter.extra_tensors),
            copied=() if out is None else tuple(file.name for file in adapter.companions),
            notes=(*adapter.notes, *cut_in.notes, *fitting.notes(ranks)),
            seconds=time.perf_counter() - began,
            language_model=adapter.kind in ("peft", FULL) and not of_image_model(layout),
        )

    with naming(adapter.path):
        chosen = [target.choose(sized, cutting.spectra, adapter.overhead) for target in targets]
        for ranks in chosen:
            fitting.ranks(ranks)  # refuses what cannot be, before the first is written
    ends = [None if dry_run else path for path in paths]
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


@renamed_arguments(kind="from_format")
def canonicalize(
    src: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    from_format: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> SqueezeReport:
    """The same adapter with the directions of every module sorted by what they add: whatever number of them is taken
    from the front is the best adapter of that rank.

    Args:
        from_format: as for `squeeze`.
        base: the base model's folder, for adapters that say less than all in their file.

    Raises:
        ConfigError, AdapterError: as `squeeze`.
    """
    fitting = fitting_for(None, base=base)
    (found,) = squeeze_each(
        src,
        [Target(keep=True)],
        [out],
        force=force,
        canonical=True,
        from_format=from_format,
        fitting=fitting,
        progress=progress,
    )
    return found


def _sketch(targets: Sequence[Target], backend: Backend | None) -> Sketch:
    """How far full matrices have to be looked at for these targets."""
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
