"""Training checkpoints: the controller's state in a folder beside the adapter's files, and getting back to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rankflow.adapters import Adapter, reshape
from rankflow.controller import Controller
from rankflow.errors import AdapterError, CheckpointError, naming
from rankflow.formats.atomic import atomic_folder
from rankflow.formats.peft import PeftAdapter
from rankflow.inits import changes_base
from rankflow.plan import Layout
from rankflow.seals import check_seal

FOLDER = "rankflow"
SUMS = "SHA256SUMS"
_TENSOR = "tensor:"


def save_state(controller: Controller, checkpoint: str | os.PathLike[str]) -> Path:
    """Write `<checkpoint>/rankflow/`: state.json, state.safetensors and the SHA256SUMS of both.

    The folder appears whole or not at all, and until then an earlier one stays.
    """
    folder = Path(checkpoint) / FOLDER
    tensors: dict[str, Tensor] = {}
    plain = _split(controller.state_dict(), tensors)
    files = {"state.json": json.dumps(plain, indent=1).encode(), "state.safetensors": save(tensors)}
    with atomic_folder(folder) as partial:
        for name, raw in files.items():
            (partial / name).write_bytes(raw)
        (partial / SUMS).write_text(_sums(files))
    return folder


def load_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `save_state` wrote, for `Controller.load_state_dict`; None where a checkpoint has none.

    Raises:
        CheckpointError: the files are damaged, or of a newer rankflow.
    """
    folder = Path(checkpoint) / FOLDER
    if not folder.is_dir():
        return None
    try:
        files = {name: (folder / name).read_bytes() for name in ("state.json", "state.safetensors")}
        if (folder / SUMS).read_bytes() != _sums(files).encode():
            raise ValueError(f"its files are not those of {SUMS}")
        state = _join(json.loads(files["state.json"]), load(files["state.safetensors"]))
    except (OSError, ValueError, SafetensorError, RecursionError) as e:
        raise CheckpointError(
            f"{folder}: the rank state of this checkpoint is damaged ({e}); go on from an earlier checkpoint"
        ) from None
    with naming(folder):
        return check_seal(state)


def _sums(files: Mapping[str, bytes]) -> str:
    """As `sha256sum` writes and checks them."""
    return "".join(f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in files.items())


def restore(model: nn.Module, checkpoint: str | os.PathLike[str], adapter_name: str = "default") -> Layout:
    """Give a live adapter the ranks of a saved one and load its weights, for people who load by hand.

    Make the optimizer afterwards: parameters whose rank differs are new tensors. Modules the checkpoint does not have
    leave the adapter and may come back later.

    Raises:
        CheckpointError: no adapter there, or one that has modules the model's adapter has not.
    """
    layout = match_layout(model, checkpoint, adapter_name)
    set_peft_model_state_dict(model, load_peft_weights(os.fspath(checkpoint), device="cpu"), adapter_name)
    return layout


def match_layout(model: nn.Module, checkpoint: str | os.PathLike[str], adapter_name: str = "default") -> Layout:
    """Reshape a live adapter to the ranks and scalings of a saved one; its weights are then for the caller to load."""
    adapter = Adapter(model, adapter_name)
    return reshape(adapter, saved_layout(checkpoint, adapter.layout(), adapter.config.init_lora_weights))


def saved_layout(checkpoint: str | os.PathLike[str], live: Layout, init: Any = True) -> Layout:
    """The layout of a saved adapter in terms of a live one that started with `init`: modules it does not have are at
    rank 0."""
    try:
        adapter = PeftAdapter(Path(checkpoint), any_init=True)
    except AdapterError as e:
        raise CheckpointError(str(e)) from None
    started = adapter.config.get("init_lora_weights")
    if started != init and (changes_base(started) or changes_base(init)):
        raise CheckpointError(
            f"{checkpoint}: its adapter started with init_lora_weights={started!r} and the model's with {init!r}, so "
            "that they are not for the same base weights; make the model's adapter as that one was made"
        )
    if adapter.folded:
        what = adapter.notes[0].partition(",")[0]
        raise CheckpointError(f"{checkpoint}: is {what}, which LoRA cannot load; `rankflow squeeze` makes LoRA of it")
    saved = adapter.layout
    if missing := [name for name in saved if name not in live]:
        raise CheckpointError(f"{checkpoint}: {missing[0]} is in the checkpoint but not in the model's adapter")
    return Layout({name: saved.get(name, replace(slot, rank=0)) for name, slot in live.items()})


def checkpoint_of(path: str | os.PathLike[str]) -> Path | None:
    """The training checkpoint of ours that an adapter folder is, or is in (as adapters not named `default` are)."""
    folder = Path(path)
    return next((f for f in (folder, folder.parent) if (f / FOLDER).is_dir()), None)


def _split(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return _TENSOR + path
    if isinstance(value, dict):
        return {k: _split(v, tensors, f"{path}/{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_split(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors.get(value.removeprefix(_TENSOR), value)  # a missing one breaks the seal
    if isinstance(value, dict):
        return {k: _join(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value
