"""What a run has put on a model, which the next run finds there even if the first one is gone."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from rankflow.distributed.single import SingleProcess
from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.observe.probes import Probes
from rankflow.surgery.surgeon import Surgeon

if TYPE_CHECKING:
    from rankflow.training.controller import Controller

_ON_MODEL = "_rankflow_runs"  # attribute of the module that an adapter is in: adapter name -> Attachment


class _Attachments(dict[str, "Attachment"]):
    """The attachments of a model; a copy of it, or what is saved of it, has none."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (dict, ())


class Attachment:
    """Hooks, probes and gates of one run on one adapter.

    The model holds on to it, and it to the run by a weak reference alone: a run that nobody has any more can take no
    further step. It falls silent then (nothing is recorded, gates draw no noise and stay where they are), and what it
    has put on the model comes off when that is attached to again, or by `rankflow.detach`.
    """

    def __init__(self, run: Controller, adapter: Adapter, surgeon: Surgeon, probes: Probes, processes: SingleProcess):
        self.run = weakref.ref(run)
        self.hooks: list[Any] = []
        self._adapter = adapter
        self._surgeon = surgeon
        self._probes = probes
        self._processes = processes
        weakref.finalize(run, self._fall_silent).atexit = False

    def put_on(self) -> None:
        """Note this attachment on the model."""
        vars(self._adapter.root).setdefault(_ON_MODEL, _Attachments())[self._adapter.name] = self

    def take_off(self) -> None:
        """Do what `Controller.detach` says. Where it failed halfway, a second call takes off the rest."""
        gates = self._surgeon.gates
        try:
            if not self._adapter.sharded:
                gates.fold()
                if self._surgeon.masked_ranks and self._surgeon.set_capacity({}):
                    self._processes.undone()
            elif gates:
                gates.remove()
                warnings.warn("the run was given up, and its gates are not in the factors", stacklevel=3)
        finally:
            for hook in self.hooks:
                hook.remove()
            self.hooks.clear()
            self._probes.disarm()
            if found(self._adapter.root, self._adapter.name) is self:
                del vars(self._adapter.root)[_ON_MODEL][self._adapter.name]

    @property
    def gates(self) -> str:
        """A part of a sentence that says what becomes of the gates when this is taken off; empty without gates."""
        gate = self._surgeon.gates.gate
        if gate is None:
            return ""
        fate = "are not in the factors" if self._adapter.sharded else "have become part of the factors"
        return f", and its gates ({type(gate).__name__}) {fate}"

    def _fall_silent(self) -> None:
        self._probes.disarm()
        self._surgeon.gates.fall_silent()


def found(root: nn.Module, adapter_name: str) -> Attachment | None:
    """The attachment on the adapter, if there is one."""
    return vars(root).get(_ON_MODEL, {}).get(adapter_name)


def make_way(adapter: Adapter) -> None:
    """Take what is left of a dropped run off the adapter, and warn of it.

    Raises:
        ConfigError: somebody still has the run that manages it.
    """
    there = found(adapter.root, adapter.name)
    if there is None:
        return
    if there.run() is not None:
        gc.collect()  # it may have been dropped in a ring of references: with its Trainer, say
    if (run := there.run()) is not None:
        raise ConfigError(
            f"adapter {adapter.name!r} of this model is managed by a run that is not over (step {run.step} of "
            f"{run.total_steps}). To go on with it, as after an interrupted cell of a notebook, go on calling that "
            "flow; to begin anew, call its finish() or detach(), or rankflow.detach(model) if you do not have it any "
            "more: ranks stay as they are, and its gates, if any, become part of the factors"
        )
    gates = there.gates
    there.take_off()
    warnings.warn(
        f"a run on adapter {adapter.name!r} was dropped without finish(); it was taken off the model{gates}",
        stacklevel=4,
    )
