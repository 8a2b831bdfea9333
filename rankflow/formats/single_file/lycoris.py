"""What LyCORIS and others keep in single files beside plain LoRA: folded where that is exact, refused where not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.as_lora.loha_lokr import LOHA, LOKR, loha, lokr
from rankflow.formats.as_lora.parts import Lazy, Parts, check_size, positive

_BAKE = "merge it into its base model and extract a LoRA from the difference"
_REFUSED = {
    r"\.oft_(blocks|diag|R)|\.boft_": f"OFT, which rotates the base weight instead of adding to it; {_BAKE}",
    r"\.[ab][12]\.weight$": "GLoRA, whose update depends on the base weight; no LoRA without the base model is equal",
    r"\.on_input$": "IA3, which scales activations and has no rank",
    r"\.scalar$": "LoCon with a trained scalar, which some programs apply and others do not; save it with LyCORIS anew",
    r"\.lora_E(\.|$)": "AdaLoRA, whose scale is known from its adapter_config.json alone; put that beside the file",
    r"\.lora_embedding_[AB]": "a LoRA of embeddings, which only PEFT defines; keep it with its adapter_config.json",
    r"\.(lora_(route|router|gate)|moe_gate|lora_mixing)": "a mixture that weighs its parts by the input, so there is "
    "no one update to make smaller",
}


def refuse_variants(keys: Iterable[str], path: Path) -> None:
    """Refuse files of methods that no plain LoRA equals.

    Raises:
        AdapterError: a tensor belongs to something other than LoRA, LoCon or a plain difference.
    """
    for key in keys:
        for pattern, reason in _REFUSED.items():
            if re.search(pattern, key):
                raise AdapterError(f"{path}: {key} makes this {reason}")


def fold_products(tensors: Mapping[str, Tensor], path: Path) -> tuple[Mapping[str, Tensor], list[str]]:
    """The file with LoHa and LoKr modules as the LoRA that they equal (`rankflow.formats.as_lora.loha_lokr`), and notes
    on it.

    Their scale is alpha over the rank of a pair of factors, the first there is, as ComfyUI has it; 1 where all factors
    are whole or there is no alpha. A convolution without Tucker factors looks like a linear layer.

    Raises:
        AdapterError: tensors that do not fit each other, or an alpha that is no positive number.
    """
    notes = []
    for kind, names, pairs, fold in (
        ("LoHa", LOHA, ("hada_w1_b",), loha),
        ("LoKr", LOKR, ("lokr_w1_b", "lokr_w2_b"), lokr),
    ):
        if not any(key.rpartition(".")[2] in names for key in tensors):
            continue
        parts = Parts(tensors, names, kind, path)
        makers = dict(parts.rest)
        for stem in parts:
            rank = next((len(parts[stem][pair]) for pair in pairs if pair in parts[stem]), None)
            alpha = tensors.get(f"{stem}.alpha")
            scaling = 1.0
            if alpha is not None and rank is not None:
                value = alpha.item() if alpha.numel() == 1 else list(alpha.shape)
                scaling = positive(value, f"{stem}.alpha", path) / rank
            found = fold(parts, stem, scaling)
            check_size(stem, found, path)
            if f"{stem}.lora_down.weight" in makers:
                raise AdapterError(f"{path}: {stem} is there twice, as {kind} too; remove one")
            makers[f"{stem}.lora_down.weight"], makers[f"{stem}.lora_up.weight"] = found.a, found.b
            makers[f"{stem}.alpha"] = partial(torch.tensor, scaling * found.rank)
        tensors = Lazy(makers)
        notes.append(f"{kind}, read as the plain LoRA that it equals")
    return tensors, notes


def fold_tucker(mid: Tensor, down: Tensor) -> Tensor:
    """The plain A of LoCon's Tucker form, W = up mid down for every place of the kernel: ``[i, in, *kernel]``.

    `mid` is ``[i, j, *kernel]`` and `down` ``[j, in, 1, ..]`` (LyCORIS, `rebuild_tucker`), i = j = rank. In float32 or
    wider, rounded to `down`'s dtype.
    """
    wide = torch.promote_types(down.dtype, torch.float32)
    folded = torch.einsum("ij...,jc->ic...", mid.to(wide), down.flatten(1).to(wide))
    return folded.to(down.dtype)
