"""PEFT's RandLoRA, whose update is of full rank: random bases that all modules share, scaled by vectors.

DeltaW = alpha / r * B A with B ``[larger side, bases * r]`` and A ``[r * bases, smaller side]``, flattened so, A scaled
by lambda and gamma; transposed where a module has more inputs than outputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.dense import Delta, DenseAdapter
from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import PREFIX, SHARED, Parts, common, number
from rankflow.formats.as_lora.vera import base_of, shapes_of
from rankflow.formats.base import Sketch
from rankflow.formats.io.links import check_own
from rankflow.formats.io.tensors import open_tensors
from rankflow.formats.peft_config import CONFIG, load_config


def dense_form(path: Path, base: Path | None, sketch: Sketch) -> DenseAdapter | None:
    """Return the adapter of a folder, or of its file of tensors, if PEFT's config beside it is RandLoRA's, else None.

    Raises:
        AdapterError: tensors and config that make no RandLoRA adapter, or one without its random bases.
        ConfigError: the base model, of which shapes are needed, is not at hand.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        return None
    config = load_config(folder / CONFIG)
    if config.get("peft_type") != "RANDLORA":
        return None
    found = (
        [path]
        if path.is_file()
        else [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    )
    if not found:
        raise AdapterError(f"{path}: has {CONFIG} but no weights; the adapter was not saved whole")
    for file in (folder / CONFIG, *(found if found[0] != path else ())):
        check_own(file, folder)
    path = found[0]
    tensors, _ = open_tensors(path)
    parts = Parts(tensors, [f"randlora_{part}" for part in ("lambda", "gamma", "A", "B")], "RandLoRA", path)
    rank, alpha = int(number(config, "r", path)), number(config, "randlora_alpha", path)
    names = parts.modules
    if parts.rest:
        raise AdapterError(f"{path}: has more than RandLoRA's tensors ({next(iter(parts.rest))}), which would be lost")
    if SHARED not in parts:
        raise AdapterError(
            f"{path}: save_projection is off, so the random bases are not in the file; save the adapter with them"
        )
    A, B = parts.of(SHARED, "randlora_A", "randlora_B")  # [r, 1, smaller side], [larger side, bases, r]
    parts.require(SHARED, A.ndim == B.ndim == 3 and len(A) == B.shape[2] == rank and A.shape[1] == 1)
    weights = shapes_of(names, base or base_of(config, path, "RandLoRA"), path)
    deltas = {}
    for m in names:
        scales, gamma = parts.of(m, "randlora_lambda", "randlora_gamma")
        shape = weights[m][::-1] if config.get("fan_in_fan_out") else weights[m]
        small, large = min(shape), max(shape)
        bases = -(-small // rank)
        parts.require(m, scales.shape == (rank, bases) and gamma.shape == (bases, small))
        parts.require(SHARED, A.shape[2] >= small and len(B) >= large and B.shape[1] >= bases)

        def whole(scales=scales, gamma=gamma, small=small, large=large, bases=bases, flip=small != shape[1]) -> Tensor:
            rows = wide(scales)[:, :, None] * wide(A)[:, :, :small] * wide(gamma)[None]  # [r, bases, small]
            columns = wide(B)[:large, :bases]  # [large, bases, r]
            dtype = torch.promote_types(rows.dtype, columns.dtype)
            update = alpha / rank * columns.flatten(1).to(dtype) @ rows.flatten(0, 1).to(dtype)
            return update.mT if flip else update

        deltas[m.removeprefix(PREFIX)] = Delta(shape[0], shape[1:], scales.dtype, whole)
    about = {**common(config), "target_modules": sorted(deltas)}
    return DenseAdapter("RandLoRA", folder, deltas, sketch, file_bytes=path.stat().st_size, about=about)
