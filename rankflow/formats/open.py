"""Open a saved adapter of any format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from rankflow.errors import AdapterError, ConfigError, naming
from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.as_lora.fine_tune import full_minus_base
from rankflow.formats.as_lora.randlora import dense_form
from rankflow.formats.as_lora.registry import needs_base
from rankflow.formats.base import SavedAdapter, Sketch
from rankflow.formats.convert import AsPeft, AsSingleFile
from rankflow.formats.gguf.writer import GgufAdapter
from rankflow.formats.io.links import check_own
from rankflow.formats.io.models import is_model
from rankflow.formats.io.tensors import TENSOR_FILES, open_tensors
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft_config import CONFIG, load_config
from rankflow.formats.single_file.diffusers import FILES
from rankflow.formats.single_file.keys import Fit, Names, factor_of, foreign_factors, without_name
from rankflow.formats.single_file.lycoris import fold_products, refuse_variants
from rankflow.formats.single_file.names import IMAGE, LANGUAGE, renamed_key
from rankflow.formats.single_file.registry import best_fit, single_file_formats
from rankflow.formats.wrappers import PEFT_PREFIX, renamed, renaming_note, unwrapped_names


def readable_formats() -> list[str]:
    """The formats that `open_adapter` reads."""
    return [PeftAdapter.kind, *single_file_formats(), FULL]


def writable_formats() -> list[str]:
    """The formats that `converted` writes."""
    return [
        PeftAdapter.kind,
        *(kind for kind, found in single_file_formats().items() if found.writes),
        GgufAdapter.kind,
    ]


def open_adapter(
    path: str | Path, kind: str | None = None, base: str | Path | None = None, sketch: Sketch | None = None
) -> SavedAdapter:
    """A saved adapter, open for reading; or a whole fine-tuned model, whose difference from its base is read as one.

    Args:
        path: a PEFT folder, a folder of diffusers', a file of tensors, or the folder of a whole model.
        kind: one of `readable_formats`; told from the file if left out.
        base: the base model's folder, for a whole model and for adapters that say less than all in their file; these
            name it themselves, if it is left out.
        sketch: how far updates that come as full matrices are looked at.

    Raises:
        AdapterError: no adapter, damaged, or of a kind that cannot be resized, with the reason and the remedy.
        ConfigError: an unknown kind, or the base model is needed and not at hand.
    """
    path, base, sketch = Path(path), None if base is None else Path(base), sketch or Sketch()
    if kind is not None and kind not in readable_formats():
        raise ConfigError(f"there is no adapter format {kind!r}; there are {', '.join(readable_formats())}")
    with naming(path):
        if kind == FULL or (kind is None and is_model(path)):
            return AsPeft(full_minus_base(path, base, sketch))
        if kind in (None, PeftAdapter.kind) and (found := dense_form(path, base, sketch)) is not None:
            return AsPeft(found)
        return _open(path, kind, base)


def uses_base(path: Path) -> bool:
    """Return whether `open_adapter` needs the base model of the adapter."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    return is_model(path) or (config.is_file() and needs_base(load_config(config).get("peft_type")))


def converted(found: SavedAdapter, to: str, base: Path | None = None) -> SavedAdapter:
    """Return the same adapter, to be written in another format.

    Args:
        to: one of `writable_formats`.
        base: for gguf, the folder of the base model.

    Raises:
        ConfigError: an unknown format, or one that cannot hold this adapter.
    """
    if to == GgufAdapter.kind:
        return GgufAdapter(found, base)
    if to == AsPeft.kind:
        return AsPeft(found)
    if to not in writable_formats():
        raise ConfigError(f"format {to!r} cannot be written; these can: {', '.join(writable_formats())}")
    return AsSingleFile(found, single_file_formats()[to])


def _open(path: Path, kind: str | None, base: Path | None) -> SavedAdapter:
    if kind == PeftAdapter.kind:
        return PeftAdapter(path, base)
    if path.is_dir():
        inside = [path / name for name in FILES if (path / name).is_file()]
        if kind is not None and not inside and (path / CONFIG).is_file():
            raise ConfigError(f"{path}: is a {PeftAdapter.kind} folder, not {kind}; give that format, or none")
        if not inside or (kind is None and (path / CONFIG).is_file()):
            return PeftAdapter(path, base)
        check_own(inside[0], path)
        path = inside[0]
    if path.suffix == ".gguf":
        raise AdapterError(f"{path}: GGUF is not read; squeeze the adapter that it was made from")
    if not path.is_file() or path.suffix not in TENSOR_FILES:
        return PeftAdapter(path)  # which says what is the matter
    if kind is None and path.stem == "adapter_model" and (path.parent / CONFIG).is_file():
        return PeftAdapter(path, base)
    raw, metadata = open_tensors(path)
    names = {key: renamed_key(without_name(new)) for key, new in unwrapped_names(raw).items()}
    tensors, notes = fold_products(renamed(raw, names, path), path)
    kind = kind or _kind_of(tensors, path)
    if kind == PeftAdapter.kind:
        return PeftAdapter(path, base)
    found = single_file_formats()[kind](path, tensors, metadata)
    found.names_in_file = names
    found.notes += [*notes, *renaming_note(names)]
    return found


def _kind_of(keys: Iterable[str], path: Path) -> str:
    """The format that names tell, as diffusers and ComfyUI tell it."""
    keys = set(keys)
    names = Names(keys, [factor.stem for key in sorted(keys) if (factor := factor_of(key)) is not None])
    kind, fit = best_fit(names)
    if fit is Fit.UNMISTAKABLE:
        return kind
    if not names.stems and (whose := foreign_factors(keys)):
        raise AdapterError(f"{path}: is {whose}")
    if (path.parent / CONFIG).is_file():
        return PeftAdapter.kind
    if any(key.startswith(PEFT_PREFIX) for key in keys) and not any(map(IMAGE.match, names.modules)):
        return PeftAdapter.kind
    refuse_variants(keys, path)
    if not names.stems:
        raise AdapterError(f"{path}: {_why_no_factors(keys)}")
    if fit < Fit.CERTAIN and any(map(LANGUAGE.match, names.modules)):
        raise AdapterError(
            f"{path}: {names.stems[0]} is a name in a language model; a PEFT adapter needs its {CONFIG} beside it, "
            "from which alone its scaling is known"
        )
    if fit is Fit.NONE:
        raise AdapterError(
            f"{path}: {names.stems[0]} is a name of no known format; if it is one of {', '.join(readable_formats())}, "
            f"say so with --from-format. A PEFT adapter needs its {CONFIG} beside it, from which alone its scaling is "
            "known"
        )
    return kind


def _why_no_factors(keys: Collection[str]) -> str:
    if differences := [key for key in keys if re.search(r"\.(diff|diff_b|set_weight)$", key)]:
        return (
            f"holds {len(differences)} plain differences (.diff) and no factors, as LyCORIS' full does: there is no "
            "rank to make smaller. Merge it into its base model, and give rankflow that, with --from-format full and "
            "--base"
        )
    return "holds no LoRA factors; it is not a LoRA adapter, or was merged"
