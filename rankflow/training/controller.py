"""The controller of a run: what training loops call, and in which order things happen within a step."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankflow.distributed.settings import settings_in_force
from rankflow.distributed.single import SingleProcess
from rankflow.lora.adapter import Adapter
from rankflow.lora.capacity import lasting
from rankflow.lora.transaction import Transaction
from rankflow.observe.compile import warn_of_recompiles
from rankflow.observe.hearing import Hearing
from rankflow.observe.probes import Probes
from rankflow.optim.introspection import innermost
from rankflow.plans.layout import Layout
from rankflow.policies.idleness import idle_phases, late_phases
from rankflow.policies.lifecycle import Lifecycle, Phase
from rankflow.policies.observation import Observation
from rankflow.surgery.listeners import Listeners, OnResize
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.attachments import Attachment, make_way
from rankflow.training.checks import check_capacity, check_managed, check_shards, check_signals
from rankflow.training.data import RunData
from rankflow.training.gradients import (
    add_penalty_gradient,
    penalty_term,
    scale_in_force,
    share_gradients,
    unscaled,
)
from rankflow.training.ledger import Ledger
from rankflow.training.options import RunOptions
from rankflow.training.phases import Phases
from rankflow.training.state import check_seal, go_on, reshape, state_of
from rankflow.training.summary import Summary, metrics_of, summarise

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Controller:
    """Run a lifecycle on one adapter of a live model. Use it through `rankflow.attach` or `RankFlowCallback`.

    Call `before_step` when gradients are ready and `after_step` once the optimizer has stepped. Steps are counted on
    the innermost optimizer itself, so gradient accumulation and steps skipped by a loss scaler never age anything.
    With `state`, a `state_dict` of an earlier controller, it goes on from there (see `load_state_dict`). `compiled` is
    how many of the model's modules run under torch.compile, to warn of decisions that it would not keep up with.

    Raises:
        ConfigError: the policy cannot do its job here: a budget out of reach, data or a loss that was not given.
        AdapterError, OptimizerError: the model or the optimizer cannot be managed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lifecycle: Lifecycle,
        options: RunOptions,
        *,
        total_steps: int,
        ledger: Ledger | None = None,
        state: dict[str, Any] | None = None,
        listeners: Listeners | None = None,
        processes: Callable[[Adapter], SingleProcess] = lambda adapter: SingleProcess(),
        compiled: int = 0,
    ):
        seed = options.seed
        self._adapter = Adapter(model, options.adapter_name, shards=True)
        make_way(self._adapter)
        check_managed(self._adapter, lifecycle, optimizer, options.on_unknown_state)
        self._processes = processes(self._adapter)
        self._processes.start(
            settings_in_force(
                lifecycle,
                self._adapter.layout(),
                **options.alike(),
                total_steps=total_steps,
                optimizer=type(innermost(optimizer)).__name__,
                state=None if state is None else f"of step {state.get('step')}",
            )
        )
        self.model = model
        self.lifecycle = lifecycle
        self.ledger = ledger if ledger is not None else Ledger()
        data = RunData(model, self._adapter, options)
        self._penalty = options.penalty
        self._optimizer = innermost(optimizer)
        self._scaler = getattr(optimizer, "scaler", None)  # accelerate's wrapper knows its own, and where it is
        self._accumulating = getattr(optimizer, "gradient_state", None)

        self._surgeon = Surgeon(
            self._adapter,
            self._optimizer,
            seed=seed,
            on_unknown_state=options.on_unknown_state,
            listeners=listeners,
        )
        self._gates = self._surgeon.gates
        self._gates.average_gradients = self._processes.average_gradients
        self._probes = Probes(self._adapter, gate_signals=self._gates.signals, seed=seed)
        self._hearing = Hearing(self._adapter)
        state = check_seal(state) if state is not None else None
        first_layout = Layout.from_json(state["first_layout"]) if state else self._surgeon.layout
        layout, phases = lifecycle.resolve(total_steps, first_layout, trains_more=data.trains_more)
        data.require(phases, seed)
        check_signals(self._probes, phases)
        check_shards(self._adapter, lifecycle, phases, in_loss=options.penalty == "in_loss", resumes=state is not None)
        if lifecycle.mode == "mask":
            check_capacity(phases, layout, self._surgeon.optimizer_state)
            layout = lasting(self._adapter, layout)
        if state is None:
            said = [*idle_phases(layout, phases), *late_phases(phases, total_steps)] if self._processes.leads else []
            if said:
                warnings.warn("\n".join(said), stacklevel=3)
            self._surgeon.layout = layout
        self._surgeon.ramps.hold(lifecycle.rate_rank(layout, phases), capped=lifecycle.step == "capped")

        self._phases = Phases(
            lifecycle,
            phases,
            self._surgeon,
            self._probes,
            self._hearing,
            self._processes,
            self.ledger,
            data,
            seed=seed,
            total_steps=total_steps,
            first_layout=first_layout,
        )
        warn_of_recompiles(compiled, self._phases.decisions_on_shapes(0 if state is None else state["step"]))
        self._steps_open = 0  # begun and not ended; one that raised never ends
        self._attachment = Attachment(self, self._adapter, self._surgeon, self._probes, self._processes)
        self._ended = False  # its `finish` is in the ledger
        try:
            hooks = self._attachment.hooks
            hooks.append(self._optimizer.register_step_pre_hook(_while_there(self._step_begins)))
            hooks.append(self._optimizer.register_step_post_hook(_while_there(self._step_ends)))
            self._attachment.put_on()
            self.listeners.start(self._adapter)
            self._wholly(partial(self._begin, state))
        except BaseException:
            self.detach()
            raise

    # -- what a training loop calls ---------------------------------------------------------------------------------

    def before_step(self, scaler: Any = None) -> None:
        """Read signals and add the penalty's gradient. Call it when gradients are ready, after all micro-batches.

        Pass the GradScaler of an own fp16 loop, before or after `unscale_`; accelerate's is found by itself. Where the
        base model is sharded over processes, this reduces the adapter's gradients: call it before `unscale_` and before
        they are clipped.
        """
        self._steps_open = 0
        if self._accumulating is not None and not self._accumulating.sync_gradients:
            return  # accelerate's accumulate(): more micro-batches are to come
        self._surgeon.holders.look()
        self._phases.operations.keep_frozen()
        self._processes.come_to(f"gradients of step {self.step + 1}")
        scaler = scaler if scaler is not None else self._scaler
        self._processes.reduce(self.model, unscaled=unscaled(scaler, self._optimizer))
        penalised = self._penalty == "gradient" and self._phases.policy.penalty is not None
        if self._adapter.sharded and (penalised or self._probes.on_gradients or self.layout.sharing):
            with Transaction() as transaction, self._processes.gathered(None, transaction):
                self._observe(scaler, penalised)
        else:
            self._observe(scaler, penalised)

    def _observe(self, scaler: Any, penalised: bool) -> None:
        upcoming = self._phases.counted + 1
        when = self._phases.all[self._phases.index_of(upcoming)].policy.when
        early = not self._hearing.reached and len(when.events) > 0  # before gates close, behind which all is 0
        self._hearing.listen(closely=early or when.due(upcoming) or self._probes.armed)
        if self._probes.armed and not self._adapter.enabled:
            self._probes.disarm()
        if self._probes.armed or self._gates:
            # They heard the backward pass, which ran at the loss scale whatever has been unscaled since.
            scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
            self._gates.collect(scale)
            self._phases.pending = self._collect(scale) if self._probes.armed else None
        share_gradients(self._adapter, self.layout)
        if penalised:
            add_penalty_gradient(self._phases.policy, self._adapter, scale_in_force(scaler, self._optimizer))

    def _collect(self, scale: float) -> Observation:
        """Collect what the probes of all processes heard."""
        heard = self._processes.average(self._processes.attempt(lambda: self._probes.collect(scale)))
        return self._hearing.with_silence(heard)

    def after_step(self) -> None:
        """Decide and resize when due. Call it when the optimizer has stepped and gradients are no longer needed.

        A call after which no optimizer step was counted (accumulation, a scaler's skipped step) changes nothing. Nor
        does one that raises: with its cause gone (memory, room on the disk) call it again, before the next step.
        """
        self._steps_open = 0
        if self._phases.counted == self.step:
            observed, self._phases.pending = self._phases.pending, None
            if observed is not None:
                self._phases.listen()
            return
        self._processes.come_to(f"after step {self._phases.counted}")
        self._wholly(self._take_step, factors=self._phases.looks_at_factors())

    def _take_step(self) -> None:
        phases = self._phases
        observed, phases.pending = phases.pending, None
        phases.step = phases.counted
        phases.advance(observed)
        phases.outer_when_due()
        if phases.step + 1 >= phases.phase.end:
            phases.operations.thaw(phases.now)
        phases.listen()

    def _wholly(self, work: Callable[[], object], *, factors: bool = True) -> None:
        """Do all of `work` and write it to the ledger, or leave everything as it was before. Without `factors`, `work`
        may not look at factors that are in shards.

        What is undone is in the transaction alone, and nothing here is left to the end of a generator: an interrupt at
        its last line would have it ended by whoever lets go of the traceback, any number of steps later.
        """
        with Transaction() as transaction:
            self.ledger.begin(transaction)
            with self._gathered(transaction, factors):
                transaction.undo(self._probes.disarm)
                self._surgeon.averages.remember(transaction)
                transaction.keep(self._phases.operations, "frozen")
                transaction.keep(self._phases, "step", "pending", "index", "state")
                transaction.attr(self._phases, "transaction", transaction)
                work()
            self.ledger.write(transaction, self._processes.attempt)
            self._phases.transaction = None

    def _gathered(self, transaction: Transaction, wanted: bool = True) -> AbstractContextManager[None]:
        return self._processes.gathered(self._optimizer, transaction) if wanted else nullcontext()

    def outer_step(self, batch: Any) -> Tensor | None:
        """Update gates that are trained on held-out data with `batch`. Returns its loss, or None where the phase has no
        such gate.

        The controller does this by itself with `outer_batches`; call it for updates beyond those. The model is in eval
        mode and its random numbers are the update's own; the factors, their gradients and everything else stay.
        """
        if not self._gates or self._gates.trained_on != "outer":
            return None
        return self._phases.outer_step(batch)

    def penalty(self) -> Tensor:
        """The policy's penalty as a term of the loss, for controllers made with `penalty="in_loss"`; else 0."""
        return penalty_term(self._phases.policy, self._adapter) if self._penalty == "in_loss" else torch.zeros(())

    def finish(self) -> Summary:
        """End the run: take the hooks off and close the ledger with a `finish` event. Returns and logs a summary. All
        processes have to call it."""
        if self.attached:
            self._processes.come_to(f"finish after step {self.step}")
            self._wholly(self._end)
            if self._processes.leads:
                logger.info(self.summary())
            if not self.within_budget and not self._phases.rewound:
                warnings.warn(
                    f"the run ends at total rank {self.layout.total_rank}, above its final budget: "
                    f"{self.step} of {self.total_steps} steps were taken, or the last decisions were skipped",
                    stacklevel=2,
                )
        self.detach()
        return self.summary()

    def _end(self) -> None:
        self._phases.operations.thaw(self._phases.now)
        self._phases.leave()
        if self._surgeon.masked_ranks:
            self._phases.operations.set_capacity({}, self._phases.now)
        layout = self.layout
        self.ledger.append("finish", self.step, total_rank=layout.total_rank, params=layout.params)
        assert self._phases.transaction is not None
        self._phases.transaction.attr(self, "_ended", True)

    def summary(self) -> Summary:
        """A summary of the run so far."""
        return summarise(self._phases)

    def detach(self) -> None:
        """Take all hooks off the model and make its gates part of the factors; ranks stay as they are.

        Factors in shards keep the capacity that `mode: mask` has given them, and gates go without being folded: whoever
        gives a run up may be alone with it, and waits for nobody. `finish`, which all processes call, does both.
        """
        self._attachment.take_off()

    @property
    def stored(self) -> dict[str, dict[str, Tensor]]:
        """Factors by module in the form that the policy's gates want in files, as they are now or were when gates were
        last folded. Empty for gates that are content with floats."""
        return self._gates.stored()

    @property
    def attached(self) -> bool:
        """Whether neither `finish` nor `detach` was called yet."""
        return bool(self._attachment.hooks) and not self._ended

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.detach()

    # -- what it knows ----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self._surgeon.layout

    @property
    def version(self) -> int:
        """How often parameters were replaced by a resize: those taken at an earlier version are stale."""
        return self._surgeon.version

    @property
    def step(self) -> int:
        """The last optimizer step that `after_step` has dealt with."""
        return self._phases.step

    @property
    def total_steps(self) -> int:
        return self._phases.total_steps

    @property
    def seed(self) -> int:
        return self._phases.seed

    @property
    def phase(self) -> Phase:
        return self._phases.phase

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self._phases.all

    @property
    def adapter_name(self) -> str:
        return self._adapter.name

    def on_resize(self, callback: OnResize) -> RemovableHandle:
        """Call `callback` with (module name, old, new, ops) for each module that a resize changes, and when that is
        undone. The handle's `remove` ends it. See `rankflow.surgery.listeners.Listeners`."""
        return self.listeners.add(callback)

    @property
    def listeners(self) -> Listeners:
        """The callbacks that are told of resizes."""
        return self._surgeon.listeners

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's factors as they are now, in the optimizer's order; after a resize, some are others."""
        return iter(self._adapter.parameters())

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: total and mean rank, parameters, resizes, and the mean rank of each kind of module."""
        return metrics_of(self.layout, self.version)

    @property
    def within_budget(self) -> bool:
        """Whether the layout is already within the last budget of the lifecycle (True where there is none)."""
        budgets = [p.policy.budget for p in self._phases.all if p.policy.budget is not None]
        return not budgets or budgets[-1].spent(self.layout) <= budgets[-1].amount

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on as if it had never stopped, beside model and optimizer: a copy in JSON
        values and tensors on the CPU, with a checksum (`rankflow.training.state`)."""
        return state_of(self._phases)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Model and optimizer must already hold that checkpoint's tensors.

        Where it raises, nothing has changed.

        Raises:
            CheckpointError: damaged, of another format or another policy, or live ranks that are not the checkpoint's.
        """
        self._to(partial(go_on, self._phases, check_seal(state)))

    def go_back(self, layout: Layout, load: Callable[[Transaction], T], state: dict[str, Any]) -> T:
        """Go on from a checkpoint at other ranks: the adapter is reshaped to `layout`, `load` brings its weights, and
        its `state` is taken over as `load_state_dict` does. Parameters stay in the optimizer, their state afresh.

        Where it raises, nothing has changed; `load` writes through the transaction it is given.
        """
        loaded: list[T] = []

        def work() -> None:
            assert self._phases.transaction is not None
            reshape(self._phases, layout)
            loaded.append(load(self._phases.transaction))
            go_on(self._phases, state)

        check_seal(state)
        self._to(work)
        return loaded[0]

    def _to(self, work: Callable[[], object]) -> None:
        """Load another state with `work`, or go on as before where that fails."""
        self._processes.come_to("load_state_dict")
        try:
            self._wholly(work)
        except BaseException:
            self._phases.listen()
            raise

    # -- inside -----------------------------------------------------------------------------------------------------

    def _step_begins(self) -> None:
        """Prepare a step of the optimizer. Does nothing for a step within another, as where a subclass calls
        super().step()."""
        self._steps_open += 1
        if self._steps_open == 1:
            self._surgeon.ramps.before_step()

    def _step_ends(self) -> None:
        self._steps_open -= 1
        if self._steps_open <= 0:
            self._steps_open = 0
            self._surgeon.ramps.after_step()
            self._gates.step()
            self._phases.counted += 1

    def _begin(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self._phases.start()
        else:
            go_on(self._phases, state)


def _while_there(method: Callable[[], None]) -> Callable[..., None]:
    """`method` as a hook of an optimizer, which does not keep the run alive."""
    weakly = weakref.WeakMethod(method)

    def hook(*_: object) -> None:
        if (bound := weakly()) is not None:
            bound()

    return hook
