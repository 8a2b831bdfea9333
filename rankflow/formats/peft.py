"""PEFT LoRA adapters on disk: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

The only file that knows how PEFT names and shapes its saved tensors. No base model is needed: every module reads as
canonical factors (A ``[*e, r, in]``, B ``[*e, out, r]``, scaling), whatever layer it belongs to.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.peft_config import CONFIG, pattern_value, read_config, resized_config, wrapped_parameters
from rankflow.formats.tensors import Spec, atomic_folder, check_destination, open_tensors, tensor_writer
from rankflow.plan import Layout, Slot

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# What people keep beside an adapter and need to use it. Optimizer state and the like belong to the run, not to the
# adapter, and no longer fit it once ranks have changed.
COMPANIONS = (
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.(?P<tail>.+))?$")


@dataclass(frozen=True)
class Entry:
    """Where the file keeps one module's factors."""

    slot: Slot
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: torch.dtype
    pattern_names: tuple[str, ...]  # what rank_pattern is matched against

    def canonical(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A ``[*e, r, in]`` and B ``[*e, out, r]`` from tensors as the file shapes them; views where that can be.

        Expert tensors lie expert-major in A (``[E * r, in]``) and expert-minor in B (``[out, r * E]``).
        """
        e = self.slot.experts
        if e > 1:
            return a.reshape(e, -1, a.shape[-1]), b.reshape(b.shape[0], -1, e).permute(2, 0, 1)
        return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)

    def raw(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `canonical`, at whatever rank `a` and `b` have."""
        if self.slot.experts > 1:
            return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
        raw_a, raw_b = self.raw_shapes(a.shape[0])
        return a.reshape(raw_a), b.reshape(raw_b)

    def raw_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = rank * self.slot.experts
        return (rows, *self.a_shape[1:]), (self.b_shape[0], rows, *self.b_shape[2:])


class PeftAdapter:
    """A saved LoRA adapter, open for reading; tensors stay on disk until asked for.

    `layout` holds rank, shape and scaling of every module in natural order of their names; modules that PEFT cannot
    do without (they carry a magnitude, a trained bias or the like, or a wrapper that has no way to be left out) have
    `min_rank` 1, and those that PEFT must give one rank share a `tie`.
    """

    def __init__(self, src: str | Path):
        """
        Raises:
            AdapterError: not a LoRA adapter, damaged, at odds with its config, or a variant that cannot be resized.
        """
        self.path = Path(src)
        self.folder, self.weights = _locate(self.path)
        self.config = read_config(self.folder / CONFIG)
        self._tensors, self._metadata = open_tensors(self.weights)
        self.entries = _entries(self._tensors, self.config, self.weights)
        self.layout = Layout({name: entry.slot for name, entry in self.entries.items()})
        factor_keys = {key for e in self.entries.values() for key in (e.a_key, e.b_key)}
        self._others = [key for key in self._tensors if key not in factor_keys]
        self.companions = sorted(
            {
                p
                for pattern in COMPANIONS
                for p in self.folder.glob(pattern)
                if p.is_file() and p.stat().st_size < 1 << 26
            }
        )
        self.notes: list[str] = []
        if self.config.get("use_dora"):
            self.notes.append("DoRA: magnitudes are kept as they are, so predicted errors are estimates")

    @property
    def file_bytes(self) -> int:
        return self.weights.stat().st_size

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Canonical A and B of one module, read-only views of the file in its own dtype.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        entry = self.entries[name]
        a, b = self._tensors[entry.a_key], self._tensors[entry.b_key]
        for key, t in ((entry.a_key, a), (entry.b_key, b)):
            low, high = torch.aminmax(t)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise AdapterError(f"{self.weights}: {key} has NaN or infinite values; the adapter is damaged")
        return entry.canonical(a, b)

    @contextmanager
    def rewrite(self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False):
        """Write the adapter anew at other ranks: yields ``put(name, A, B)``, to be called once for every module with
        a rank, from any thread. `out` appears, whole and on disk, when the block ends well.

        Every other tensor is copied as it is (`modules_to_save`, biases, magnitudes), and so is the config but for
        ranks, alphas and modules left out; scalings do not change.
        """
        check_destination(out, self.path, force=force)
        specs: dict[str, Spec] = {key: (t.dtype, tuple(t.shape)) for key, t in self._tensors.items()}
        for name, entry in self.entries.items():
            if ranks[name] == 0:
                del specs[entry.a_key], specs[entry.b_key]
                continue
            a_shape, b_shape = entry.raw_shapes(ranks[name])
            specs[entry.a_key] = (dtype or entry.dtype, a_shape)
            specs[entry.b_key] = (dtype or entry.dtype, b_shape)
        config = resized_config(
            self.config, {n: (e.pattern_names, e.slot.scaling) for n, e in self.entries.items()}, ranks
        )
        with atomic_folder(out) as folder:
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for file in self.companions:
                shutil.copyfile(file, folder / file.name)
            writer = tensor_writer(folder / f"adapter_model{self.weights.suffix}", specs, self._metadata)

            def put(name: str, a: Tensor, b: Tensor) -> None:
                entry = self.entries[name]
                for key, t in zip((entry.a_key, entry.b_key), entry.raw(a, b), strict=True):
                    writer.put(key, t.to(specs[key][0]))

            yield put
            for key in self._others:
                writer.put(key, self._tensors[key])
            writer.close()


# -- reading --------------------------------------------------------------------------------------------------------


def _locate(path: Path) -> tuple[Path, Path]:
    """(folder, weights file) of an adapter named by its folder or its weights file."""
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise AdapterError(f"{path}: not an adapter; give its folder, or its .safetensors or .bin file")
        folder, weights = path.parent, path
    else:
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise AdapterError(f"{path}: {_why_no_adapter(path)}")
        folder, weights = path, found[0]
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder / CONFIG}: no such file; the scaling of an adapter is known from its config alone, "
            f"so put the {CONFIG} it was saved with beside {weights.name}"
        )
    return folder, weights


