"""PEFT's GraLoRA read as plain LoRA: k x k blocks of rank r / k each are together of rank r k.

A plain LoRA beside the blocks (`hybrid_r`) comes on top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import Factors, Folded, Form, Parts, folded, number, whole


def fold_gralora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a GraLoRA adapter equals.

    Raises:
        AdapterError: tensors and config that make no GraLoRA adapter.
    """
    names = [f"gralora_{part}" for part in ("A", "B", "A_general", "B_general")]
    renamed = {re.sub(r"(_general)(?:\.[^.]+)?\.weight$", r"\1", key): key for key in tensors}
    parts = Parts({new: tensors[old] for new, old in renamed.items()}, names, "GraLoRA", path)
    alpha, hybrid = number(config, "alpha", path), whole(config, "hybrid_r", path)
    modules = {}
    for m in parts:
        a, b = parts.of(m, *names[:2])  # [k, in / k, r] and [k, r, out / k]
        extra = parts.of(m, *names[2:]) if hybrid else []
        parts.require(m, a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[2] == b.shape[1])
        k, n, r = a.shape
        parts.require(m, r % k == 0)
        if extra:
            parts.require(m, extra[0].shape == (hybrid, k * n) and extra[1].shape == (k * b.shape[2], hybrid))
        modules[m] = Factors(
            k * r + hybrid,
            partial(_block_rows, a, extra[:1]),
            partial(_block_columns, b, extra[1:]),
            (k * r + hybrid) * k * max(n, b.shape[2]),
            alpha / (r + hybrid),
        )
    return folded(config, modules, parts.rest, ["GraLoRA, read as the plain LoRA that it equals"], path)


def _block_rows(a: Tensor, more: list[Tensor]) -> Tensor:
    """Return A ``[k * r, in]``, in which the r rows of input block i see that block alone."""
    return torch.cat([torch.block_diag(*wide(a).mT), *map(wide, more)])


def _block_columns(b: Tensor, more: list[Tensor]) -> Tensor:
    """Return B ``[out, k * r]``. Of the r directions of input block i, the j-th of k parts goes to output block j."""
    k, r, out = b.shape
    columns = wide(b).new_zeros(k, out, k, k, r // k)  # output block, output, input block, part, direction
    for j in range(k):
        columns[j, :, :, j] = wide(b)[j].unflatten(0, (k, r // k)).permute(2, 0, 1)
    return torch.cat([columns.reshape(k * out, k * r), *map(wide, more)], -1)


FORMS = (Form("GRALORA", fold_gralora),)
