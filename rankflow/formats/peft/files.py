"""The files of an adapter that PEFT saved: where they are, which go with it, and the writing of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankflow.errors import AdapterError
from rankflow.formats.io.links import check_own
from rankflow.formats.peft_config import CONFIG
from rankflow.formats.single_file.keys import FOREIGN

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = ".json"  # of shards, by which names they go

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
    "new_embeddings.*",
)
_LARGE = ("new_embeddings.safetensors", "new_embeddings.bin")  # of added tokens, which engines load beside the adapter
_MOST_BYTES = 1 << 26


def locate(path: Path) -> tuple[Path, Path]:
    """(folder, weights file) of an adapter named by its folder or its weights file."""
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json"):
            raise AdapterError(f"{path}: not an adapter; give its folder, or its .safetensors or .bin file")
        folder, weights = path.parent, path
    else:
        names = [*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise AdapterError(f"{path}: {_why_no_adapter(path)}")
        folder, weights = path, found[0]
        check_own(weights, folder)
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder / CONFIG}: no such file; the scaling of an adapter is known from its config alone, "
            f"so put the {CONFIG} it was saved with beside {weights.name}"
        )
    check_own(folder / CONFIG, folder)
    return folder, weights


def _why_no_adapter(folder: Path) -> str:
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"no adapter itself but holds {', '.join(inside)}; name one of them"
    if any(folder.glob("adapters.safetensors")) or any(folder.glob("*_adapters.safetensors")):
        return f"{FOREIGN['.lora_a']}"
    if any(folder.glob("adapter_[0-9]*.pt")):
        return f"{FOREIGN['.lora_a.weight']}"
    if (folder / CONFIG).is_file():
        return f"has {CONFIG} but neither {' nor '.join(WEIGHTS)}; the adapter was not saved whole"
    if (folder / "config.json").is_file():
        return "a whole model and no adapter (merged?); a squeeze needs the adapter as PEFT saved it"
    return f"no adapter: there is no {' or '.join(WEIGHTS)}"


def companions_of(folder: Path) -> tuple[list[Path], list[str]]:
    """(the files to copy along with an adapter, a note on those that are too large for it)."""
    beside = sorted({p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()})
    kept = [p for p in beside if p.name in _LARGE or p.stat().st_size < _MOST_BYTES]
    left = ", ".join(p.name for p in beside if p not in kept)
    return kept, [f"left behind, being over {_MOST_BYTES >> 20} MiB: {left}"] if left else []


def write_adapter_files(folder: Path, config: Mapping[str, Any], companions: Sequence[Path]) -> None:
    """Write all files of an adapter but its tensors."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in companions:
        check_own(file, file.parent)
        shutil.copyfile(file, folder / file.name)