def _why_no_adapter(folder: Path) -> str:
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"no adapter itself but holds {', '.join(inside)}; name one of them"
    if (folder / CONFIG).is_file():
        return f"has {CONFIG} but neither {' nor '.join(WEIGHTS)}; the adapter was not saved whole"
    if (folder / "config.json").is_file():
        return "a whole model and no adapter (merged?); a squeeze needs the adapter as PEFT saved it"
    return f"no adapter: there is no {' or '.join(WEIGHTS)}"


def _entries(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    tails: set[str] = set()
    for key in tensors:
        found = _FACTOR.match(key)
        if found is None:
            if ".lora_" in key and "lora_magnitude_vector" not in key:
                raise AdapterError(f"{path}: {key} is not a tensor of plain LoRA or DoRA; this variant is not known")
            continue
        tail = (found["tail"] or "").removesuffix("weight").removesuffix(".")
        if tail.endswith("bias"):
            continue
        tails.add(tail)
        parts[found["module"]][found["part"]] = key
    if not parts:
        raise AdapterError(f"{path}: holds no lora_A and lora_B tensors; it is not a LoRA adapter, or was merged")
    if len(tails) > 1:
        raise AdapterError(f"{path}: holds tensors of several adapters ({', '.join(sorted(tails))}); save them apart")
    entries: dict[str, Entry] = {}
    for module in sorted(parts, key=_natural):
        entry_name, entry = _entry(module, parts[module], tensors, config, path)
        entries[entry_name] = entry
    return entries


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which layers.2 comes before layers.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def _entry(
    module: str, part: Mapping[str, str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> tuple[str, Entry]:
    name = module.removeprefix(_PREFIX)
    embedding = "embedding_A" in part or "embedding_B" in part
    a_part, b_part = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for have, lack in ((a_part, b_part), (b_part, a_part)):
        if lack not in part:
            raise AdapterError(
                f"{path}: {name} has lora_{have} but no lora_{lack}; the file is incomplete, save the adapter again"
            )
    a, b = tensors[part[a_part]], tensors[part[b_part]]
    shapes = f"lora_{a_part} {list(a.shape)} and lora_{b_part} {list(b.shape)}"
    if a.ndim < 2 or b.ndim != a.ndim or 0 in a.shape or 0 in b.shape or any(n != 1 for n in b.shape[2:]):
        raise AdapterError(f"{path}: {name} has {shapes}, which are no LoRA factors; were sharded weights saved?")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise AdapterError(f"{path}: {name} has {a.dtype} and {b.dtype} factors; both must be of one floating type")
    rows = a.shape[0]
    if a.ndim > 2 and rows != b.shape[1] and rows % b.shape[1] == 0:
        raise AdapterError(
            f"{path}: {name} is a convolution of {rows // b.shape[1]} groups ({shapes}); PEFT cannot give the update "
            "of a grouped convolution, so it cannot be resized either"
        )
    if rows != b.shape[1]:
        raise AdapterError(f"{path}: {name} has {shapes}, whose ranks do not agree; the file is damaged")

    # Wrappers nest through `base_layer`: expert parameters in each other, attention's out-projection in attention.
    # PEFT looks the outermost up in the patterns, and gives all of them its rank.
    owner = re.split(r"\.base_layer(?:\.|$)", name, maxsplit=1)[0]
    wrapped = wrapped_parameters(config, owner)
    pattern_names = tuple(f"{owner}.{p}" for p in wrapped) or (owner,)
    settings = {
        (
            pattern_value(config["rank_pattern"], n, config["r"]),
            pattern_value(config["alpha_pattern"], n, config["lora_alpha"]),
        )
        for n in pattern_names
    }
    if len(settings) > 1:
        raise AdapterError(
            f"{path}: {owner} wraps {', '.join(wrapped)} at different ranks or alphas, and the file does not say "
            "which tensors are whose; it cannot be resized without the model"
        )
    rank, alpha = settings.pop()
    experts = rows // rank if wrapped and rows % rank == 0 else 1
    if rows != rank * experts:
        raise AdapterError(
            f"{path}: {name} has rank {rows} ({shapes}) but {CONFIG} says {rank}; config and weights do not belong "
            "together"
        )
    tied = owner != name or any(key.startswith(f"{module}.base_layer.") and ".lora_" in key for key in tensors)
    pinned = bool(wrapped) or tied or any(k.startswith(f"{module}.") and k not in part.values() for k in tensors)
    slot = Slot(
        rank=rank,
        in_features=math.prod(a.shape[1:]),
        out_features=b.shape[0],
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        min_rank=int(pinned),
        max_rank=rank,
        kind="embedding" if embedding else "experts" if wrapped else "conv" if a.ndim > 2 else "linear",
        experts=experts,
        itemsize=a.dtype.itemsize,
        tie=owner if tied else None,
    )
    if len(wrapped) == 1:
        name = pattern_names[0]
    return name, Entry(slot, part[a_part], part[b_part], tuple(a.shape), tuple(b.shape), a.dtype, pattern_names)
