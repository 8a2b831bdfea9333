"""Names in single files: every way to spell the factors of a module, and what looks like a factor in no known one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.wrappers import PEFT_PREFIX

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_FACTORS = (
    re.compile(rf"^(?P<stem>.+)\.lora_(?P<part>down|up|mid){_ADAPTER}\.weight$"),
    re.compile(rf"^(?P<stem>.+)\.lora_(?P<part>A|B){_ADAPTER}(?:\.weight)?$"),
    # XLabs numbers the adapters of a double block: the number tells which layer they are of
    re.compile(r"^(?P<stem>.+_lora\d+)\.(?P<part>down|up)\.weight$"),
    re.compile(r"^(?P<stem>.+?)(?P<style>_lora|\.lora|\.lora_linear_layer)\.(?P<part>down|up)\.weight$"),
)
_PARTS = {"A": "down", "B": "up"}
# An adapter's name, but for PEFT's own for the first, which programs for image models read away
_NAME = re.compile(r"(?<=\.lora_)(A|B|down|up|mid)\.(?!(?:default|weight|bias)\b)[^.]+(?=\.(?:weight|bias)$)")

# What may be called after an adapter's method and is no factor, or is in front of all names of a format
_NO_FACTOR = re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$|\.lora_magnitude_vector|\.dora_scale|\.base_layer\.[^.]+$")
_METHOD = re.compile(r"^(?:lora|lycoris)_|(?<=[._])lora_(?=unet_|te\d?_|transformer_|prior_)")
_WORD = re.compile(
    r"(?<![a-z])(?:g?lora|lokr|loha|locon|lycoris|hada|b?oft)(?![a-z])|\.(?:down|up|mid)(?:\.weight)?$", re.IGNORECASE
)
_SIDE = re.compile(r"(?<![^._])(?:A|B|a|b|down|up|left|right|u|v|U|V)(?=\.weight$|$)")
_LOW = 4  # a shared dimension more than so many times smaller than both others is taken for a rank
_MOST_NAMES = 4


_FUSE = "and give rankflow that with --from-format full and --base, or convert the adapter to PEFT's format"
FOREIGN = {  # how keys end -> whose they are
    ".lora_a.weight": "an adapter of torchtune, by the names of its own models; give the folder in which it saved "
    f"adapter_model and adapter_config.json, or merge it into its base model, {_FUSE}",
    ".lora_a": f"an adapter of mlx-lm, whose factors lie transposed; merge it with mlx_lm.fuse, {_FUSE}",
}


class Fit(IntEnum):
    """How surely the names in a file are of a format."""

    NONE = 0
    POSSIBLE = 1  # names of an image model, which other formats have too
    LIKELY = 2  # names that this format has, and language models may have
    CERTAIN = 3  # a beginning that no other format has
    UNMISTAKABLE = 4  # a spelling that nothing else has, whatever lies beside the file


@dataclass(frozen=True)
class Names:
    """The names in a file. keys: of its tensors. stems: of modules, as they are there."""

    keys: Set[str]
    stems: Sequence[str]

    @cached_property
    def modules(self) -> list[str]:
        """Names of modules without what PEFT puts before them."""
        return [stem.removeprefix(PEFT_PREFIX) for stem in self.stems]

    @cached_property
    def roots(self) -> set[str]:
        """What comes before the first dot of modules' names."""
        return {module.partition(".")[0] for module in self.modules}


class Factor(NamedTuple):
    """What a key says: the module's part of it, which factor it is, and whether in the style of `to_q_lora.up`."""

    stem: str
    part: str  # down, up or mid
    old: bool


def factor_of(key: str) -> Factor | None:
    for pattern in _FACTORS:
        if found := pattern.match(key):
            part = found["part"]
            return Factor(found["stem"], _PARTS.get(part, part), found.groupdict().get("style") == "_lora")
    return None


def without_name(key: str) -> str:
    """A key without an adapter's name that no program would know: `q.lora_A.mine.weight` is `q.lora_A.weight`."""
    return _NAME.sub(r"\1", key)


def refuse_unknown_factors(extra: Mapping[str, Tensor], path: Path, *, whole: Sequence[str] = ()) -> None:
    """Of what no reader took for a factor, nothing may be one: it would be carried along at full rank in silence.

    Args:
        whole: names of modules that are saved whole (`modules_to_save`), in which anything may be called anything.

    Raises:
        AdapterError: names or shapes say that there are factors in a spelling that is not known.
    """
    kept = [key for key in extra if not any(f".{name}." in f".{key}" for name in whole)]
    found = [key for key in kept if not _NO_FACTOR.search(key) and _WORD.search(_METHOD.sub("", key))]
    found += [key for pair in _thin_pairs({key: extra[key] for key in kept}) for key in pair]
    if found:
        more = len(set(found)) - _MOST_NAMES
        names = ", ".join(list(dict.fromkeys(found))[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        raise AdapterError(
            f"{path}: {names}: by name or shape these are factors of an adapter, in a spelling that is not known; "
            "they would stay at full rank. Call them <module>.lora_A.weight and <module>.lora_B.weight, or remove them"
        )


def refuse_empty(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors without entries.

    Raises:
        AdapterError: a tensor without any entries, as ZeRO-3 leaves them where parameters were not gathered.
    """
    for key, t in tensors.items():
        if 0 in t.shape:
            raise AdapterError(
                f"{path}: {key} is empty, of shape {list(t.shape)}: so DeepSpeed's ZeRO-3 leaves tensors where a model "
                "is saved without gathering it. Save it again with stage3_gather_16bit_weights_on_model_save, or get "
                "the weights from the checkpoint by its zero_to_fp32.py"
            )


def foreign_factors(keys: Iterable[str]) -> str | None:
    """Whose factors these are, where another program's way to name them is known and not read."""
    keys = list(keys)
    return next((what for end, what in FOREIGN.items() if any(key.endswith(end) for key in keys)), None)


def refuse_unused_alphas(extra: Iterable[str], path: Path) -> None:
    """Refuse alphas that belong to no module.

    Raises:
        AdapterError: an alpha of no module that was read, whose scale it may be meant to be.
    """
    for key in extra:
        if re.search(r"(?:^|[._])(?:lora_|network_)?alpha$", key):
            raise AdapterError(f"{path}: {key} is the alpha of no module in the file; name it as that, or remove it")


def _thin_pairs(extra: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of matrices of one parent with shapes ``[r, in]`` and ``[out, r]``: called as two sides are, or far wider
    than r."""
    families: dict[str, list[str]] = defaultdict(list)
    for key, t in extra.items():
        if t.ndim == 2 and t.is_floating_point() and not _NO_FACTOR.search(key):
            families[key.removesuffix(".weight").rpartition(".")[0]].append(key)
    return [pair for keys in families.values() for pair in _thin_pairs_of(keys, extra)]


def _thin_pairs_of(keys: Sequence[str], extra: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    tallest: dict[tuple[int, bool], str] = {}  # (columns, whether called as a side is) -> key
    for key in sorted(keys, key=lambda k: extra[k].shape[0]):
        tallest[extra[key].shape[1], bool(_SIDE.search(key))] = key
    for key in keys:
        (rank, wide), named = extra[key].shape, bool(_SIDE.search(key))
        for side, times in ((True, 1 if named else _LOW), (False, _LOW)):
            other = tallest.get((rank, side))
            if other is not None and times * rank < min(wide, extra[other].shape[0]):
                yield key, other
