"""PEFT LoRA adapters on disk: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

No base model is needed: every module reads as
canonical factors (A ``[*e, r, in]``, B ``[*e, out, r]``, scaling), whatever layer it belongs to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.peft_config import CONFIG, read_config, resized_config
from rankflow.formats.peft_modules import read_entries
from rankflow.formats.tensors import Spec, all_finite, atomic_folder, check_destination, open_tensors, tensor_writer
from rankflow.plan import Layout

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
        self.entries = read_entries(self._tensors, self.config, self.weights)
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
            if not all_finite(t):
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
