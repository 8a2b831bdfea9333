"""Saving the controller's state in a folder beside the adapter's files, and loading it again."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rankflow.errors import AdapterError, CheckpointError, naming
from rankflow.formats.io.atomic import atomic_folder
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.gating.parametrize import refuse_gates
from rankflow.lora.adapter import Adapter, reshape
from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.peft_inits import changes_base
from rankflow.training.controller import Controller
from rankflow.training.state import check_seal

FOLDER = "rankflow"
SUMS = "SHA256SUMS"
TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint, before it removes older ones
_TENSOR = "tensor:"
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


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
    """Read what `save_state` wrote, for `Controller.load_state_dict`; None where the checkpoint has no such folder.

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
    """Checksums in the format that `sha256sum` writes and checks."""
    return "".join(f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in files.items())


def restore(model: nn.Module, checkpoint: str | os.PathLike[str], adapter_name: str = "default") -> Layout:
    """Give a live adapter the ranks of a saved one and load its weights.

    Make the optimizer afterwards: parameters whose rank differs are new tensors. Modules the checkpoint does not have
    leave the adapter and may come back later. Where it raises, nothing has changed.

    Raises:
        CheckpointError: no adapter there, or one that is damaged, not finite, or does not fit the model: modules or
            parameters that are in one of the two alone, or other sizes, as of another base model.
        AdapterError: the model has no such adapter, or it cannot be resized.
    """
    folder = adapter_folder(checkpoint, adapter_name)
    with Transaction() as transaction:
        layout = match_layout(model, folder, adapter_name, transaction)
        with arriving(model, adapter_name, folder, transaction):
            set_peft_model_state_dict(model, load_peft_weights(os.fspath(folder), device="cpu"), adapter_name)
    return layout


def adapter_folder(checkpoint: str | os.PathLike[str], adapter_name: str) -> Path:
    """The folder of a checkpoint that PEFT puts an adapter into: its own, or for `default` the checkpoint's."""
    inside = Path(checkpoint) / adapter_name
    return inside if inside.is_dir() else Path(checkpoint)


def match_layout(
    model: nn.Module, checkpoint: str | os.PathLike[str], adapter_name: str, transaction: Transaction | None = None
) -> Layout:
    """Reshape a live adapter to the ranks and scalings of a saved one; its weights are then for the caller to load."""
    adapter = Adapter(model, adapter_name)
    refuse_gates(adapter.sites.values())
    saved = saved_layout(checkpoint, adapter.layout(), adapter.config.init_lora_weights)
    return reshape(adapter, saved, transaction)


@contextmanager
def arriving(
    model: nn.Module, adapter_name: str, source: object, transaction: Transaction, *, whole: bool = True
) -> Iterator[None]:
    """Check the state dict that `model` loads in the block before any of it is copied, and let `transaction` undo the
    copy. If `whole`, the state dict has to hold all of the adapter, only tensors that the model has, and finite
    numbers.

    Raises:
        CheckpointError: it does not.
    """
    ours = {id(p) for p in Adapter(model, adapter_name, shards=True).parameters()} if whole else set()

    def look(state: Mapping[str, Tensor], *_: object) -> None:
        live: dict[str, Tensor] = model.state_dict(keep_vars=True)
        if whole:
            needed = [key for key, t in live.items() if id(t) in ours or f".modules_to_save.{adapter_name}." in key]
            for key in [*needed, *state]:
                if problem := _misfit(state.get(key), live.get(key)):
                    raise CheckpointError(f"{source}: {key} {problem}; nothing was loaded")
        for key in state:
            if key in live:
                transaction.tensor(live[key], live[key].detach())

    handle = model._register_load_state_dict_pre_hook(look)
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as e:  # PEFT's and torch's own words for what does not fit
        if not whole:
            raise
        raise CheckpointError(f"{source}: cannot be loaded ({e!s:.300}); nothing was loaded") from e
    finally:
        handle.remove()


def _misfit(saved: Tensor | None, live: Tensor | None) -> str | None:
    if saved is None:
        return "is missing"
    if live is None:
        return "has no place in the model"
    if saved.shape != live.shape:
        return f"is {list(saved.shape)} there and {list(live.shape)} in the model"
    return None if saved.isfinite().all() else "has NaN or infinite values"


def saved_layout(checkpoint: str | os.PathLike[str], live: Layout, init: Any = True) -> Layout:
    """Return the layout of a saved adapter for a live one that started with `init`. Modules that it lacks have rank
    0."""
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
    for name, slot in saved.items():
        if _sizes(slot) != _sizes(live[name]):
            raise CheckpointError(
                f"{checkpoint}: {name} is {_sizes(slot)} there and {_sizes(live[name])} in the model; it is an adapter "
                "of another base model"
            )
    return Layout({name: saved.get(name, replace(slot, rank=0)) for name, slot in live.items()})


def _sizes(slot: Slot) -> str:
    experts = f"{slot.experts} experts of " if slot.experts > 1 else ""
    return f"{experts}{slot.in_features} to {slot.out_features}"


def incomplete(checkpoint: Path, adapter_name: str) -> str | None:
    """The reason why the Trainer cannot resume from a checkpoint of ours (a killed process or a full disk may leave one
    in parts); None where it is whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_bytes())
        if (state := load_state(checkpoint)) is None:
            return f"it has no {FOLDER} folder with the ranks it had come to"
        ranks = PeftAdapter(adapter_folder(checkpoint, adapter_name), any_init=True).layout.ranks
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE}, which is written last"
    except (OSError, ValueError) as e:
        return f"its {TRAINER_STATE} is damaged ({e})"
    except (AdapterError, CheckpointError) as e:
        return str(e)
    for name, slot in Layout.from_json(state["layout"]).items():
        if name not in state["held"] and (rank := ranks.get(name, 0)) != slot.rank:
            return (
                f"its {FOLDER} folder is of another save: {name} has rank {slot.rank} in it and {rank} in the adapter"
            )
    cut = [file.name for kind in _TORCH_FILES for file in checkpoint.glob(kind) if not zipfile.is_zipfile(file)]
    return f"its {cut[0]} is cut short" if cut else None


def checkpoint_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the training checkpoint that an adapter folder is, or is in (as for adapters not named `default`), or
    None."""
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
