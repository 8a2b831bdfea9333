"""PEFT's VB-LoRA read as plain LoRA.

A and B are cut into pieces of one length. Each piece is a mixture of a few vectors of a bank that all modules share,
weighed by the softmax of its largest logits. The file holds the logits or, with `save_only_topk_weights`, all weights
but the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import SHARED, Factors, Folded, Form, Parts, are_indices, folded, number


def fold_vblora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a VB-LoRA adapter equals.

    Raises:
        AdapterError: tensors and config that make no VB-LoRA adapter.
    """
    stems = ("vblora_logits_A", "vblora_logits_B")
    names = [*(stem + end for stem in stems for end in ("_topk_indices", "_topk_weights", "")), "vblora_vector_bank"]
    parts = Parts(tensors, names, "VB-LoRA", path)
    topk = int(number(config, "topk", path))
    (bank,) = parts.of(SHARED, "vblora_vector_bank")
    parts.require(SHARED, bank.ndim == 2)

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
        parts.require(m, a.ndim == b.ndim == 3 and len(a) == b.shape[1] and _in_bank(parts[m], bank, topk))
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
    """Return whether indices are valid for the bank, and as many as are mixed."""
    for part, t in found.items():
        if part.endswith("_topk_indices"):
            if t.shape[-1] != topk or not are_indices(t, len(bank)):
                return False
        elif part.endswith("_topk_weights"):
            if t.shape[-1] != topk - 1:
                return False
        elif t.shape[-1] != len(bank) or topk > len(bank):
            return False
    return True


FORMS = (Form("VBLORA", fold_vblora),)
