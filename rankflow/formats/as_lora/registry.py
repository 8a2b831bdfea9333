"""Which kinds of adapters PEFT saves are read as the plain LoRA that they equal, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats import as_lora
from rankflow.formats.added import ADDED
from rankflow.formats.as_lora.parts import Folded, Form
from rankflow.plugins import files_of

DENSE = ("RANDLORA",)  # read by `rankflow.formats.as_lora.dense`

_PROMPT = "which puts vectors before the input instead of changing weights"
_TURNS = "which multiplies the base weight instead of adding to it"
_OF_THE_BASE = "whose update is made of the base weight"
_SPARSE = "whose update is sparse, and of high rank"
_CONVERT = "peft's save_as_lora makes a LoRA of it on its base model"
_REFUSED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "which adds attention to learnt vectors, gated by the input",
    "IA3": "which scales activations, that is multiplies the base weight",
    "LN_TUNING": "which trains the norms themselves and has no rank",
    "BEFT": "which trains biases and has no rank",
    "TRAINABLE_TOKENS": "which trains rows of embeddings and has no factors",
    "OFT": _TURNS,
    "BOFT": _TURNS,
    "HRA": _TURNS,
    "ROAD": "which rotates and scales activations, that is multiplies the base weight",
    "OSF": "which trains the base weight's own singular directions",
    "PSOFT": f"{_TURNS}, in the base weight's leading directions; {_CONVERT}",
    "FROD": _OF_THE_BASE,
    "GLORA": _OF_THE_BASE,
    "HIRA": f"{_OF_THE_BASE}, entry by entry, and so of full rank",
    "DEFT": _OF_THE_BASE,
    "PEANUT": f"{_OF_THE_BASE}, through a small network",
    "ADAMSS": f"{_OF_THE_BASE}'s own singular directions",
    "SHADOW": "which is a network of its own beside the model",
    "XLORA": "which mixes adapters by the input, so there is no one update to make smaller",
    "POLY": "which mixes its parts by the task, so there is no one update to make smaller",
    "LILY": "which mixes its shared parts by the input, so there is no one update to make smaller",
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "C3A": f"whose update is made of circulant blocks, and of high rank; {_CONVERT}",
    "TINYLORA": f"whose file does not tell which module has which vector; {_CONVERT}",
    "FOURIERFT": f"whose update is the Fourier transform of a sparse matrix; {_CONVERT}",
    "WAVEFT": f"whose update is the wavelet transform of a sparse matrix; {_CONVERT}",
}


@cache
def forms() -> tuple[Form, ...]:
    """Every form that a file of this folder reads."""
    return tuple(form for file in files_of(as_lora) for form in getattr(file, "FORMS", ()))


def known_types() -> list[str]:
    """PEFT types that are read, or refused with a reason."""
    return [*(form.peft_type for form in forms()), *DENSE, *_REFUSED]


def needs_base(peft_type: str | None) -> bool:
    """Whether an adapter of this type says less than all in its file."""
    return peft_type in DENSE or any(form.needs_base for form in _forms_of(str(peft_type)))


def _forms_of(peft_type: str) -> list[Form]:
    if (name := peft_type.lower()) in ADDED.names() and isinstance(added := ADDED.load(name), Form):
        return [added]
    return [form for form in forms() if form.peft_type == peft_type]


def plain(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> Folded | None:
    """Return the plain LoRA that an adapter of another kind equals, or None if it is LoRA already.

    Args:
        path: for messages.
        base: the base model's folder, for what is not in the file.

    Raises:
        AdapterError: a kind that no LoRA equals, with the reason, or a damaged one.
        ConfigError: the base model is needed and not at hand.
    """
    kind = str(config.get("peft_type"))
    form = next((form for form in _forms_of(kind) if form.applies(tensors)), None)
    if form is not None:
        return form.fold(config, tensors, path, *([base] if form.needs_base else []))
    if kind in _REFUSED:
        raise AdapterError(f"{path}: is {kind}, {_REFUSED[kind]}; it cannot be read as a LoRA")
    return None
