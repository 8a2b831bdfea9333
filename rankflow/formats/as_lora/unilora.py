"""PEFT's Uni-LoRA read as plain LoRA: A and B are entries of one shared vector, picked by indices and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import SHARED, Factors, Folded, Form, Parts, are_indices, folded


def fold_unilora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a Uni-LoRA adapter equals.

    Raises:
        AdapterError: tensors and config that make no Uni-LoRA adapter, or one saved without its indices.
    """
    names = [f"unilora_{part}" for part in ("indices_A", "indices_B", "scales_A", "scales_B", "theta_d")]
    parts = Parts(tensors, names, "Uni-LoRA", path)
    (theta,) = parts.of(SHARED, "unilora_theta_d")
    if len(parts) == 1:
        raise AdapterError(
            f"{path}: save_indices is off, so which entries make which module follows from the order of the model's "
            "modules, which is not in the file; save the adapter with save_indices=True"
        )

    def picked(indices: Tensor, scales: Tensor) -> Tensor:
        return wide(theta)[indices.long()] * wide(scales)

    modules = {}
    for m in parts.modules:
        ia, ib, sa, sb = parts.of(m, *names[:4])
        parts.require(m, theta.ndim == 1 and all(are_indices(i, len(theta)) for i in (ia, ib)))
        parts.require(m, ia.ndim == ib.ndim == 2 and ia.shape == sa.shape and ib.shape == sb.shape)
        parts.require(m, len(ia) == ib.shape[1])
        modules[m] = Factors(len(ia), partial(picked, ia, sa), partial(picked, ib, sb), max(ia.numel(), ib.numel()))
    return folded(config, modules, parts.rest, ["Uni-LoRA, read as the plain LoRA that it equals"], path)


FORMS = (Form("UNILORA", fold_unilora),)
