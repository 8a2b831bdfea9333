"""Subtract a base model from its full fine-tune, as updates of linear layers and convolutions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.as_lora.dense import Delta, DenseAdapter
from rankflow.formats.base import Sketch
from rankflow.formats.io.models import open_model
from rankflow.formats.io.strict_json import read_text, strict_object

KIND = "full"

_EMBEDDING = re.compile(r"(^|[._])(w[tp]e|shared|\w*emb(ed|edding|eddings)?\w*)(\.|$)")
# Models of transformers whose layers are its Conv1D, which keeps weights as [in, out], and what these are called
_TRANSPOSED = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_MOST_NAMES = 4


def full_minus_base(full: Path, base: Path | None, sketch: Sketch) -> DenseAdapter:
    """Return the updates that turn the base into the fine-tune, one for every linear weight that differs.

    Names are the fine-tune's, which is the class of model that the LoRA is for. What differs and no LoRA holds (norms,
    biases, embeddings, heads that only one of them has) is named in a note. The two may have been saved with and
    without the name of the inner model before all others.

    Raises:
        ConfigError: no base given, or no model there.
        AdapterError: the two are not of one shape, are quantised, or do not differ in a linear weight.
    """
    if base is None:
        raise ConfigError(
            f"{full}: a whole model and no adapter; to squeeze what it adds to its base, give that: --base"
        )
    ours, theirs = open_model(full), open_model(base)
    prefix = _renaming(ours, theirs)
    transposed = _model_type(full) in _TRANSPOSED
    deltas: dict[str, Delta] = {}
    left: list[str] = []
    alone: list[str] = []
    for key, t in ours.items():
        there = theirs.get(_renamed(key, prefix))
        if there is None:
            alone.append(key)
            continue
        if t.shape != there.shape:
            if _adaptable(key, t) or not _EMBEDDING.search(key):
                raise AdapterError(
                    f"{full}: {key} is {list(t.shape)} and {list(there.shape)} in {base}; these are different models"
                )
            left.append(key)
            continue
        if torch.equal(t, there.to(t.dtype)):
            continue
        if not _adaptable(key, t):
            left.append(key)
            continue
        if not (t.is_floating_point() and there.is_floating_point() and min(t.itemsize, there.itemsize) > 1):
            raise AdapterError(f"{full}: {key} is quantised ({t.dtype}, {there.dtype}); give models of 16 bits or more")
        flip = transposed and key.split(".")[-2] in _CONV1D
        deltas[key.removesuffix(".weight")] = _delta(t, there, flip)
    if not deltas:
        raise AdapterError(f"{full}: no linear weight differs from {base}'s, so there is nothing to make an adapter of")
    flipped = transposed and any(name.split(".")[-1] in _CONV1D for name in deltas)
    notes = [f"{full.name or full} minus {base.name or base}"]
    notes += [f"{what}: {_some(keys)}" for what, keys in (("differ and are left as the base has them", left),
              ("are not in the base", alone)) if keys]  # fmt: skip
    return DenseAdapter(
        KIND,
        full,
        deltas,
        sketch,
        file_bytes=sum(t.nbytes for t in ours.values()),
        about={"base_model_name_or_path": str(base), "fan_in_fan_out": flipped},
        notes=notes,
    )


def _delta(ours: Tensor, theirs: Tensor, flip: bool) -> Delta:
    shape = tuple(ours.shape[::-1] if flip else ours.shape)

    def make() -> Tensor:
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        found = (ours.to(wide) - theirs.to(wide)).flatten(1)
        return found.mT.contiguous() if flip else found

    return Delta(shape[0], shape[1:], ours.dtype, make)


def _adaptable(key: str, t: Tensor) -> bool:
    """Return whether a tensor is the weight of a linear layer or of a convolution without groups, by its name and
    shape."""
    if not key.endswith(".weight") or not 2 <= t.ndim <= 5 or _EMBEDDING.search(key.removesuffix(".weight")):
        return bool(re.search(r"patch_embed\w*\.proj\w*\.weight$", key)) and t.ndim > 2
    return min(t.shape[:2]) > 1


def _model_type(folder: Path) -> str:
    try:
        return str(strict_object(read_text(folder / "config.json")).get("model_type"))
    except (ValueError, OSError):
        return ""


def _renaming(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the prefix to take off our names and the one to put before them, so that most become names of the other
    side.

    Raises:
        AdapterError: none of them is.
    """
    heads = {f"{key.split('.')[0]}." for keys in (ours, theirs) for key in keys if "." in key}
    choices = [("", ""), *((head, "") for head in sorted(heads)), *(("", head) for head in sorted(heads))]
    best = max(choices, key=lambda choice: sum(_renamed(key, choice) in theirs for key in ours))
    if not any(_renamed(key, best) in theirs for key in ours):
        raise AdapterError("the two models share no tensor's name; these are different models")
    return best


def _renamed(key: str, prefix: tuple[str, str]) -> str:
    off, on = prefix
    return on + key.removeprefix(off)


def _some(keys: list[str]) -> str:
    more = len(keys) - _MOST_NAMES
    return ", ".join(keys[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
