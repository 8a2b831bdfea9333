"""kohya's sd-scripts and LyCORIS LoCon: one file, modules named with underscores, `lora_down`, `lora_up` and `alpha`.

The header says what was trained (`ss_...`), and holds two hashes by which sd-webui knows the file again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from rankflow.formats.io.writers import SafetensorsWriter, header
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.writer import Module

_MODEL_HASH, _LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_MEGABYTE = 0x100000


class KohyaAdapter(SingleFile):
    """An adapter as sd-scripts and LyCORIS write it."""

    kind = "kohya"

    def described(self, ranks: Mapping[str, int]) -> dict[str, str]:
        return kohya_metadata(self.metadata, self.entries, ranks)

    def finish(self, writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> None:
        stamp(writer, partial, metadata)


def kohya_metadata(
    metadata: Mapping[str, str], modules: Mapping[str, Module], ranks: Mapping[str, int]
) -> dict[str, str]:
    """Header metadata at other ranks, with room for the hashes.

    `ss_network_dim` and `ss_network_alpha` are those of the modules without a kernel (of all, where there are none), or
    "Dynamic" where they differ, as sd-scripts' `resize_lora.py` has it. Nothing is said about ranks that did not
    change, nor of training in a file that never told.
    """
    new = {**metadata, _MODEL_HASH: "0" * 64, _LEGACY_HASH: "0" * 8}
    if all(module.slot.rank == ranks[name] for name, module in modules.items()) and "ss_network_dim" in metadata:
        return new
    present = {name: module for name, module in modules.items() if ranks[name]}
    linear = {name: module for name, module in present.items() if math.prod(module.a_shape[2:]) == 1} or present
    dims = {str(ranks[name]) for name in linear}
    alphas = {str(module.slot.scaling * ranks[name]) for name, module in linear.items()}
    if "ss_network_dim" in metadata:
        was = metadata["ss_network_dim"]
        now = next(iter(dims)) if len(dims) == 1 else "Dynamic"
        comment = metadata.get("ss_training_comment", "")
        new["ss_training_comment"] = f"dimension is resized from {was} to {now}; {comment}"
    if metadata.keys() & {"ss_network_dim", "ss_network_alpha", "ss_network_module"}:
        new["ss_network_dim"] = dims.pop() if len(dims) == 1 else "Dynamic"
        new["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    return new


def stamp(writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> None:
    """Put the hashes of a written file into its header."""
    writer.relabel({**metadata, **kohya_hashes(writer, partial, metadata)})


def kohya_hashes(writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes of a written file, by sd-scripts' `precalculate_safetensors_hashes`.

    `sshs_model_hash` is the SHA-256 of all bytes after the header. `sshs_legacy_hash` is the first 8 hex digits of the
    SHA-256 of 64 KiB at 1 MiB into the file, were its metadata the `ss_` entries alone.
    """
    model, legacy = hashlib.sha256(), hashlib.sha256()
    plain, _, _ = header(writer.specs, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    with partial.open("rb") as file:
        file.seek(writer.base)
        while chunk := file.read(_MEGABYTE):
            model.update(chunk)
        # Where the plain header is longer than that, the window begins in it
        window = plain[_MEGABYTE : _MEGABYTE + 0x10000]
        file.seek(writer.base + max(0, _MEGABYTE - len(plain)))
        legacy.update(window + file.read(0x10000 - len(window)))
    return {_MODEL_HASH: model.hexdigest(), _LEGACY_HASH: legacy.hexdigest()[:8]}
