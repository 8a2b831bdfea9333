"""Further kinds of PEFT's that equal a plain LoRA: shared or structured factors, scaled ones, and blocks.

VB-LoRA   A and B in pieces of one length, each a mixture of a few vectors of a bank that all modules share, weighed by
          the softmax of its largest logits; the file has these, or, of `save_only_topk_weights`, the weights but one.
Uni-LoRA  A and B are entries of one shared vector, picked by indices and scaled.
DeLoRA    B diag(lambda / (r |A_i| |B_i|)) A diag(w) with the norms of the base weight's columns w, which are saved.
MiSS      every r-th input is summed, then B (repeated, where init_weights is `mini`): A holds ones. How wide the
          inputs are is the base model's to tell. Where r is not below the shape's rank, DeltaW itself is one factor.
GraLoRA   k x k blocks of rank r / k each: together of rank r k. A plain LoRA beside it (`hybrid_r`) comes on top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.loha_lokr import dense, wide
from rankflow.formats.as_lora.parts import SHARED, Factors, Folded, Parts, folded, number, whole
from rankflow.formats.as_lora.vera import base_of, no_module, shapes_of


def fold_vblora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """
    Raises:
        AdapterError: tensors and config that make no VB-LoRA adapter.
    """
    stems = ("vblora_logits_A", "vblora_logits_B")
    names = [*(stem + end for stem in stems for end in ("_topk_indices", "_topk_weights", "")), "vblora_vector_bank"]
    parts = Parts(tensors, names, "VB-LoRA", path)
    topk = int(number(config, "topk", path))
    (bank,) = parts.of(SHARED, "vblora_vector_bank")
    parts.check(SHARED, bank.ndim == 2)

    def mixed(module: str, stem: str) -> Tensor:
        """``[*, *, vector length]``"""
        found = parts[module]
        if stem in found:
            logits, indices = wide(found[stem]).topk(topk, dim=-1)
            weights = logits.softmax(-1)
        else:
            indices, weights = parts.of(module, f"{stem}_topk_indices", f"{stem}_topk_weights")
            weights, indices = wide(weights), indices.long()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        return (weights[..., None] * wide(bank)[indices]).sum(-2)

    modules = {}
    for m in parts.modules:
        a, b = (_any(parts, m, stem) for stem in stems)
        parts.check(m, a.ndim == b.ndim == 3 and len(a) == b.shape[1] and _in_bank(parts[m], bank, topk))
        modules[m] = Factors(
            len(a),
            lambda m=m: mixed(m, stems[0]).flatten(1),
            lambda m=m: mixed(m, stems[1]).mT.flatten(0, 1),
            max(a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]) * bank.shape[1] * topk,
        )
    return folded(config, modules, parts.rest, ["VB-LoRA, read as the plain LoRA that it equals"], path)


def _any(parts: Parts, module: str, stem: str) -> Tensor:
    found = parts[module]
    return found[stem] if stem in found else parts.of(module, f"{stem}_topk_indices")[0]


def _in_bank(found: Mapping[str, Tensor], bank: Tensor, topk: int) -> bool:
    """Whether indices are those of vectors there are, and as many as are mixed."""
    for part, t in found.items():
        if part.endswith("_topk_indices"):
            if t.shape[-1] != topk or not _indices(t, len(bank)):
                return False
        elif part.endswith("_topk_weights"):
            if t.shape[-1] != topk - 1:
                return False
        elif t.shape[-1] != len(bank) or topk > len(bank):
            return False
    return True


def _indices(t: Tensor, count: int) -> bool:
    """Whether these are some, and of `count` things."""
    whole_numbers = not t.is_floating_point() and t.dtype != torch.bool and t.numel() > 0
    return whole_numbers and 0 <= int(t.min()) <= int(t.max()) < count


def fold_unilora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """
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
        parts.check(m, theta.ndim == 1 and all(_indices(i, len(theta)) for i in (ia, ib)))
        parts.check(m, ia.ndim == ib.ndim == 2 and ia.shape == sa.shape and ib.shape == sb.shape)
        parts.check(m, len(ia) == ib.shape[1])
        modules[m] = Factors(len(ia), partial(picked, ia, sa), partial(picked, ib, sb), max(ia.numel(), ib.numel()))
    return folded(config, modules, parts.rest, ["Uni-LoRA, read as the plain LoRA that it equals"], path)


def fold_delora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """
    Raises:
        AdapterError: tensors and config that make no DeLoRA adapter.
    """
    names = [f"delora_{part}" for part in ("A", "B", "lambda", "w_norm")]
    parts = Parts(tensors, names, "DeLoRA", path)

    def columns(a: Tensor, b: Tensor, bound: Tensor) -> Tensor:
        sizes = wide(a).norm(dim=1).clamp(min=1e-4) * wide(b).norm(dim=0).clamp(min=1e-4)
        return wide(b) * (wide(bound) / (len(a) * sizes))

    modules = {}
    for m in parts:
        a, b, bound, norms = parts.of(m, *names)
        parts.check(m, a.ndim == b.ndim == 2 and len(a) == b.shape[1] and bound.numel() == 1)
        parts.check(m, norms.shape == (a.shape[1],))
        made = lambda a=a, n=norms: wide(a) * wide(n)  # noqa: E731
        modules[m] = Factors(len(a), made, partial(columns, a, b, bound), max(a.numel(), b.numel()))
    return folded(config, modules, parts.rest, ["DeLoRA, read as the plain LoRA that it equals"], path)


def fold_miss(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> Folded:
    """
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
        parts.check(m, block.ndim == 2)
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
    """``[r, in]``: row i sums the inputs that are i modulo r."""
    r = len(block)
    return torch.eye(r, dtype=wide(block).dtype).repeat(1, -(-inside // r))[:, :inside]


def _columns(block: Tensor, times: int) -> Tensor:
    """``[out, r]``"""
    return wide(block).repeat(1, times).mT


def _miss_delta(block: Tensor, times: int, inside: int) -> Tensor:
    """``[out, in]``, the product of the two, which is a column of the latter for every input."""
    return _columns(block, times)[:, torch.arange(inside) % len(block)]


def fold_gralora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """
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
        parts.check(m, a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[2] == b.shape[1])
        k, n, r = a.shape
        parts.check(m, r % k == 0)
        if extra:
            parts.check(m, extra[0].shape == (hybrid, k * n) and extra[1].shape == (k * b.shape[2], hybrid))
        modules[m] = Factors(
            k * r + hybrid,
            partial(_block_rows, a, extra[:1]),
            partial(_block_columns, b, extra[1:]),
            (k * r + hybrid) * k * max(n, b.shape[2]),
            alpha / (r + hybrid),
        )
    return folded(config, modules, parts.rest, ["GraLoRA, read as the plain LoRA that it equals"], path)


def _block_rows(a: Tensor, more: list[Tensor]) -> Tensor:
    """A ``[k * r, in]``: the rows of input block i, r of them, see that block alone."""
    return torch.cat([torch.block_diag(*wide(a).mT), *map(wide, more)])


def _block_columns(b: Tensor, more: list[Tensor]) -> Tensor:
    """B ``[out, k * r]``: of the r directions of input block i, the j-th of k parts goes to output block j."""
    k, r, out = b.shape
    columns = wide(b).new_zeros(k, out, k, k, r // k)  # output block, output, input block, part, direction
    for j in range(k):
        columns[j, :, :, j] = wide(b)[j].unflatten(0, (k, r // k)).permute(2, 0, 1)
    return torch.cat([columns.reshape(k * out, k * r), *map(wide, more)], -1)
