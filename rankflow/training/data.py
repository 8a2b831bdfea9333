"""The data a run was given: batches for studies of the model, and held-out ones for gates that learn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn

from rankflow.distributed.single import SingleProcess
from rankflow.errors import ConfigError
from rankflow.gating.held_out import HeldOut
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.observe.study import check_loss, model_loss, run_study, surroundings, with_a_batch
from rankflow.policies.lifecycle import Phase
from rankflow.policies.observation import Observation, Study
from rankflow.training.options import RunOptions

_ARGUMENTS = {"train": "batches", "outer": "outer_batches"}  # what gives the data of a split


class RunData:
    """`batches`, `outer_batches` and `loss_fn` of a run (see `RunOptions`)."""

    def __init__(self, model: nn.Module, adapter: Adapter, options: RunOptions):
        self.model = model
        self.held_out: HeldOut | None = None
        self._adapter = adapter
        self._loss_fn = options.loss_fn
        self._splits = {"train": options.batches, "outer": options.outer_batches}

    @property
    def trains_more(self) -> bool:
        """Whether parameters outside of the adapter train."""
        own = {id(p) for p in self._adapter.parameters()}
        return any(p.requires_grad and id(p) not in own for p in self.model.parameters())

    def require(self, phases: Iterable[Phase], seed: int) -> None:
        """Check that the data that phases need was given, and hold the held-out batches ready.

        Raises:
            ConfigError: a phase needs data that was not given, or that holds no batch.
        """
        for phase in phases:
            self._require(phase)
        outer = self._splits["outer"]
        self.held_out = HeldOut(outer, seed) if outer is not None else None

    def _require(self, phase: Phase) -> None:
        gate = phase.policy.gate
        splits = {study.split for study in phase.policy.studies}
        if gate is not None and gate.trained_on == "outer":
            if self._splits["outer"] is None:
                raise ConfigError(
                    f"policy {phase.name} trains its gates on held-out batches of the training data; give them with "
                    "outer_batches=..."
                )
            splits.add("outer")
        for study in phase.policy.studies:
            if self._splits[study.split] is None:
                raise ConfigError(
                    f"policy {phase.name} studies {study.batches} batches ({study.name}); "
                    f"give them with {_ARGUMENTS[study.split]}=..."
                )
        for split in splits:
            data = self._splits[split]
            assert data is not None, "checked above"
            self._splits[split] = with_a_batch(data, _ARGUMENTS[split])

    def study(
        self, study: Study, processes: SingleProcess, seed: int, step: int, transaction: Transaction | None
    ) -> Observation:
        """Run a study and return what it saw over the batches of all processes; the model is left as it was."""
        data = self._splits[study.split]
        assert data is not None, "checked at attach"
        if transaction is not None:
            transaction.undo(surroundings(self.model, self._adapter))
        study_of = (study, self._adapter, self.model, data, self._loss_fn)
        work = partial(run_study, *study_of, seed=seed, step=step)
        return processes.average(processes.attempt(work))

    def next_outer(self, transaction: Transaction | None) -> Any:
        """The next held-out batch."""
        held_out = self.held_out
        assert held_out is not None, "checked at attach"
        if transaction is not None:
            transaction.undo(partial(setattr, held_out, "position", held_out.position))
            transaction.undo(surroundings(self.model, self._adapter))
        return held_out.take()

    def loss_of(self, batch: Any) -> Callable[[], Tensor]:
        """A function that returns the loss of a held-out batch."""
        loss_fn = self._loss_fn if self._loss_fn is not None else model_loss
        batch = send_to_device(batch, next(iter(self._adapter.parameters())).device)

        def loss() -> Tensor:
            value = loss_fn(self.model, batch)
            check_loss(value, "held-out batch")
            return value

        return loss
