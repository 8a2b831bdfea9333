"""PEFT's DeLoRA read as plain LoRA: B diag(lambda / (r |A_i| |B_i|)) A diag(w).

w are the norms of the base weight's columns, which the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import Factors, Folded, Form, Parts, folded


def fold_delora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that a DeLoRA adapter equals.

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
        parts.require(m, a.ndim == b.ndim == 2 and len(a) == b.shape[1] and bound.numel() == 1)
        parts.require(m, norms.shape == (a.shape[1],))
        made = lambda a=a, n=norms: wide(a) * wide(n)  # noqa: E731
        modules[m] = Factors(len(a), made, partial(columns, a, b, bound), max(a.numel(), b.numel()))
    return folded(config, modules, parts.rest, ["DeLoRA, read as the plain LoRA that it equals"], path)


FORMS = (Form("DELORA", fold_delora),)
