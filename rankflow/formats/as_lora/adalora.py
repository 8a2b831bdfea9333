"""PEFT's AdaLoRA read as plain LoRA, exactly: what it computes is B diag(E) A times one number."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.parts import PREFIX, Folded, Form, Lazy
from rankflow.formats.base import is_scale
from rankflow.plans.peft_patterns import alpha_for, exclude_modules, rank_config

_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|E|B)(?:\.[^.]+)?$")
_RANKNUM = re.compile(r"^(?P<module>.+)\.ranknum(?:\.[^.]+)?$")
_OWN = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
# Options that AdaLoRA's config inherits from LoRA's and its layers do not look at
_IGNORED = {"use_rslora": False, "use_dora": False, "lora_bias": False, "init_lora_weights": True}


def fold_adalora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Folded:
    """Return the LoRA that an AdaLoRA adapter equals.

    The scale of every module is lora_alpha / (ranknum + 1e-5) in float32. ranknum is `init_r` for ever: loading
    restores it, "exactly as the previous", whatever rank a module came down to (PEFT, `adalora/layer.py` `SVDLinear`
    and `adalora/model.py` `resize_modules_by_rank_pattern`), unless the file holds another, which PEFT loads. Masked
    directions, E = 0, are left out. E goes into A, in float32 where the file has half precision, so that nothing is
    rounded.

    A convolution looks like a linear layer here, since the file does not tell its kernel; PEFT refuses to load those.

    Raises:
        AdapterError: tensors and config that do not make an AdaLoRA adapter, or one that is zero everywhere.
    """
    alpha, init_r = (_number(config.get(field), field, path) for field in ("lora_alpha", "init_r"))
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    makers: dict[str, Callable[[], Tensor]] = {}
    ranknums: dict[str, float] = {}
    for key in tensors:
        if found := _KEY.match(key):
            if found["part"] in keys[found["module"]]:
                raise AdapterError(f"{path}: {found['module']} is there twice; save each adapter by itself")
            keys[found["module"]][found["part"]] = key
        elif found := _RANKNUM.match(key):
            t = tensors[key]
            ranknums[found["module"].removeprefix(PREFIX)] = _number(t.item() if t.numel() == 1 else t.shape, key, path)
        else:
            makers[key] = lambda key=key: tensors[key]

    def scaling(name: str) -> float:
        return float(torch.tensor(alpha) / (torch.tensor(ranknums.get(name, init_r)) + 1e-5))

    masks = config.get("rank_pattern") or {}
    if not isinstance(masks, dict):
        raise AdapterError(f"{path}: rank_pattern is not a mapping of names to masks")
    masks = {_module(name): mask for name, mask in masks.items()}
    ranks: dict[str, int] = {}
    for module, parts in keys.items():
        name = module.removeprefix(PREFIX)
        kept = _kept(name, parts, tensors, masks.get(name), path)
        ranks[name] = len(kept)
        if len(kept):
            makers |= _pair(module, parts, tensors, kept)
    if not any(ranks.values()):
        raise AdapterError(f"{path}: every singular value of this AdaLoRA adapter is 0 (never trained?)")
    present = {name: rank for name, rank in ranks.items() if rank}
    absent = [name for name, rank in ranks.items() if not rank]
    fields = rank_config(present, {name: alpha_for(scaling(name), rank, False) for name, rank in present.items()})
    new = {key: value for key, value in config.items() if key not in _OWN}
    new |= {"peft_type": "LORA", **_IGNORED, **fields._asdict()}
    new["exclude_modules"] = exclude_modules(config.get("exclude_modules"), list(present), absent)
    notes = ["AdaLoRA, read as the plain LoRA that it equals"]
    if absent:
        notes.append(f"without a direction that is not masked: {', '.join(absent)}")
    return Folded(new, Lazy(makers), notes)


def _number(value: Any, field: str, path: Path) -> float:
    if not is_scale(value):
        raise AdapterError(f"{path}: {field} is {str(value)[:80]}; it must be a positive number")
    return float(value)


def _module(key: str) -> str:
    """Return the module of a key of `rank_pattern`, which names the module's E."""
    return key.partition(".lora_E")[0].removeprefix(PREFIX)


def _kept(name: str, parts: Mapping[str, str], tensors: Mapping[str, Tensor], mask: Any, path: Path) -> Tensor:
    """Return the indices of the directions that are not masked ``[k]``."""
    if lacking := [part for part in "AEB" if part not in parts]:
        raise AdapterError(f"{path}: {name} has no lora_{lacking[0]}; the file is incomplete, save the adapter again")
    a, e, b = (tensors[parts[part]] for part in "AEB")
    if a.ndim != 2 or b.ndim != 2 or e.shape != (len(a), 1) or b.shape[1] != len(a):
        shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in zip("AEB", (a, e, b), strict=True))
        raise AdapterError(f"{path}: {name} has {shapes}, which are no factors of AdaLoRA; the file is damaged")
    if not all(t.is_floating_point() and t.itemsize > 1 for t in (a, e, b)):
        raise AdapterError(f"{path}: {name} has factors that are not floating point; the file is damaged")
    if mask is not None and (not isinstance(mask, list) or sum(map(bool, mask)) != len(a)):
        raise AdapterError(
            f"{path}: {name} has {len(a)} directions, but rank_pattern keeps another number; config and weights do not "
            "belong together"
        )
    return (e[:, 0] != 0).nonzero()[:, 0]


def _pair(
    module: str, parts: Mapping[str, str], tensors: Mapping[str, Tensor], kept: Tensor
) -> dict[str, Callable[[], Tensor]]:
    a, e, b = (parts[part] for part in "AEB")
    dtype = torch.promote_types(tensors[a].dtype, torch.float32)
    return {
        f"{module}.lora_A.weight": lambda: tensors[a][kept].to(dtype) * tensors[e][kept].to(dtype),
        f"{module}.lora_B.weight": lambda: tensors[b][:, kept].to(dtype),
    }


FORMS = (Form("ADALORA", fold_adalora),)
