"""The door for transformers' Trainer. The only file that imports it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from rankflow.adapters import Adapter
from rankflow.config import PolicyLike, load_policy
from rankflow.controller import Controller
from rankflow.errors import CheckpointError, ConfigError
from rankflow.ledger import Ledger
from rankflow.resume import load_state, match_layout, save_state


class RankFlowCallback(TrainerCallback):
    """Manages the ranks of a PEFT LoRA adapter while the Trainer trains it.

    ::

        Trainer(model=peft_model, ..., callbacks=[RankFlowCallback("increlora")])

    Total steps come from the Trainer; ranks go through its own log; its checkpoints carry a `rankflow` folder, and
    `resume_from_checkpoint` and `load_best_model_at_end` work across changed ranks.

    Args:
        policy: path of a policy file, name of a shipped one, a dict of the same shape, or an object.
        adapter_name: which adapter of the model.
        seed: of new directions; the Trainer's seed when left out.
        ledger: path of the JSONL record, or a Ledger; `<output_dir>/rankflow.jsonl` when left out.
        batches, outer_batches, loss_fn: for policies that study data.
        on_unknown_state: `error` or `reset`, for optimizer state nobody knows how to resize.
        best: which checkpoints may be the best one. `at_budget`: only those within the lifecycle's final budget, and
            early stopping counts its patience from there. `any`: the Trainer's own behaviour.

    Give it to the Trainer's constructor; one added later cannot prepare a resume across changed ranks.
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
        on_unknown_state: Literal["error", "reset"] = "error",
        best: Literal["at_budget", "any"] = "at_budget",
    ):
        if best not in ("at_budget", "any"):
            raise ConfigError(f"best: {best!r} is neither 'at_budget' nor 'any'")
        self.lifecycle = load_policy(policy)
        self.adapter_name = adapter_name
        self.seed = seed
        self.ledger = ledger
        self.best = best
        self.flow: Controller | None = None
        self._options = {
            "batches": batches,
            "outer_batches": outer_batches,
            "loss_fn": loss_fn,
            "on_unknown_state": on_unknown_state,
        }
        self._loaded: str | None = None  # the checkpoint whose weights the model was last given
        self._wrapped: nn.Module | None = None
        self._over_budget = False  # at the last evaluation

    # -- before training ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model = kwargs.get("model")
        if model is not None:
            Adapter(model, self.adapter_name)  # a model without LoRA is refused here, not an epoch later
            self._wrap_load(model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if optimizer is None:
            raise ConfigError("the Trainer has no optimizer of its own here (DeepSpeed?); rankflow cannot resize it")
        if self.flow is not None:
            # A second train(), or auto_find_batch_size starting over: a new run from the ranks there are.
            self.flow.detach()
        late = self._wrapped is not model
        if late:
            self._wrap_load(model)
        self._over_budget = False
        ledger = self.ledger if self.ledger is not None else Path(args.output_dir) / "rankflow.jsonl"
        self.flow = Controller(
            model,
            optimizer,
            self.lifecycle,
            total_steps=state.max_steps,
            adapter_name=self.adapter_name,
            ledger=ledger if isinstance(ledger, Ledger) else Ledger(ledger),
            seed=args.seed if self.seed is None else self.seed,
            state=self._saved_state(state, late) if state.global_step > 0 else None,
            **self._options,
        )
        if self.best == "any" and args.load_best_model_at_end:
            self._warn_any()
        self._forget_best(state)
        _log_first(self)

    def _saved_state(self, state: TrainerState, late: bool) -> dict[str, Any]:
        if late or self._loaded is None:
            raise CheckpointError(
                f"training resumes at step {state.global_step} but RankFlowCallback joined the Trainer too late to see "
                "the checkpoint load; pass it as Trainer(callbacks=[...])"
            )
        saved = load_state(self._loaded)
        if saved is None:
            raise CheckpointError(
                f"{self._loaded} was saved without RankFlowCallback and does not say how far its ranks had come; "
                "start anew from its adapter instead: rankflow.restore(model, checkpoint), then train()"
            )
        return saved

    def _wrap_load(self, model: nn.Module) -> None:
        """Reshape before PEFT loads: it would refuse tensors of other ranks, and ignores the saved scaling."""
        load = getattr(model, "load_adapter", None)
        if load is None or self._wrapped is model:
            return

        def load_adapter(model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            if adapter_name == self.adapter_name and adapter_name in getattr(model, "peft_config", {}):
                match_layout(model, model_id, adapter_name)
                self._loaded = os.fspath(model_id)
                result = load(model_id, adapter_name, *args, **kwargs)
                self._follow(self._loaded)
                return result
            return load(model_id, adapter_name, *args, **kwargs)

        model.load_adapter = load_adapter  # type: ignore[assignment]
        self._wrapped = model

    def _follow(self, checkpoint: str) -> None:
        """The best checkpoint was loaded at the end of training: ranks and ledger are now that checkpoint's."""
        saved = load_state(checkpoint)
        if self.flow is not None and self.flow.attached and saved is not None:
            self.flow.load_state_dict(saved)

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
        if self.flow is not None and state.is_world_process_zero:
            save_state(self.flow, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._forget_best(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        logs = kwargs.get("logs")
        if self.flow is not None and logs is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(self.flow.metrics())
            if state.log_history:
                state.log_history[-1].update(self.flow.metrics())

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.flow is not None:
            self.flow.finish()

    # -- best model -----------------------------------------------------------------------------------------------

    def _forget_best(self, state: TrainerState) -> None:
        """A checkpoint above the final budget is no candidate: the next evaluation starts the comparison anew.

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


def _log_first(callback: RankFlowCallback) -> None:
    """Move `callback` ahead of the reporters, so that what it adds to a log reaches TensorBoard and the others.

    The Trainer hands its callbacks everything but the list they are in; the handler that is calling us holds it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            others = [c for c in handler.callbacks if c is not callback]
            handler.callbacks = [callback, *others]  # a new list: the handler is walking the old one
            return
        frame = frame.f_back
