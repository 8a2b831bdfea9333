"""PEFT's MiSS read as plain LoRA: A sums every r-th input, and B is what is trained.

With `init_weights` "mini", B is repeated. How many inputs a module has stands in the base model alone. Where r is not
below the rank that the module's shape allows, DeltaW itself is one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.loha_lokr import dense, wide
from rankflow.formats.as_lora.parts import Factors, Folded, Form, Parts, folded
from rankflow.formats.as_lora.vera import base_of, no_module, shapes_of


def fold_miss(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> Folded:
    """Return the LoRA that a MiSS adapter equals.

    Raises:
        AdapterError: tensors and config that make no MiSS adapter, or one whose update is made of the base weight.
        ConfigError: the base model is needed and not at hand.
    """
    init = config.get("init_weights")
    if init == "bat":
        raise AdapterError(f"{path}: init_weights is 'bat', with which MiSS makes its update of the base weight")
    parts = Parts(tensors, ["miss_block"], "MiSS", path)
    blocks = {m: parts.of(m, "miss_block")[0] for m in parts}
    for m, block in blocks.items():
        parts.require(m, block.ndim == 2)
    shapes = shapes_of(blocks, base or base_of(config, path, "MiSS"), path)
    modules = {}
    for m, block in blocks.items():
        (out, inside), (r, given) = shapes[m], block.shape
        times = out // given if init == "mini" else 1
        if given * times != out:
            raise no_module(m, path)
        if r < min(out, inside):
            made = partial(_summing, block, inside), partial(_columns, block, times)
            modules[m] = Factors(r, *made, r * max(out, inside))
        else:  # A [r, in], which is not in the file, could be larger than any weight
            modules[m] = dense(partial(_miss_delta, block, times, inside), out, inside, (inside,), 1.0)
    return folded(config, modules, parts.rest, ["MiSS, read as the plain LoRA that it equals"], path)


def _summing(block: Tensor, inside: int) -> Tensor:
    """Return the ``[r, in]`` matrix whose row i sums the inputs that are i modulo r."""
    r = len(block)
    return torch.eye(r, dtype=wide(block).dtype).repeat(1, -(-inside // r))[:, :inside]


def _columns(block: Tensor, times: int) -> Tensor:
    """``[out, r]``"""
    return wide(block).repeat(1, times).mT


def _miss_delta(block: Tensor, times: int, inside: int) -> Tensor:
    """``[out, in]``, the product of the two, which is a column of the latter for every input."""
    return _columns(block, times)[:, torch.arange(inside) % len(block)]


FORMS = (Form("MISS", fold_miss, needs_base=True),)
