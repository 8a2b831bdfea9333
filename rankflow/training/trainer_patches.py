"""Patches of the Trainer, and of how it loads checkpoints: those it writes are whole, and have their own ranks."""

from __future__ import annotations

import functools
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankflow.errors import CheckpointError
from rankflow.lora.peft_patches import wrap_loading
from rankflow.lora.transaction import Transaction
from rankflow.training.checkpoint import (
    FOLDER,
    adapter_folder,
    arriving,
    checkpoint_of,
    incomplete,
    load_state,
    match_layout,
    saved_layout,
)
from rankflow.training.controller import Controller

T = TypeVar("T")


class Managing(Protocol):
    """What the patches use of a RankFlowCallback."""

    flow: Controller | None

    @property
    def adapter_name(self) -> str: ...

    def save_beside(self, state: TrainerState, file: Path) -> None: ...


callbacks: weakref.WeakSet[Managing] = weakref.WeakSet()
loaded: weakref.WeakKeyDictionary[nn.Module, Path] = weakref.WeakKeyDictionary()  # model -> checkpoint it was given

_NO_STATE = (
    "If the process was killed while it saved, resume from an earlier checkpoint; if it was saved without "
    "RankFlowCallback, start anew from its adapter: rankflow.restore(model, checkpoint), then train()"
)


def follow_ranks_when_loading() -> None:
    """Let `PeftModel.load_adapter` reshape an adapter before it loads a checkpoint of ours onto it. Other adapters and
    other checkpoints pass through."""
    wrap_loading(_load_adapter)


def _load_adapter(load: Any, model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    checkpoint = checkpoint_of(model_id) if adapter_name in model.peft_config else None
    loaded.pop(model, None)
    if checkpoint is None:
        if adapter_name not in model.peft_config or not callbacks:
            return load(model, model_id, adapter_name, *args, **kwargs)
        try:
            with Transaction() as transaction, arriving(model, adapter_name, model_id, transaction, whole=False):
                return load(model, model_id, adapter_name, *args, **kwargs)
        except RuntimeError as e:
            raise CheckpointError(
                f"{model_id}: its adapter does not fit this one, and it has no {FOLDER} folder with the ranks it "
                f"had come to. {_NO_STATE}"
            ) from e
    folder = str(adapter_folder(model_id, adapter_name))  # the Trainer offers the root, which is where "default" is
    flows = [c.flow for c in callbacks if c.flow is not None and c.flow.attached]
    flow = next((f for f in flows if f.model is model and f.adapter_name == adapter_name), None)

    def bring(transaction: Transaction) -> Any:
        with arriving(model, adapter_name, folder, transaction):
            return load(model, folder, adapter_name, *args, **kwargs)

    state = load_state(checkpoint)
    if flow is None or state is None:
        with Transaction() as transaction:
            match_layout(model, folder, adapter_name, transaction)
            result = bring(transaction)
    else:  # the best model at the end of training: its parameters stay in the optimizer
        init = getattr(model.peft_config[adapter_name], "init_lora_weights", True)
        result = flow.go_back(saved_layout(folder, flow.layout, init), bring, state)
    loaded[model] = checkpoint
    return result


def keep_whole_checkpoints() -> None:
    """Let rank state be in a checkpoint before its last file is, and let training resume from whole checkpoints only.

    Methods are wrapped on their classes, once: no event comes between a checkpoint's files and the removal of older
    ones, nor before a checkpoint to resume from is chosen. Trainers without our callback pass through.
    """
    if hasattr(Trainer.train, "keeps_whole"):
        return
    write, save, train = TrainerState.save_to_json, Trainer._save_checkpoint, Trainer.train

    @functools.wraps(write)
    def save_to_json(self: TrainerState, json_path: str) -> None:
        for callback in list(callbacks):
            callback.save_beside(self, Path(json_path))
        write(self, json_path)

    @functools.wraps(save)
    def _save_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save and any(_ours(self)):  # of an earlier run: no longer whole from here on
            (Path(str(self.args.output_dir)) / folder_name(self.state) / TRAINER_STATE_NAME).unlink(missing_ok=True)
        return save(self, *args, **kwargs)

    @functools.wraps(train)
    def guarded(self: Trainer, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        callback = next(_ours(self), None)
        if callback is not None and resume_from_checkpoint:
            given = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            resume_from_checkpoint = _resumable(given, Path(str(self.args.output_dir)), callback.adapter_name)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    guarded.keeps_whole = True  # type: ignore[attr-defined]
    TrainerState.save_to_json = save_to_json  # type: ignore[method-assign]
    Trainer._save_checkpoint = _save_checkpoint  # type: ignore[method-assign]
    Trainer.train = guarded  # type: ignore[method-assign]


def _ours(trainer: Trainer) -> Iterator[Managing]:
    return (c for c in callbacks if any(c is other for other in trainer.callback_handler.callbacks))


def folder_name(state: TrainerState) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _resumable(given: Path | None, output_dir: Path, adapter_name: str) -> str | bool:
    """The checkpoint to resume from: the `given` one, else the newest in `output_dir` that is whole; True for the
    Trainer to say that there is none.

    Raises:
        CheckpointError: it, or all of them, are not whole.
    """
    if given is not None and not given.is_dir():
        return str(given)
    problems: dict[Path, str] = {}
    for checkpoint in [given] if given is not None else _checkpoints(output_dir):
        problem = incomplete(checkpoint, adapter_name)
        if problem is None:
            for passed, why in problems.items():
                warnings.warn(f"{passed} cannot be resumed from: {why}. Going on from {checkpoint}", stacklevel=3)
            if not any(file.name.startswith("optimizer") for file in checkpoint.iterdir()):
                warnings.warn(
                    f"{checkpoint} was saved without its optimizer (save_only_model): training goes on from its "
                    "weights, ranks and step, but the optimizer's state, the learning rate schedule and random "
                    "numbers begin anew",
                    stacklevel=3,
                )
            return str(checkpoint)
        problems[checkpoint] = problem
    if not problems:
        return True
    others = [c for c in _checkpoints((given or output_dir / "x").parent) if c not in problems]
    whole = next((c for c in others if incomplete(c, adapter_name) is None), None)
    found = f" Resume from {whole}, the newest whole one there." if whole is not None else ""
    said = "; ".join(f"{checkpoint} cannot be resumed from: {why}" for checkpoint, why in problems.items())
    raise CheckpointError(f"{said}.{found} {_NO_STATE}")


def _checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, newest first."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := named.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def state_to_resume(model: nn.Module, state: TrainerState) -> dict[str, Any]:
    checkpoint = loaded.get(model)
    saved = load_state(checkpoint) if checkpoint is not None else None
    if saved is None:
        raise CheckpointError(
            f"training resumes at step {state.global_step} from a checkpoint that does not say how far its ranks had "
            f"come. {_NO_STATE}"
        )
    return saved


def log_first(callback: Any) -> None:
    """Move `callback` ahead of the reporters, so that what it adds to a log reaches TensorBoard and the others.

    The Trainer hands its callbacks everything but the list they are in; the handler that is calling us holds it.
    """
    handler = caller(CallbackHandler)
    if handler is not None:
        others = [c for c in handler.callbacks if c is not callback]
        handler.callbacks = [callback, *others]  # a new list: the handler is walking the old one


def caller(kind: type[T]) -> T | None:
    """The object of that class whose method is calling us, directly or through others; the nearest one."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None
