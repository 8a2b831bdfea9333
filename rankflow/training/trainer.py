"""The callback for transformers' Trainer."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import get_verbosity

from rankflow.config.load import PolicyLike, load_policy
from rankflow.distributed.ddp import sharded
from rankflow.distributed.replicas import processes_of
from rankflow.errors import ConfigError
from rankflow.linalg.random import keyed_generator
from rankflow.lora.adapter import Adapter
from rankflow.observe.compile import compiled_modules
from rankflow.surgery.listeners import Listeners, OnResize
from rankflow.training.attach import own_ledger
from rankflow.training.checkpoint import save_state
from rankflow.training.checks import check_managed
from rankflow.training.controller import Controller
from rankflow.training.ledger import Ledger
from rankflow.training.options import RunOptions
from rankflow.training.trainer_patches import (
    callbacks,
    caller,
    folder_name,
    follow_ranks_when_loading,
    keep_whole_checkpoints,
    loaded,
    log_first,
    state_to_resume,
)


class RankFlowCallback(TrainerCallback):
    """Manage the ranks of a PEFT LoRA adapter while the Trainer trains it.

        Trainer(model=peft_model, ..., callbacks=[RankFlowCallback("increlora")])

    Total steps come from the Trainer; ranks go through its own log; its checkpoints carry a `rankflow` folder, and
    `resume_from_checkpoint` and `load_best_model_at_end` work across changed ranks.

    A resize replaces Parameters: callbacks and optimizers of your own that keep some are told of it by `on_resize`, and
    `rankflow.averaged_model` makes an average of the weights that is resized with them. A warning names what still
    holds old ones.

    Args:
        policy: path of a policy file, name of a shipped one, a dict of the same shape, or an object.
        seed: of new directions; the Trainer's seed when left out.
        ledger: path of the JSONL record, or a Ledger; `<output_dir>/rankflow.jsonl` when left out.
        batches: what policies study; left out, some of the Trainer's own training data, drawn by the seed. What the
            Trainer trains on stays as it is.
        holdout: share of the Trainer's training data that is set aside for a policy that learns from held-out batches,
            where no `outer_batches` are given. The Trainer then trains on the rest.
        best: which checkpoints may be the best one. `at_budget`: only those within the lifecycle's final budget, and
            early stopping counts its patience from there (with `save_strategy="best"`, evaluations before that all
            save). `any`: the Trainer's own behaviour.

    The other keywords are fields of `rankflow.RunOptions`.

    Raises:
        ConfigError: the policy is wrong, here; or cannot do its job with this model and run, at train().
    """

    def __init__(
        self,
        policy: PolicyLike,
        *,
        adapter_name: str = "default",
        seed: int | None = None,
        ledger: Ledger | str | os.PathLike[str] | None = None,
        batches: Iterable[Any] | None = None,
        outer_batches: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        holdout: float = 0.2,
        on_unknown_state: Literal["error", "reset"] = "error",
        best: Literal["at_budget", "any"] = "at_budget",
        timeout: float | None = None,
    ):
        if best not in ("at_budget", "any"):
            raise ConfigError(f"best: {best!r} is neither 'at_budget' nor 'any'")
        if not 0 < holdout < 1:
            raise ConfigError(f"holdout: {holdout} is not a share between 0 and 1")
        self.options = RunOptions(
            adapter_name=adapter_name,
            batches=batches,
            outer_batches=outer_batches,  # or made from each Trainer's data
            loss_fn=loss_fn,
            on_unknown_state=on_unknown_state,
            timeout=timeout,
        )
        self.lifecycle = load_policy(policy)
        self.holdout = holdout
        self.seed = seed
        self.ledger = ledger
        self.best = best
        self.flow: Controller | None = None
        self._outer_batches = outer_batches
        self._over_budget = False  # at the last evaluation
        self.listeners = Listeners()
        self._state: TrainerState | None = None  # of the Trainer that trains
        callbacks.add(self)
        follow_ranks_when_loading()
        keep_whole_checkpoints()

    @property
    def adapter_name(self) -> str:
        return self.options.adapter_name

    def on_resize(self, callback: OnResize) -> RemovableHandle:
        """Call `callback` as `Controller.on_resize` says, in this and every later train(); also before the first."""
        return self.listeners.add(callback)

    # -- before training ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model = kwargs.get("model")
        if model is not None:
            # Refused here, not an epoch later; an optimizer that the Trainer makes by itself is there at train() only
            how, optimizer = self.options.on_unknown_state, kwargs.get("optimizer")
            check_managed(Adapter(model, self.adapter_name), self.lifecycle, optimizer, how)
        if self._outer_batches is None and any(p.held_out for _, p, _ in self.lifecycle.policies):
            self._hold_out(args)

    def _hold_out(self, args: TrainingArguments) -> None:
        """Set a part of the training data aside, before any DataLoader is made of it."""
        trainer = caller(Trainer)
        data: Any = trainer.train_dataset if trainer is not None else None
        if trainer is None or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ConfigError(
                "this policy learns from held-out batches, and the training data cannot be split by index; give a part "
                "of them with outer_batches=..."
            )
        order = torch.randperm(len(data), generator=keyed_generator(self._seed(args), "held out")).tolist()
        size = max(1, round(self.holdout * len(order)))
        outer, rest = order[:size], sorted(order[size:])
        if not rest:
            raise ConfigError(f"{len(order)} training examples cannot be split; give outer_batches=...")
        self.options = replace(self.options, outer_batches=_loader(trainer, outer))
        trainer.train_dataset = _part(data, rest)

    def _own_batches(self, args: TrainingArguments, total_steps: int) -> Iterable[Any] | None:
        """Return batches of the Trainer's training data for studies, drawn by the seed, or None if there are none. The
        batches that the Trainer trains on are what they would be."""
        policies = [policy.in_run(total_steps, True) for _, policy, _ in self.lifecycle.policies]
        most = max((s.batches for policy in policies for s in policy.studies if s.split == "train"), default=0)
        if most == 0:
            return None
        trainer = caller(Trainer)
        data: Any = trainer.train_dataset if trainer is not None else None
        if trainer is None or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ConfigError(
                f"this policy looks at {most} batches, and the training data cannot be taken by index; give some of "
                "them with batches=..."
            )
        order = torch.randperm(len(data), generator=keyed_generator(self._seed(args), "batches"))
        size = args.per_device_train_batch_size
        return _Whole(_loader(trainer, order[: most * args.world_size * size * max(1, args.n_gpu)].tolist(), size))

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if optimizer is None:
            raise ConfigError("the Trainer has no optimizer of its own here (DeepSpeed?); rankflow cannot resize it")
        if sharded(model) and args.max_grad_norm:
            raise ConfigError(
                "the Trainer clips gradients before callbacks can reduce those of an adapter whose base is sharded; "
                "set max_grad_norm=0, or use rankflow.attach in a loop of your own"
            )
        if sharded(model):
            Adapter(model, self.adapter_name)  # refused in shards: the Trainer's checkpoints would not have it whole
        if self.flow is not None:
            # A second train(), or auto_find_batch_size starting over: a new run from the ranks there are.
            self.flow.detach()
        for other in list(callbacks):  # of a Trainer that was interrupted: this one trains now
            flow = other.flow
            if flow is not None and flow.attached and (flow.model, flow.adapter_name) == (model, self.adapter_name):
                flow.detach()
        self._state = state
        ledger = self.ledger if self.ledger is not None else Path(str(args.output_dir)) / "rankflow.jsonl"
        batches = self.options.batches
        if batches is None:
            batches = self._own_batches(args, state.max_steps)
        self.flow = Controller(
            model,
            optimizer,
            self.lifecycle,
            replace(self.options, seed=self._seed(args), batches=batches),
            total_steps=state.max_steps,
            ledger=own_ledger(ledger),
            state=state_to_resume(model, state) if state.global_step > 0 else None,
            listeners=self.listeners,
            processes=functools.partial(processes_of, model, timeout=self.options.timeout),
            compiled=compiled_modules(model) or int(bool(args.torch_compile)),
        )
        if self.best == "any" and args.load_best_model_at_end:
            self._warn_any()
        self._over_budget = state.global_step > 0 and not self.flow.within_budget
        self._forget_best(state)
        log_first(self)

    # -- while training -------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.flow is not None:
            self.flow.before_step()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._forget_best(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.flow is not None:
            self.flow.after_step()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._over_budget = self.flow is not None and not self.flow.within_budget
        self._forget_best(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._forget_best(state)  # in the processes that have not saved it

    def save_beside(self, state: TrainerState, file: Path) -> None:
        """Save the rank state before the Trainer writes `state` into `file`, the last one of a checkpoint. So it is
        there before the Trainer removes older checkpoints, which it does before `on_save`."""
        if state is self._state and self.flow is not None and file.parent.name == folder_name(state):
            self._forget_best(state)
            save_state(self.flow, file.parent)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        logs = kwargs.get("logs")
        if self.flow is not None and logs is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(self.flow.metrics())
            if state.log_history:
                state.log_history[-1].update(self.flow.metrics())

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.flow is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer looks in the checkpoint's root alone, where PEFT puts "default" and no other adapter.
            best, model = Path(state.best_model_checkpoint), kwargs["model"]
            if loaded.get(model) != best and (best / self.adapter_name).is_dir():
                model.load_adapter(str(best), self.adapter_name, is_trainable=True)
        summary = self.flow.finish()
        if state.is_world_process_zero and not _quiet():
            print(summary)

    # -- best model -----------------------------------------------------------------------------------------------

    def _forget_best(self, state: TrainerState) -> None:
        """Take back that a checkpoint above the final budget is the best: the next evaluation starts the comparison
        anew.

        The Trainer notes the best metric after `on_evaluate`, where no callback runs, so it is taken back at the next
        chance. Early stopping compares with the same number and starts counting when there is none.
        """
        if self.best == "at_budget" and self._over_budget:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def _warn_any(self) -> None:
        assert self.flow is not None
        budgets = [p.policy.budget for p in self.flow.phases if p.policy.budget is not None]
        if len(budgets) > 1:
            warnings.warn(
                f"best='any': the best model may be one at {budgets[0].kind} {budgets[0].amount:g} though the run ends "
                f"at {budgets[-1].kind} {budgets[-1].amount:g}",
                stacklevel=3,
            )


class _Whole:
    """Batches of a loader, all of them taken at once: accelerate's takes one that is left half-way for the one that the
    Trainer trains on."""

    def __init__(self, loader: Iterable[Any]):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._loader))


def _part(data: Any, indices: list[int]) -> Any:
    return data.select(indices) if hasattr(data, "select") else Subset(data, indices)


def _loader(trainer: Trainer, indices: list[int], size: int | None = None) -> Iterable[Any]:
    """Return a loader of these training examples, in this order, made as the Trainer makes those of evaluations; in
    batches of their size, or of `size`."""
    # The Trainer would keep a loader with persistent workers, and then evaluate on it.
    args = trainer.args
    given = args.dataloader_persistent_workers, args.per_device_eval_batch_size
    try:
        args.dataloader_persistent_workers = False
        args.per_device_eval_batch_size = given[1] if size is None else size
        return trainer.get_eval_dataloader(_part(trainer.train_dataset, indices))
    finally:
        args.dataloader_persistent_workers, args.per_device_eval_batch_size = given


def _quiet() -> bool:
    """Whether not to print the summary: transformers was told to be quiet (`log_level`), or `logging` shows it
    already."""
    return get_verbosity() > logging.WARNING or logging.getLogger("rankflow").isEnabledFor(logging.INFO)
