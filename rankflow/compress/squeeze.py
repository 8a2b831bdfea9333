"""Squeeze a saved adapter to a smaller rank, pad it, or sort its directions. No base model is needed.

rankflow.squeeze("out/checkpoint-500", target_rank=8)        # writes out/checkpoint-500-r8
rankflow.squeeze("out/checkpoint-500", "small", energy=0.9)  # ranks that keep 90 % of every module's energy
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankflow.calibration.statistics import Statistics
from rankflow.compress.accept import Judge
from rankflow.compress.each import squeeze_each
from rankflow.compress.output import Output, OutputOptions
from rankflow.compress.report import SqueezeReport
from rankflow.compress.target import Goal, Target, every_rank
from rankflow.deprecation import renamed_arguments
from rankflow.errors import ConfigError
from rankflow.formats.open import open_adapter
from rankflow.linalg.parallel import Progress
from rankflow.linalg.svd import Backend
from rankflow.serving.export import fitting_for

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SqueezeOptions(Goal, OutputOptions, total=False):
    """The fields of `Target` and `Output`, as keyword arguments."""


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
    device: str = "cpu",
    accept: Judge | None = None,
    from_format: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[SqueezeOptions],
) -> SqueezeReport:
    """Write the best adapter of smaller rank, from a saved one that is only read, and return what came of it.

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
            is `exact` from factors, and `torch` where the update comes as a full matrix.
        device: where to compute, `cpu` or `cuda:0` say.
        accept: in place of a target: takes the path of a candidate and says whether it is good enough; the smallest
            uniform rank that it accepts is written, to `<src>-accepted` if `out` is left out. Found by bisection.
        from_format: the source's format (`peft`, `kohya`, `comfyui`, `diffusers`, `full`); told from its tensors if
            left out.
        base: the base model's folder: what a whole model is compared with, whose shapes some adapters need, and whose
            config.json `gguf` reads; the one the adapter names if left out.
        options: the fields of `rankflow.Target` and of `rankflow.Output`.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: a source that is no LoRA adapter, damaged, or of a variant that cannot be resized.
    """
    written = {field.name for field in fields(Output)}
    output: dict[str, Any] = {name: value for name, value in options.items() if name in written}
    goal: dict[str, Any] = {name: value for name, value in options.items() if name not in written}
    (found,) = squeeze_each(
        src,
        [Target(**goal)] if accept is None else every_rank(open_adapter(src, from_format, base).layout, **goal),
        None if out is None else [out],
        metric=metric,
        calibration=calibration,
        backend=backend,
        device=device,
        accept=accept,
        from_format=from_format,
        base=base,
        progress=progress,
        **output,
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
    """Write the same adapter with zeros up to one rank in every module; DeltaW stays as it is.

    In PEFT's format also with alpha equal to the rank and no patterns; and with whatever else `engine` wants.

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
    """Write the same adapter with the directions of every module sorted by what they add.

    Whatever number of directions is taken from the front is the best adapter of that rank.

    Args:
        from_format: as for `squeeze`.
        base: the base model's folder, for adapters that say less than all in their file.

    Raises:
        ConfigError, AdapterError: as `squeeze`.
    """
    (found,) = squeeze_each(
        src,
        [Target(keep=True)],
        [out],
        canonical=True,
        from_format=from_format,
        base=base,
        progress=progress,
        force=force,
    )
    return found
