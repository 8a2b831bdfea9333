"""`rankflow.attach` for training loops of your own, and `rankflow.detach`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from rankflow.config.load import PolicyLike, load_policy
from rankflow.distributed.comm import grouped
from rankflow.distributed.ddp import refuse, unwrapped
from rankflow.distributed.fsdp2 import at_rest
from rankflow.distributed.replicas import processes_of
from rankflow.lora.discover import root_of
from rankflow.observe.compile import compiled_modules
from rankflow.optim.optimizer_state import OnUnknownState
from rankflow.surgery.listeners import Listeners, OnResize
from rankflow.training.attachments import found
from rankflow.training.controller import Controller
from rankflow.training.gradients import PenaltyMode
from rankflow.training.ledger import Ledger
from rankflow.training.options import RunOptions


def detach(model: nn.Module, adapter_name: str = "default") -> None:
    """Take a run off a model when its flow is lost, as after an interrupt in a notebook.

    It does what the flow's own `detach()` does: hooks come off, ranks stay as they are, and gates become part of the
    factors, which changes nothing of what the model computes. Nothing happens where there is no run.

    Raises:
        AdapterError: the model has no such adapter.
    """
    there = found(root_of(unwrapped(model), adapter_name), adapter_name)
    if there is not None:
        there.take_off()


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    policy: PolicyLike,
    *,
    total_steps: int,
    adapter_name: str = "default",
    batches: Iterable[Any] | None = None,
    outer_batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ledger: Ledger | str | os.PathLike[str] | None = None,
    seed: int = 0,
    on_unknown_state: OnUnknownState = "error",
    penalty: PenaltyMode = "gradient",
    state: dict[str, Any] | None = None,
    on_resize: OnResize | None = None,
    timeout: float | None = None,
) -> Controller:
    """Manage the ranks of a PEFT LoRA adapter during training.

    A resize replaces Parameters. Ask `model.parameters()` or `flow.parameters()` for them wherever they are used: a
    list that was made once, for clipping, say, soon holds parameters that nobody trains any more (a warning says so).
    Code that has to keep some is told of resizes by `flow.on_resize(callback)`; `rankflow.averaged_model` makes an
    average of the weights that is resized with them.

    Args:
        model: a PeftModel, or any model that PEFT has put LoRA layers into. Train through it, not through the model
            inside it: gates with noise (`bayesian_lora`) draw it when this one is called.
        optimizer: holds the adapter's parameters; accelerate's wrapper is fine.
        policy: path of a policy file, name of a shipped one, a dict of the same shape, or an object.
        total_steps: optimizer steps of the whole run; percentages in the policy refer to it.
        ledger: path of the JSONL record, or a `Ledger`; kept in memory when left out.
        state: the `state_dict()` of the controller to go on from, once model and optimizer hold that checkpoint's
            tensors again.
        on_resize: the first callback for `flow.on_resize`, which hears of resizes before the first step, too.

    The other keywords are the fields of `rankflow.RunOptions`.

    For example:

        flow = rankflow.attach(model, optimizer, "increlora", total_steps=1000)
        for batch in loader:
            model(**batch).loss.backward()
            flow.before_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            flow.after_step()
            optimizer.zero_grad()
        flow.finish()

    A flow that is dropped without `finish()` or `detach()` takes no further step: ranks stay, and a policy's gates stay
    in the forward pass, without noise and untrained. When the model is attached to again they become part of the
    factors, with a warning; `rankflow.detach(model)` does the same at once.

    Raises:
        ConfigError, AdapterError, OptimizerError: before anything is changed.
        DistributedError: processes that train together have different settings, seeds, steps, versions or ranks, or do
            not all attach; from every later call, they have parted.
    """
    refuse(model)
    at_rest(model)
    listeners = Listeners()
    if on_resize is not None:
        listeners.add(on_resize)
    options = RunOptions(
        adapter_name=adapter_name,
        batches=batches,
        outer_batches=outer_batches,
        loss_fn=loss_fn,
        seed=seed,
        on_unknown_state=on_unknown_state,
        penalty=penalty,
        timeout=timeout,
    )
    return Controller(
        unwrapped(model),
        optimizer,
        load_policy(policy),
        options,
        total_steps=total_steps,
        ledger=own_ledger(ledger),
        state=state,
        listeners=listeners,
        processes=partial(processes_of, model, timeout=timeout),
        compiled=compiled_modules(model),
    )


def own_ledger(ledger: Ledger | str | os.PathLike[str] | None) -> Ledger:
    """The ledger of this process: on disk in process 0, in memory in all others."""
    if isinstance(ledger, Ledger):
        return ledger
    return Ledger(ledger if not grouped() or dist.get_rank() == 0 else None)
