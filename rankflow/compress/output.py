"""How squeezed adapters are written, and whether what is there already is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypedDict

from rankflow.compress.option import option

if TYPE_CHECKING:
    import torch

    from rankflow.linalg.spectrum import Gauge


class OutputOptions(TypedDict, total=False):
    """The fields of `Output`, as keyword arguments."""

    dtype: str | torch.dtype | None
    to_format: str | None
    engine: str | None
    keep_residual: str | Path | None
    gauge: Gauge
    dry_run: bool
    force: bool


@dataclass(frozen=True)
class Output:
    """How squeezed adapters are written.

    dtype: of the factors written (`float32`, `bfloat16`, `float16`); that of the source if left out.
    to_format: `peft`, `kohya`, `diffusers` or `gguf`; the source's if left out.
    engine: what is to load it (`rankflow.serving.engines`): written so that it is scaled as it should be, padded with
    zeros to one rank where the engine wants that.
    keep_residual: a `.safetensors` file for what is cut off, with which `rankflow.expand` goes back; the output and it
    appear together or not at all, but for what `rankflow.formats.io.atomic.together` says.
    gauge: `balanced` splits singular values evenly between A and B; `keep` keeps |A| / |B|.
    dry_run: compute the report and write nothing. force: replace an output that is an adapter already.
    """

    panel: ClassVar = "Out"

    engine: str | None = option(
        None,
        "What is to load it: vllm, sglang, lorax, tensorrt-llm, llamacpp, diffusers, comfyui or peft.",
        metavar="ENGINE",
    )
    to_format: str | None = option(None, "Write peft, kohya, diffusers or gguf; as the source is.", metavar="FORMAT")
    dtype: str | torch.dtype | None = option(
        None, "float32, bfloat16 or float16; as the source has it if left out.", metavar="TYPE"
    )
    keep_residual: str | Path | None = option(
        None, "Keep what is cut off; `rankflow expand` puts it back.", metavar="FILE", type=Path
    )
    gauge: Gauge = "balanced"
    dry_run: bool = option(False, "Say what would come out and write nothing.")
    force: bool = option(False, "Replace outputs that are there already.")
