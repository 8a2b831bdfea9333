"""PEFT LoRA adapters on disk: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

No base model is needed: every module reads as
canonical factors (A ``[*e, r, in]``, B ``[*e, out, r]``, scaling), whatever layer it belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError, naming
from rankflow.formats.as_lora.registry import plain
from rankflow.formats.base import Put, SavedAdapter, at_unit_scale, fold
from rankflow.formats.io.atomic import Together, atomic_folder
from rankflow.formats.io.links import check_own
from rankflow.formats.io.models import indexed
from rankflow.formats.io.outputs import check_destination
from rankflow.formats.io.tensors import Spec, all_finite, open_tensors
from rankflow.formats.io.writers import header, tensor_writer
from rankflow.formats.peft.files import INDEX, companions_of, locate, write_adapter_files
from rankflow.formats.peft.modules import Entry, read_entries
from rankflow.formats.peft_config import (
    CONFIG,
    as_peft_writes,
    check_config,
    read_config,
    resized_config,
    target_modules,
)
from rankflow.formats.single_file.keys import refuse_empty, refuse_unknown_factors
from rankflow.formats.wrappers import peft_names, renamed, renaming_note, unwrapped_config
from rankflow.plans.layout import Layout


class PeftAdapter(SavedAdapter):
    """A saved LoRA adapter, open for reading; tensors stay on disk until asked for.

    So is one of another kind that equals a plain LoRA, `folded`: what is read, and written, is that LoRA
    (`rankflow.formats.as_lora.registry`).

    `layout` holds rank, shape and scaling of every module in natural order of their names; modules that PEFT cannot
    do without (they carry a magnitude, a trained bias or the like, or a wrapper that has no way to be left out) have
    `min_rank` 1, and those that PEFT must give one rank share a `tie`. Names are those that PEFT saves, whatever
    wrappers were around the model; `names_in_file` says which key of the file is read, and written, as which.
    """

    kind = "peft"
    entries: Mapping[str, Entry]

    def __init__(self, src: str | Path, base: str | Path | None = None, *, any_init: bool = False):
        """
        Args:
            base: the base model's folder, for kinds that say less than all in their file; as the adapter names it, if
                left out.
            any_init: take those too that are tied to their ranks by how they were started
            (`rankflow.plans.peft_inits`), for who
                leaves ranks as they are.

        Raises:
            AdapterError: not a LoRA adapter, damaged, at odds with its config, or a variant that cannot be resized.
            ConfigError: the base model is needed and not at hand.
        """
        self.path = Path(src)
        self.folder, self.weights = locate(self.path)
        raw_config = read_config(self.folder / CONFIG)
        config = as_peft_writes(raw_config)
        index = indexed(self.weights) if self.weights.suffix == INDEX else {}
        self.files = sorted(set(index.values())) or [self.weights]
        self.weights = self.weights.with_name(self.weights.name.removesuffix(".index.json"))
        raw, self.metadata = self.tensors_in_files()
        if missing := index.keys() - raw.keys():
            raise AdapterError(
                f"{self.weights}: {min(missing)} is in its index and in no shard; the adapter is damaged"
            )
        self.names_in_file = peft_names(raw, config)
        self._tensors: Mapping[str, Tensor] = renamed(raw, self.names_in_file, self.weights)
        config = unwrapped_config(config)
        # Names of another length take other room in the header; those of a torch file stand there twice
        grown = 2 * sum(max(0, len(new) - len(old)) for old, new in self.names_in_file.items())
        self._container = self.file_bytes - sum(t.nbytes for t in self._tensors.values()) + grown
        self.notes = renaming_note(self.names_in_file)
        if odd := [field for field, value in config.items() if repr(value) != repr(raw_config[field])]:
            self.notes.append(f"{', '.join(odd)} in {CONFIG} are read, and written, as PEFT writes them")
        found = plain(config, self._tensors, self.weights, None if base is None else Path(base))
        self.folded, self.origin = found is not None, str(config.get("peft_type"))
        if found is not None:
            config, self._tensors, notes = found
            self.notes = [*notes, *self.notes]
        else:
            refuse_empty(self._tensors, self.weights)
        self.config = check_config(config, self.folder / CONFIG, any_init=any_init)
        with naming(self.folder):
            self.entries = read_entries(self._tensors, self.config, self.weights)  # type: ignore[reportIncompatibleVariableOverride]
        self.layout = Layout({name: entry.slot for name, entry in self.entries.items()})
        self._gains: dict[str, float] = {}  # what is multiplied into B as it is read
        factor_keys = {key for e in self.entries.values() for key in (e.a_key, e.b_key)}
        self.extra_tensors = {key: self._tensors[key].nbytes for key in self._tensors if key not in factor_keys}
        extra = {key: self._tensors[key] for key in self.extra_tensors}
        refuse_empty(extra, self.weights)
        refuse_unknown_factors(extra, self.weights, whole=self.config.get("modules_to_save") or ())
        self.companions, left = companions_of(self.folder)
        self.notes += left
        if self.config.get("use_dora"):
            self.notes.append("DoRA: magnitudes are kept as they are, so predicted errors are estimates")

    def at_unit_scale(self) -> PeftAdapter:
        """The same adapter with every module's scaling in its B: alphas are ranks, and one rank needs no patterns.
        Modules are listed by name where an expression said which, as engines do not know them from that."""
        found = copy.copy(self)
        found._gains = {name: slot.scaling for name, slot in self.layout.items()}
        found.entries = at_unit_scale(self.entries)
        found.layout = Layout({name: entry.slot for name, entry in found.entries.items()})
        found.config = {**self.config, "use_rslora": False}
        if isinstance(found.config.get("target_modules"), str):
            whole = (entry for entry in self.entries.values() if entry.slot.kind != "experts")
            found.config["target_modules"] = target_modules({name for e in whole for name in e.pattern_names})
        return found

    @property
    def peft_configs(self) -> Sequence[Mapping[str, Any]]:
        return [self.config]

    @property
    def about(self) -> Mapping[str, Any]:
        return self.config

    @property
    def unheard(self) -> list[str]:
        """Keys of the file under which PEFT finds no module and, silently, loads nothing; by a name of the adapter it
        does."""
        return [
            old for old, new in self.names_in_file.items() if new != old and not old.startswith(new.rpartition(".")[0])
        ]

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def tensors_in_files(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors, by the names the files have, and metadata; see `open_tensors`."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for file in self.files:
            found, about = open_tensors(file)
            if twice := found.keys() & tensors.keys():
                raise AdapterError(f"{file}: {min(twice)} is in another shard too; the adapter is damaged")
            tensors, metadata = tensors | found, metadata | about
        return tensors, metadata

    @property
    def overhead(self) -> int:
        """Bytes of the file that are no LoRA factors, in whatever dtype and ranks it is written."""
        extra = sum(self.extra_tensors.values())
        return (self._outline if self.folded else self._container) + extra + 2 * len(self._tensors)  # BF16 after F32

    @property
    def _outline(self) -> int:
        """Bytes around the tensors of a folded adapter's file, which its source's does not tell."""
        if self.weights.suffix != ".safetensors":
            return sum(1024 + len(key) for key in self._tensors)  # records of a zip archive, aligned, and the pickle
        factors = {
            k: (e.dtype, s) for e in self.entries.values() for k, s in ((e.a_key, e.a_shape), (e.b_key, e.b_shape))
        }
        rest = {key: (t.dtype, tuple(t.shape)) for key in self.extra_tensors for t in [self._tensors[key]]}
        return len(header(factors | rest, self.metadata)[0])

    def beside(self, suffix: str) -> Path:
        """`<src>-r8` and the like: beside the folder, or beside the file where it has a name of its own."""
        base = self.folder if self.weights.stem == "adapter_model" else self.weights.with_suffix("")
        if base.name in ("", ".."):
            base = base.resolve()
        return base.with_name(f"{base.name}-{suffix}")

    def check_out(self, out: Path, *, force: bool) -> None:
        check_destination(out, self.path, force=force)
        for file in self.companions:
            check_own(file, self.folder)

    def weights_in(self, out: Path) -> Path:
        return out / f"adapter_model{self.weights.suffix}"

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
        a, b = entry.canonical(a, b)
        return a, fold(b, self._gains.get(name, 1.0))

    @contextmanager
    def rewrite(
        self,
        out: Path,
        ranks: Mapping[str, int],
        *,
        dtype: torch.dtype | None = None,
        force: bool = False,
        group: Together | None = None,
    ) -> Iterator[Put]:
        """Write the adapter anew at other ranks: yields ``put(name, A, B)``, to be called once for every module with
        a rank, from any thread. `out` appears, whole and on disk, when the block ends well; with those of the `group`,
        if it is in one.

        Every other tensor is copied as it is (`modules_to_save`, biases, magnitudes), and so is the config but for
        ranks, alphas and modules left out; scalings do not change.
        """
        self.check_out(out, force=force)
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
        with atomic_folder(out, group) as folder:
            write_adapter_files(folder, config, self.companions)
            writer = tensor_writer(folder / self.weights_in(out).name, specs, self.metadata)

            def put(name: str, a: Tensor, b: Tensor) -> None:
                entry = self.entries[name]
                for key, t in zip((entry.a_key, entry.b_key), entry.raw(a, b), strict=True):
                    writer.put(key, t.to(specs[key][0]))

            yield put
            biases = {e.b_key.rpartition(".lora_")[0]: self._gains.get(name, 1.0) for name, e in self.entries.items()}
            for key in self.extra_tensors:
                stem, factor, _ = key.rpartition(".lora_B.")  # the bias of B is scaled as B is
                t = self._tensors[key]
                writer.put(key, fold(t, biases.get(stem, 1.0) if factor else 1.0).to(t.dtype))
            writer.close()
