"""The order of calls, nothing else: probes -> observe -> (due?) decide -> apply -> append."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import rankflow
from rankflow.distributed.single import SingleProcess
from rankflow.errors import CheckpointError, ConfigError, PlanError, RankFlowError
from rankflow.gating.held_out import HeldOut
from rankflow.linalg.random import own_random_numbers
from rankflow.lora import site_edits
from rankflow.lora.adapter import Adapter
from rankflow.lora.capacity import lasting, rooms
from rankflow.lora.transaction import Transaction
from rankflow.observe.averages import AVERAGED, sources
from rankflow.observe.hearing import Hearing
from rankflow.observe.probes import FACTORS, Probes
from rankflow.observe.study import (
    check_batches,
    check_loss,
    evaluating,
    model_loss,
    run_study,
    surroundings,
    with_a_batch,
)
from rankflow.optim.handlers.registry import innermost
from rankflow.optim.optimizer_state import OnUnknownState
from rankflow.plans.last_direction import spare_last
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Share
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import direction_sizes, first, ops_to
from rankflow.policies.base import Policy, State
from rankflow.policies.idleness import idle_phases
from rankflow.policies.lifecycle import Lifecycle, Phase
from rankflow.policies.observation import Observation, Signal
from rankflow.surgery.listeners import Listeners, OnResize
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.attachments import Attachment, make_way
from rankflow.training.checks import check_managed, check_rooms, check_shards
from rankflow.training.gradients import (
    PenaltyMode,
    add_penalty_gradient,
    penalty_term,
    scale_in_force,
    share_gradients,
    unscaled,
)
from rankflow.training.ledger import Ledger
from rankflow.training.operations import Now, Operations
from rankflow.training.state import check_lifecycle, check_seal, seal
from rankflow.training.summary import Summary, ranks_by_type

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ARGUMENTS = {"train": "batches", "outer": "outer_batches"}  # what gives the data of a split


class Controller:
    """Runs a lifecycle on one adapter of a live model. Use it through `rankflow.attach` or `RankFlowCallback`.

    Call `before_step` when gradients are ready and `after_step` once the optimizer has stepped. Steps are counted on
    the innermost optimizer itself, so gradient accumulation and steps skipped by a loss scaler never age anything.
    With `state`, a `state_dict` of an earlier controller, it goes on from there (see `load_state_dict`).

    Raises:
        ConfigError: the policy cannot do its job here: a budget out of reach, data or a loss that was not given.
        AdapterError, OptimizerError: the model or the optimizer cannot be managed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lifecycle: Lifecycle,
        *,
        total_steps: int,
        adapter_name: str = "default",
        batches: Iterable[Any] | None = None,
        outer_batches: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
        on_unknown_state: OnUnknownState = "error",
        penalty: PenaltyMode = "gradient",
        state: dict[str, Any] | None = None,
        listeners: Listeners | None = None,
        processes: Callable[[Adapter], SingleProcess] = lambda adapter: SingleProcess(),
    ):
        self._adapter = Adapter(model, adapter_name, shards=True)
        make_way(self._adapter)
        check_managed(self._adapter, lifecycle, optimizer, on_unknown_state)
        self._processes = processes(self._adapter)
        self._processes.start(
            {
                **lifecycle.settings(),
                **_versions(),
                "adapter_name": adapter_name,
                "seed": str(seed),
                "total_steps": str(total_steps),
                "penalty": penalty,
                "on_unknown_state": on_unknown_state,
                "optimizer": type(innermost(optimizer)).__name__,
                "batches": _given(batches),
                "outer_batches": _given(outer_batches),
                "loss_fn": _given(loss_fn),
                "state": "not given" if state is None else f"of step {state.get('step')}",
                **{f"module {name}": slot.summary for name, slot in self._adapter.layout().items()},
            }
        )
        self.model = model
        self.seed = seed
        self.total_steps = total_steps
        self.lifecycle = lifecycle
        self.ledger = ledger if ledger is not None else Ledger()
        self._data = {"train": batches, "outer": outer_batches}
        for split, data in self._data.items():
            if data is not None:
                check_batches(data, _ARGUMENTS[split], loss_fn)
        self._loss_fn = loss_fn
        self._penalty = penalty
        self._optimizer = innermost(optimizer)
        self._scaler = getattr(optimizer, "scaler", None)  # accelerate's wrapper knows its own, and where it is
        self._accumulating = getattr(optimizer, "gradient_state", None)

        told = {"listeners": listeners, "on_unknown_state": on_unknown_state}
        self._surgeon = Surgeon(self._adapter, self._optimizer, seed=seed, **told)
        self._operations = Operations(self._surgeon, self._processes, self.ledger)
        self._gates = self._surgeon.gates
        self._gates.average_gradients = self._processes.average_gradients
        self._probes = Probes(self._adapter, gate_signals=self._gates.signals, seed=seed)
        self._hearing = Hearing(self._adapter)
        state = check_seal(state) if state is not None else None
        self._first_layout = Layout.from_json(state["first_layout"]) if state else self._surgeon.layout
        layout, self._phases = lifecycle.resolve(total_steps, self._first_layout)
        for phase in self._phases:
            self._require_data(phase)
        outer = self._data["outer"]
        self._held_out = HeldOut(outer, seed) if outer is not None else None
        for phase in self._phases:
            for due in phase.policy.when.events[:1]:
                self._probes.check(sources(phase.policy.listen(due)))
        in_loss = penalty == "in_loss"
        check_shards(self._adapter, lifecycle, self._phases, in_loss=in_loss, resumes=state is not None)
        if lifecycle.mode == "mask":
            check_rooms(self._phases, layout, self._surgeon.optimizer_state)
            layout = lasting(self._adapter, layout)
        if state is None:
            if self._processes.leads and (idle := idle_phases(layout, self._phases)):
                warnings.warn("\n".join(idle), stacklevel=3)
            self._surgeon.layout = layout

        self.step = 0
        self._counted = 0  # optimizer steps seen so far; `step` follows in after_step
        self._steps_open = 0  # begun and not ended; one that raised never ends
        self._phase = -1
        self._state: State = {}
        self._pending: Observation | None = None
        self._transaction: Transaction | None = None  # of the call in progress, which happens wholly or not at all
        self._spared = False  # whether a plan had to be kept from taking out all that trains; said once
        self._rewound = False  # to an earlier state than the run had come to: the best checkpoint, say
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
        """Gradients are ready (all micro-batches done): read signals, add the penalty's gradient.

        Pass the GradScaler of an own fp16 loop, before or after `unscale_`; accelerate's is found by itself. Where the
        base model is sharded over processes, this reduces the adapter's gradients: call it before `unscale_` and before
        they are clipped.
        """
        self._steps_open = 0
        if self._accumulating is not None and not self._accumulating.sync_gradients:
            return  # accelerate's accumulate(): more micro-batches are to come
        self._surgeon.holders.look()
        self._processes.come_to(f"gradients of step {self.step + 1}")
        scaler = scaler if scaler is not None else self._scaler
        self._processes.reduce(self.model, unscaled=unscaled(scaler, self._optimizer))
        penalised = self._penalty == "gradient" and self._policy.penalty is not None
        if self._adapter.sharded and (penalised or self._probes.on_gradients or self.layout.sharing):
            with Transaction() as transaction, self._processes.gathered(None, transaction):
                self._observe(scaler, penalised)
        else:
            self._observe(scaler, penalised)

    def _observe(self, scaler: Any, penalised: bool) -> None:
        upcoming = self._counted + 1
        when = self._phases[self._phase_of(upcoming)].policy.when
        early = not self._hearing.reached and len(when.events) > 0  # before gates close, behind which all is 0
        self._hearing.listen(closely=early or when.due(upcoming) or self._probes.armed)
        if self._probes.armed and not self._adapter.enabled:
            self._probes.disarm()
        if self._probes.armed or self._gates:
            # They heard the backward pass, which ran at the loss scale whatever has been unscaled since.
            scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
            self._gates.collect(scale)
            self._pending = self._collect(scale) if self._probes.armed else None
        share_gradients(self._adapter, self.layout)
        if penalised:
            add_penalty_gradient(self._policy, self._adapter, scale_in_force(scaler, self._optimizer))

    def _collect(self, scale: float) -> Observation:
        """What the probes of all processes heard."""
        heard = self._processes.average(self._processes.attempt(lambda: self._probes.collect(scale)))
        return self._hearing.with_silence(heard)

    def after_step(self) -> None:
        """The optimizer has stepped and gradients are done with: decide and resize when due.

        A call after which no optimizer step was counted (accumulation, a scaler's skipped step) changes nothing. Nor
        does one that raises: with its cause gone (memory, room on the disk) call it again, before the next step.
        """
        self._steps_open = 0
        if self._counted == self.step:
            observed, self._pending = self._pending, None
            if observed is not None:
                self._listen()
            return
        self._processes.come_to(f"after step {self._counted}")
        self._wholly(self._take_step, factors=self._looks_at_factors())

    def _take_step(self) -> None:
        observed, self._pending = self._pending, None
        self.step = self._counted
        self._advance(observed)
        self._outer_when_due()
        if self.step + 1 >= self.phase.end:
            self._operations.thaw(self._now)
        self._listen()

    def _wholly(self, work: Callable[[], object], *, factors: bool = True) -> None:
        """All of `work` is done and in the ledger, or what fails leaves everything as it was before. Without `factors`
        it does not look at them.

        What is undone is in the transaction alone, and nothing here is left to the end of a generator: an interrupt at
        its last line would have it ended by whoever lets go of the traceback, any number of steps later.
        """
        with Transaction() as transaction:
            self.ledger.begin(transaction)
            with self._gathered(transaction, factors):
                transaction.undo(self._probes.disarm)
                self._surgeon.averages.remember(transaction)
                transaction.keep(self._operations, "frozen")
                transaction.keep(self, "step", "_pending", "_phase", "_state")
                transaction.attr(self, "_transaction", transaction)
                work()
            self.ledger.write(transaction, self._processes.attempt)
            self._transaction = None

    def _gathered(self, transaction: Transaction, wanted: bool = True) -> AbstractContextManager[None]:
        return self._processes.gathered(self._optimizer, transaction) if wanted else nullcontext()

    def _looks_at_factors(self) -> bool:
        """Whether what comes after this step does: the same in all processes, and false on most steps. Of factors that
        are whole at all times, nobody asks."""
        if not self._adapter.sharded:
            return False
        step, phase = self._counted, self._phase_of(self._counted)
        policy = self._phases[phase].policy
        due = phase != self._phase or policy.when.due(step) or bool(FACTORS & policy.listen(step))
        return due or bool(self._operations.frozen and step + 1 >= self.phase.end)

    def outer_step(self, batch: Any) -> Tensor | None:
        """Update gates that are trained on held-out data with `batch`; its loss, None where the phase has no such gate.

        The controller does this by itself with `outer_batches`; call it for updates beyond those. The model is in eval
        mode and its random numbers are the update's own; the factors, their gradients and everything else stay.
        """
        if not self._gates or self._gates.trained_on != "outer":
            return None
        loss_fn = self._loss_fn if self._loss_fn is not None else model_loss
        batch = send_to_device(batch, next(iter(self._adapter.parameters())).device)

        def loss() -> Tensor:
            value = loss_fn(self.model, batch)
            check_loss(value, "held-out batch")
            return value

        with own_random_numbers(self.seed, self.step, "outer"), evaluating(self.model):
            return self._gates.outer_step(loss, self.step + 1, self._transaction)

    def penalty(self) -> Tensor:
        """The policy's penalty as a term of the loss, for controllers made with `penalty="in_loss"`; else 0."""
        return penalty_term(self._policy, self._adapter) if self._penalty == "in_loss" else torch.zeros(())

    def finish(self) -> Summary:
        """The run is over: take the hooks off and close the ledger with a `finish` event; what came of it, which is
        logged too. All processes call it."""
        if self.attached:
            self._processes.come_to(f"finish after step {self.step}")
            self._wholly(self._end)
            if self._processes.leads:
                logger.info(self.summary())
            if not self.within_budget and not self._rewound:
                warnings.warn(
                    f"the run ends at total rank {self.layout.total_rank}, above its final budget: "
                    f"{self.step} of {self.total_steps} steps were taken, or the last decisions were skipped",
                    stacklevel=2,
                )
        self.detach()
        return self.summary()

    def _end(self) -> None:
        self._operations.thaw(self._now)
        self._leave()
        if self._surgeon.held:
            self._operations.settle({}, self._now)
        layout = self.layout
        self.ledger.append("finish", self.step, total_rank=layout.total_rank, params=layout.params)
        assert self._transaction is not None
        self._transaction.attr(self, "_ended", True)

    def summary(self) -> Summary:
        """What has come of the run so far."""
        due = {(p.name, step) for p in self._phases for step in (*_openings(p), *p.policy.when.events)}
        taken = {(e["policy"], e["step"]) for e in self.ledger.events if e["event"] in ("skip", "resize")}
        return Summary(
            policy=" -> ".join(phase.name for phase in self._phases),
            steps=self.step,
            total_steps=self.total_steps,
            decisions=len(due & taken),
            resizes=sum(bool(e["event"] == "resize" and e["ranks"]) for e in self.ledger.events),
            before=self._first_layout.total_rank,
            after=self.layout.total_rank,
            modules=len(self.layout),
            ranks={kind: (min(ranks), max(ranks)) for kind, ranks in ranks_by_type(self.layout).items()},
            ledger=None if self.ledger.path is None else str(self.ledger.path),
        )

    def detach(self) -> None:
        """Take all hooks off and let go of the model, its gates folded; ranks stay as they are.

        Factors in shards keep the room that `mode: mask` has given them, and gates go without being folded: whoever
        gives a run up may be alone with it, and waits for nobody. `finish`, which all processes call, does both.
        """
        self._attachment.take_off()

    @property
    def stored(self) -> dict[str, dict[str, Tensor]]:
        """The form in which the policy's gates want factors kept in files, by module: that of now, or of when they were
        last folded. Empty for gates that are content with floats."""
        return self._gates.stored()

    @property
    def attached(self) -> bool:
        """False once `finish` or `detach` was called."""
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
        """Goes up by one with every resize: parameters taken before are stale."""
        return self._surgeon.version

    @property
    def phase(self) -> Phase:
        return self._phases[max(self._phase, 0)]

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self._phases

    @property
    def adapter_name(self) -> str:
        return self._adapter.name

    def on_resize(self, callback: OnResize) -> RemovableHandle:
        """Let `callback` be called with (module name, old, new, ops) for each module that a resize changes, and when
        that is undone; the handle's `remove` ends it. See `rankflow.surgery.listeners.Listeners`."""
        return self.listeners.add(callback)

    @property
    def listeners(self) -> Listeners:
        """Who is told of resizes."""
        return self._surgeon.listeners

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's factors as they are now, in the optimizer's order; after a resize, some are others."""
        return iter(self._adapter.parameters())

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: total and mean rank, parameters, resizes, and the mean rank of each kind of module."""
        layout = self.layout
        kinds = ranks_by_type(layout)
        return {
            "rankflow/total_rank": layout.total_rank,
            "rankflow/mean_rank": layout.total_rank / len(layout),
            "rankflow/params": layout.params,
            "rankflow/resizes": self.version,
            **{f"rankflow/rank/{kind}": sum(ranks) / len(ranks) for kind, ranks in kinds.items()},
        }

    @property
    def within_budget(self) -> bool:
        """Whether the layout is already within the last budget of the lifecycle (True where there is none)."""
        budgets = [p.policy.budget for p in self._phases if p.policy.budget is not None]
        return not budgets or budgets[-1].spent(self.layout) <= budgets[-1].amount

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on as if never stopped, beside model and optimizer: JSON values and tensors on the
        CPU, as they are now, with a checksum (`rankflow.training.state`)."""
        if self._adapter.sharded and self._gates:
            raise CheckpointError(
                f"gates of {self.phase.name} hold on to factors that are in shards, and such a state cannot be saved; "
                "save when the phase is over"
            )
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "phase": self._phase,
            "version": self.version,
            "seed": self.seed,
            "lifecycle": {"title": str(self.lifecycle), "settings": self.lifecycle.settings()},
            "layout": self.layout.to_json(),
            "first_layout": self._first_layout.to_json(),
            "ledger": list(self.ledger.events),
            "ramps": self._surgeon.ramps.state_dict(),
            "averages": self._surgeon.averages.state_dict(),
            "held": self._surgeon.held,
            "frozen": sorted(self._operations.frozen),
            "hearing": self._hearing.state_dict(),
            "policy": dict(self._state),
            "gates": self._gates.state_dict(),
            "held_out": self._held_out.position if self._held_out is not None else None,
        }
        return seal(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Model and optimizer must already hold that checkpoint's tensors.

        Where it raises, nothing has changed.

        Raises:
            CheckpointError: damaged, of another format or another policy, or live ranks that are not the checkpoint's.
        """
        self._to(partial(self._go_on, check_seal(state)))

    def go_back(self, layout: Layout, load: Callable[[Transaction], T], state: dict[str, Any]) -> T:
        """Go on from a checkpoint at other ranks: the adapter is reshaped to `layout`, `load` brings its weights, and
        its `state` is taken over as `load_state_dict` does. Parameters stay in the optimizer, their state afresh.

        Where it raises, nothing has changed; `load` writes through the transaction it is given.
        """
        loaded: list[T] = []

        def work() -> None:
            assert self._transaction is not None
            self._reshape(layout)
            loaded.append(load(self._transaction))
            self._go_on(state)

        check_seal(state)
        self._to(work)
        return loaded[0]

    def _to(self, work: Callable[[], object]) -> None:
        """Go to another state, or go on as before."""
        self._processes.come_to("load_state_dict")
        try:
            self._wholly(work)
        except BaseException:
            self._listen()
            raise

    def _go_on(self, state: dict[str, Any]) -> None:
        transaction = self._transaction
        assert transaction is not None
        check_lifecycle(state, self.lifecycle)
        layout = Layout.from_json(state["layout"])
        self._surgeon.hold(state.get("held", {}), transaction)
        if (live := self._adapter.layout().ranks) != layout.ranks:
            wrong = next(n for n in {**layout.ranks, **live} if layout.ranks.get(n) != live.get(n))
            raise CheckpointError(
                f"{wrong}: rank is {live.get(wrong)} but {layout.ranks.get(wrong)} in the checkpoint (step "
                f"{state['step']}); call rankflow.restore(model, checkpoint) before the optimizer is made, and hand "
                "this state to attach(state=...)"
            )
        if state["total_steps"] != self.total_steps:
            warnings.warn(
                f"the run had {state['total_steps']} steps and now has {self.total_steps}: percentages in the policy "
                "now mean other steps",
                stacklevel=2,
            )
        transaction.keep(self, "_first_layout", "_phases", "_rewound", "_counted")
        self._first_layout = Layout.from_json(state["first_layout"])
        _, self._phases = self.lifecycle.resolve(self.total_steps, self._first_layout)
        self._rewound = int(state["step"]) < self.step
        self.step = self._counted = int(state["step"])
        for seeded in (self, self._surgeon, self._gates, self._probes, self._held_out):
            if seeded is not None:
                transaction.attr(seeded, "seed", int(state["seed"]))
        self._phase = int(state["phase"])
        self._state = dict(state["policy"])
        self._pending = None
        transaction.keep(self._surgeon, "_layout", "version")
        self._surgeon.layout = layout
        for name, slot in layout.items():
            site_edits.recall(self._adapter.sites[name], transaction, slot.scaling)
        self._operations.freeze(set(state.get("frozen", ())), self._now)
        self._hearing.load_state_dict(state.get("hearing", {}), transaction)
        self._surgeon.version = int(state["version"])
        self._surgeon.ramps.load_state_dict(state["ramps"], transaction)
        self._gates.load_state_dict(state["gates"], self._policy.gate, self.step, transaction)
        if self._held_out is not None and state["held_out"] is not None:
            transaction.attr(self._held_out, "position", state["held_out"])
        self._surgeon.averages.load_state_dict(state.get("averages", {}))
        self.ledger.restore(state["ledger"], self.step)
        self._listen()

    def _reshape(self, layout: Layout) -> None:
        """Bring the adapter to the ranks of `layout`. Not an event of the run."""
        assert self._transaction is not None
        self.listeners.part(self._transaction)
        least = {name: min(layout[name].rank, slot.rank) for name, slot in self.layout.items()}
        wanted = least if self._surgeon.held else layout.ranks  # with room for more, how much is held is not known yet
        ops = {name: ops_to(wanted[name], slot.rank, first(range(slot.rank))) for name, slot in self.layout.items()}
        self._operations.perform(RankPlan(ops, "reshape", state="reset"), self._now)
        if self._surgeon.held:
            self._operations.settle(layout.ranks, self._now)

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _policy(self) -> Policy:
        return self.phase.policy

    @property
    def _now(self) -> Now:
        return Now(self.step, self.phase.name, self._transaction)

    def _step_begins(self) -> None:
        """Before a step of the optimizer; of one within another, as where a subclass calls super().step(), nothing."""
        self._steps_open += 1
        if self._steps_open == 1:
            self._surgeon.ramps.before_step()

    def _step_ends(self) -> None:
        self._steps_open -= 1
        if self._steps_open <= 0:
            self._steps_open = 0
            self._surgeon.ramps.after_step()
            self._gates.step()
            self._counted += 1

    def _begin(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self._start()
        else:
            self._go_on(state)

    def _start(self) -> None:
        self.ledger.append(
            "attach",
            self.step,
            layout=self.layout.to_json(),
            phases=[{"policy": p.name, "begin": p.begin, "end": p.end} for p in self._phases],
            total_steps=self.total_steps,
            seed=self.seed,
        )
        self._enter(0)
        self._outer_when_due()
        self._listen()

    def _enter(self, phase: int) -> None:
        if self._phase >= 0:
            self._leave()
        self._operations.thaw(self._now)
        self._phase = phase
        if self.lifecycle.mode == "mask":
            self._operations.settle(rooms(self._policy, self.layout), self._now)
        if (gate := self._policy.gate) is not None:
            self._part()
            self._gates.install(gate, self.step, self._transaction)
        self._state = self._policy.init(self.layout)
        for note in self._policy.notes:
            logger.info(note)
        budget, events = self._policy.budget, self._policy.when.events
        self.ledger.append(
            "phase",
            self.step,
            policy=self.phase.name,
            end=self.phase.end,
            budget=None if budget is None else str(budget),
            decides={"first": events.start, "every": events.step, "before": events.stop},
            notes=list(self._policy.notes),
        )
        self._change(lambda: self._policy.enter(self._state, self.layout))
        if (observed := self._study("start")) is not None:
            self._decide(observed)

    def _part(self) -> None:
        """Gates are each module's own: under them no factors are shared any longer."""
        if alone := {name: (Share(None),) for name, slot in self.layout.items() if slot.shared}:
            plan = RankPlan(alone, "each module gets a gate of its own")
            self._operations.apply(plan, self._now, time.perf_counter())

    def _leave(self) -> None:
        """The phase ends: its policy leaves, and its gates become part of the factors."""
        self._change(lambda: self._policy.leave(self._state, self.layout))
        if (gate := self._gates.gate) is not None:
            reports = self._gates.fold(self._transaction)
            self.ledger.append("fold", self.step, policy=self.phase.name, gates=reports, total=gate.total(reports))

    def _outer_when_due(self) -> None:
        gate = self._gates.gate
        if gate is not None and gate.outer(self.step + 1) and self._adapter.enabled and self.step < self.total_steps:
            held_out = self._held_out
            assert held_out is not None, "checked at attach"
            if self._transaction is not None:
                self._transaction.undo(partial(setattr, held_out, "position", held_out.position))
                self._transaction.undo(surroundings(self.model, self._adapter))
            self.outer_step(held_out.take())

    def _listen(self) -> None:
        """Arm the probes for the next step, in the phase that step belongs to."""
        upcoming = self.step + 1
        phase = self._phases[self._phase_of(upcoming)]
        if signals := phase.policy.listen(upcoming):
            self._probes.arm(sources(signals), upcoming)
        else:
            self._probes.disarm()

    def _phase_of(self, step: int) -> int:
        for i in range(max(self._phase, 0), len(self._phases)):
            if step < self._phases[i].end:
                return i
        return len(self._phases) - 1

    def _advance(self, observed: Observation | None) -> None:
        step = self.step
        while self._phase < self._phase_of(step):
            self._enter(self._phase + 1)
        expected = self._policy.listen(step)
        due = self._policy.when.due(step)
        if expected and observed is None:
            if due and not self._adapter.enabled:
                self._skip("the adapter is disabled", warn=True)
            elif due:
                raise RankFlowError(
                    f"step {step}: {self.phase.name} decides now but saw no signals; "
                    "call before_step() after backward and before optimizer.step()"
                )
            return
        if observed is not None:
            observed = self._surgeon.averages.take(observed, expected, self._policy.decay)
            if bad := _non_finite(observed):
                self._skip(f"{bad} is not finite", warn=due)
                return
            self._state = self._policy.observe(self._state, observed, step)
        if due:
            if self._adapter.enabled and (studied := self._study("every")) is not None:
                observed = studied
            self._decide(observed if observed is not None else Observation(step))

    def _decide(self, observed: Observation) -> None:
        if not self._adapter.enabled:
            self._skip("the adapter is disabled", warn=True)
            return
        observed = observed.but_unheard(self._hearing.unheard(self.layout))
        plan = self._change(lambda: self._policy.decide(self._state, observed, self.layout, self.step))
        if not plan:
            self._skip(plan.reason or "nothing to change")

    def _change(self, ask: Callable[[], RankPlan]) -> RankPlan:
        """Carry out the plan that the policy gives when asked; an empty one changes nothing."""
        began = time.perf_counter()
        try:
            plan = self._processes.agree(lambda: self._sparing(ask()), self.layout, self.step)
            if plan:
                self._operations.apply(plan, self._now, began)
        except PlanError as e:
            raise PlanError(f"{e} (step {self.step}, policy {self.phase.name})") from e
        if plan:
            self._state = self._policy.decided(self._state, plan, self.layout, self.step)
        return plan

    def _sparing(self, plan: RankPlan) -> RankPlan:
        """`plan`, but never one that takes everything that trains out of the adapter."""

        def sizes(name: str) -> Tensor:
            site = self._adapter.sites[name]
            return direction_sizes(site.a().detach(), site.b().detach(), site.scaling)[: site.rank]

        plan, spared = spare_last(plan, self.layout, self._hearing.reached, sizes)
        if spared is not None and not self._spared:
            self._spared = True
            warnings.warn(
                f"step {self.step}: {self.phase.name} would take every module that trains out of the adapter; {spared} "
                "stays, with as few directions as limits allow. Give limits a min of 1, or let the policy take less",
                stacklevel=5,
            )
        return plan

    @property
    def decisions_on_shapes(self) -> int:
        """How many decisions may still make tensors of shapes not seen before: none where they write into what there
        is, or have to come back to a few ranks."""
        if self.lifecycle.mode == "mask" or all(slot.buckets for slot in self.layout.values()):
            return 0
        return sum(due > self.step for phase in self._phases[self._phase :] for due in phase.policy.when.events)

    def _skip(self, reason: str, *, warn: bool = False) -> None:
        self.ledger.append("skip", self.step, policy=self.phase.name, reason=reason)
        if warn:
            warnings.warn(f"step {self.step}: {self.phase.name} skips its decision: {reason}", stacklevel=4)

    def _study(self, when: str) -> Observation | None:
        """Run the policy's studies of this kind; the last Observation, or None when there are none."""
        observed = None
        for study in self._policy.studies:
            if study.when == when:
                data = self._data[study.split]
                assert data is not None, "checked at attach"
                if self._transaction is not None:
                    self._transaction.undo(surroundings(self.model, self._adapter))
                study_of = (study, self._adapter, self.model, data, self._loss_fn)
                work = partial(run_study, *study_of, seed=self.seed, step=self.step)
                observed = self._processes.average(self._processes.attempt(work))
                if bad := _non_finite(observed):
                    self._skip(f"study {study.name}: {bad} is not finite", warn=True)
                    return None
                self._state = self._policy.observe(self._state, observed, self.step)
        return observed

    def _require_data(self, phase: Phase) -> None:
        gate = phase.policy.gate
        splits = {study.split for study in phase.policy.studies}
        if gate is not None and gate.trained_on == "outer":
            if self._data["outer"] is None:
                raise ConfigError(
                    f"policy {phase.name} trains its gates on held-out batches of the training data; give them with "
                    "outer_batches=..."
                )
            splits.add("outer")
        for study in phase.policy.studies:
            self._probes.check(study.signals)
            if self._data[study.split] is None:
                raise ConfigError(
                    f"policy {phase.name} studies {study.batches} batches ({study.name}); "
                    f"give them with {_ARGUMENTS[study.split]}=..."
                )
        for split in splits:
            data = self._data[split]
            assert data is not None, "checked above"
            self._data[split] = with_a_batch(data, _ARGUMENTS[split])


def _while_there(method: Callable[[], None]) -> Callable[..., None]:
    """A hook that does not keep its run alive."""
    weakly = weakref.WeakMethod(method)

    def hook(*_: object) -> None:
        if (bound := weakly()) is not None:
            bound()

    return hook


def _versions() -> dict[str, str]:
    found = {"rankflow": rankflow.__version__, **{name: metadata.version(name) for name in ("torch", "peft")}}
    return {f"version of {name}": version.partition("+")[0] for name, version in found.items()}


def _given(value: object) -> str:
    return "not given" if value is None else "given"


def _openings(phase: Phase) -> list[int]:
    """The step that a phase begins with, if it decides there, from a study of the data."""
    return [phase.begin] if any(study.when == "start" for study in phase.policy.studies) else []


def _non_finite(observed: Observation) -> str | None:
    """The first signal that holds an infinity or a NaN, as "module: signal"; one sync, on scored steps only.

    Averages never do, and singular values do where A or B does.
    """
    unasked = {Signal.SINGULAR_VALUES, *AVERAGED}
    named = [(f"{m}: {s.value}", r[s]) for m, r in observed.items() for s in r if s not in unasked]
    if not named:
        return None
    finite = torch.stack([torch.isfinite(t).all() for _, t in named]).tolist()
    return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)
