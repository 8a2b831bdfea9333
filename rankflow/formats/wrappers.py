"""Remove what wrappers of training leave in the names of tensors, so that they are as PEFT names them.

`torch.compile`, FSDP, activation checkpointing, DDP and DeepSpeed put a module of their own around others, whose name
is then part of every name inside. Under such names nothing that loads the adapter finds a module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rankflow.errors import AdapterError

T = TypeVar("T")
PEFT_PREFIX = "base_model.model."

# What wrappers call the module inside: of torch.compile, of FSDP (torch's and fairscale's), of checkpoint_wrapper and
# of Lightning's Fabric. Nobody calls a module of their own so. They stand between dots, between kohya's underscores,
# or between the escaped dots of an expression.
_WORDS = "_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module|_original_module"
_INSIDE = re.compile(rf"(?<![^._])(?:{_WORDS})\\?[._]")
# DDP, DeepSpeed and Opacus wrap a whole model, by names that an inner module may have too: theirs are in front
_HEAD = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|unet|transformer(_2)?|text_encoder(_[23])?)\.)?"
)
_IN_FRONT = re.compile(rf"^(?P<head>{_HEAD.pattern})_?module\.")
_CONFIG_IN_FRONT = re.compile(r"^\^?_?module\\?\.")
_NAMING = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")

_ADAPTER = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?:weight|bias))?$")
_OWNED = r"(?:(?P<owner>\.(?:lora_|trainable_tokens_)[^.]+)|\.modules_to_save)\.{}(?=\.|$)"


def unwrapped(name: str) -> str:
    """A name, or an expression for names, without the words that only wrappers use, wherever they stand."""
    return _INSIDE.sub("", name)


def unwrapped_names(names: Iterable[str], *, front: bool = True) -> dict[str, str]:
    """Name -> the name without wrappers. `module` is one where all names of a part of the model begin with it."""
    new = {name: unwrapped(name) for name in names}
    while front:
        parts: dict[str, list[str]] = defaultdict(list)
        for name, bare in new.items():
            parts[_HEAD.match(bare)[0]].append(name)  # type: ignore[index]  # it matches the empty string too
        wrapped = [n for members in parts.values() if all(_IN_FRONT.match(new[n]) for n in members) for n in members]
        new |= {name: _IN_FRONT.sub(r"\g<head>", new[name]) for name in wrapped}
        front = bool(wrapped)
    return new


def peft_names(names: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name of a tensor -> what PEFT would have saved it as: without wrappers, after ``base_model.model.``, and without
    the adapter's name, where there is one adapter.

    Args:
        config: PEFT's. Where its names begin with `module.` too, the model has a module that is called so.
    """
    real = any(_CONFIG_IN_FRONT.match(name) for name in _config_names(config or {}))
    new = unwrapped_names(names, front=not real)
    before = {name.partition(PEFT_PREFIX)[0] for name in new.values()}
    if len(before) == 1 and all(PEFT_PREFIX in name for name in new.values()):  # saved from within another model
        new = {name: bare.removeprefix(*before) for name, bare in new.items()}
    new = {name: bare if bare.startswith("base_model.") else PEFT_PREFIX + bare for name, bare in new.items()}
    adapters = {found["adapter"] for bare in new.values() if (found := _ADAPTER.search(bare))}
    if len(adapters) == 1 and (adapter := adapters.pop()):  # several are refused where they are read
        named = re.compile(_OWNED.format(re.escape(adapter)))
        new = {name: named.sub(lambda m: m["owner"] or "", bare) for name, bare in new.items()}
        new = {name: re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", bare) for name, bare in new.items()}
    return new


def renamed(tensors: Mapping[str, T], names: Mapping[str, str], path: Path) -> dict[str, T]:
    """The same tensors under these names.

    Raises:
        AdapterError: two would have one name.
    """
    new: dict[str, T] = {}
    said: dict[str, str] = {}
    for key, t in tensors.items():
        name = names[key]
        if name in new:
            raise AdapterError(
                f"{path}: {said[name]} and {key} are both {name} without what wrappers and adapters add to names; "
                "remove one, since it is chance which of them a program takes"
            )
        new[name], said[name] = t, key
    return new


def unwrapped_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's config without the words of wrappers in the fields that name modules."""
    new = dict(config)
    for field in _NAMING:
        value = new.get(field)
        if isinstance(value, str):
            new[field] = unwrapped(value)
        elif isinstance(value, list) and all(isinstance(name, str) for name in value):
            new[field] = list(dict.fromkeys(map(unwrapped, value)))
        elif isinstance(value, dict):
            new[field] = {unwrapped(name): v for name, v in value.items()}
    return new


def renaming_note(names: Mapping[str, str]) -> list[str]:
    """Return a note about names that change, if any do."""
    changed = [name for name, new in names.items() if name != new]
    if not changed:
        return []
    return [f"{len(changed)} of {len(names)} names are read, and written, without wrappers and as the format has them: "
            f"{changed[0]} as {names[changed[0]]}"]  # fmt: skip


def _config_names(config: Mapping[str, Any]) -> list[str]:
    values = [config.get(field) for field in _NAMING]
    return [name for value in values if isinstance(value, list | dict) for name in value if isinstance(name, str)]
