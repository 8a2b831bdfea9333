"""Read LoRA with an r x r matrix between its factors, DeltaW = s B R A, as the plain LoRA with R A in place of A.

LoRA-XS (arXiv 2405.17604) and LoRA-SB (arXiv 2411.19557) train R alone and call it ``default_lora_latent_mapping``; the
PEFT of their time cut ``.default`` out of keys as it saved. NLoRA and SLoRA (arXiv 2502.14482) call it ``lora_N``. All
are saved as PEFT's LoRA, which does not know R: it would load A and B and leave R out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.parts import PREFIX, Folded, Form, Lazy, Make

_LATENT = re.compile(r"^(?P<module>.+?)(?:\.default_|_|\.)lora_latent_mapping(?:\.default)?\.weight$")
_MIDDLE = re.compile(r"^(?P<module>.+)\.lora_N(?:\.[^.]+)?(?:\.weight)?$")
_INITS = ("n_lora", "s_lora")  # of NLoRA's PEFT; its own would not load them


def has_middles(keys: Iterable[str]) -> bool:
    return any(_LATENT.match(key) or _MIDDLE.match(key) for key in keys)


def fold_middles(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Multiply R into A, in float32 or wider, and leave it in that, so that half precision is rounded once at most.

    Raises:
        AdapterError: an R without A, or of another rank; a convolution's, which is not defined.
    """
    found: dict[str, str] = {}
    for key in tensors:
        if match := _LATENT.match(key) or _MIDDLE.match(key):
            if match["module"] in found:
                raise AdapterError(f"{path}: {match['module']} has two matrices between A and B; save each by itself")
            found[match["module"]] = key
    makers: dict[str, Make] = {key: (lambda key=key: tensors[key]) for key in tensors if key not in found.values()}
    for module, middle in found.items():
        name = module.removeprefix(PREFIX)
        left, right = _factor(tensors, module, "A", path), _factor(tensors, module, "B", path)
        a, r = tensors[left], tensors[middle]
        floating = all(t.is_floating_point() and t.itemsize > 1 for t in (a, r, tensors[right]))
        if a.ndim != 2 or r.shape != (len(a), len(a)) or not floating:
            shapes = f"A {a.dtype} {list(a.shape)} and {middle} {r.dtype} {list(r.shape)}"
            raise AdapterError(f"{path}: {name} has {shapes}, which do not fit; the file is damaged")
        dtype = torch.promote_types(torch.promote_types(a.dtype, r.dtype), torch.float32)
        makers[left] = partial(_product, tensors, middle, left, dtype)
        makers[right] = partial(_cast, tensors, right, dtype)
    if plain := [key for key in tensors if re.search(r"\.lora_A\b", key) and _owner(key) not in found]:
        raise AdapterError(f"{path}: {plain[0]} has no matrix between A and B while others do; the file is incomplete")
    new = dict(config)
    if new.get("init_lora_weights") in _INITS:
        new["init_lora_weights"] = True
    kind = "LoRA-XS or LoRA-SB" if any(_LATENT.match(key) for key in found.values()) else "NLoRA or SLoRA"
    return Folded(new, Lazy(makers), [f"{kind}, read as the plain LoRA that it equals"])


def _product(tensors: Mapping[str, Tensor], left: str, right: str, dtype: torch.dtype) -> Tensor:
    return tensors[left].to(dtype) @ tensors[right].to(dtype)


def _cast(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    return tensors[key].to(dtype)


def _factor(tensors: Mapping[str, Tensor], module: str, part: str, path: Path) -> str:
    """Return the key of a module's A or B, with or without an adapter's name."""
    pattern = re.compile(rf"^{re.escape(module)}\.lora_{part}(?:\.[^.]+)?(?:\.weight)?$")
    found = next((key for key in tensors if pattern.match(key)), None)
    if found is None:
        name = module.removeprefix(PREFIX)
        raise AdapterError(f"{path}: {name} has a matrix between A and B but no lora_{part}; the file is incomplete")
    return found


def _owner(key: str) -> str:
    return key.partition(".lora_A")[0]


FORMS = (Form("LORA", fold_middles, applies=has_middles),)
