"""The phases of a run: asking policies for plans, and carrying them out on the adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankflow.distributed.single import SingleProcess
from rankflow.errors import PlanError, RankFlowError
from rankflow.linalg.random import own_random_numbers
from rankflow.lora.capacity import capacities
from rankflow.lora.transaction import Transaction
from rankflow.observe.averages import sources
from rankflow.observe.hearing import Hearing
from rankflow.observe.probes import FACTORS, Probes
from rankflow.observe.study import evaluating
from rankflow.plans.last_direction import spare_last
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Share, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import direction_sizes
from rankflow.policies.base import Policy, State
from rankflow.policies.lifecycle import Lifecycle, Phase
from rankflow.policies.observation import Lazy, Observation, Signal
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.data import RunData
from rankflow.training.ledger import Ledger

logger = logging.getLogger(__name__)


class Phases:
    """The phases of a lifecycle on one adapter, and how far the run has come.

    `step` is the last one that was taken account of, of `counted` ones that the optimizer has taken; `index` the phase
    of it, `state` that of its policy. `pending` is what probes heard since. `transaction` is that of the call in
    progress, which happens wholly or not at all.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        phases: tuple[Phase, ...],
        surgeon: Surgeon,
        probes: Probes,
        hearing: Hearing,
        processes: SingleProcess,
        ledger: Ledger,
        data: RunData,
        *,
        seed: int,
        total_steps: int,
        first_layout: Layout,
    ):
        self.lifecycle = lifecycle
        self.all = phases
        self.surgeon = surgeon
        self.adapter = surgeon.adapter
        self.gates = surgeon.gates
        self.probes = probes
        self.hearing = hearing
        self.processes = processes
        self.ledger = ledger
        self.data = data
        self.operations = Operations(surgeon, processes, ledger)
        self.seed = seed
        self.total_steps = total_steps
        self.first_layout = first_layout
        self.step = 0
        self.counted = 0
        self.index = -1
        self.state: State = {}
        self.pending: Observation | None = None
        self.transaction: Transaction | None = None
        self.rewound = False  # to an earlier state than the run had come to: the best checkpoint, say
        self._spared = False  # whether a plan had to be kept from taking out all that trains; said once

    @property
    def layout(self) -> Layout:
        return self.surgeon.layout

    @property
    def phase(self) -> Phase:
        return self.all[max(self.index, 0)]

    @property
    def policy(self) -> Policy:
        return self.phase.policy

    @property
    def now(self) -> Now:
        return Now(self.step, self.phase.name, self.transaction)

    def start(self) -> None:
        rate_for = self.surgeon.ramps.rate_rank
        held: dict[str, Any] = {} if rate_for is None else {"rate_for": rate_for}
        self.ledger.append(
            "attach",
            self.step,
            layout=self.layout.to_json(),
            phases=[{"policy": p.name, "begin": p.begin, "end": p.end} for p in self.all],
            total_steps=self.total_steps,
            seed=self.seed,
            **held,
        )
        self.enter(0)
        self.outer_when_due()
        self.listen()

    def enter(self, phase: int) -> None:
        if self.index >= 0:
            self.leave()
        self.operations.thaw(self.now)
        self.index = phase
        if self.lifecycle.mode == "mask":
            self.operations.set_capacity(capacities(self.policy, self.layout), self.now)
        if (gate := self.policy.gate) is not None:
            self._part()
            self.gates.install(gate, self.step, self.transaction)
        self.state = self.policy.init(self.layout)
        for note in self.policy.notes:
            logger.info(note)
        budget, events = self.policy.budget, self.policy.when.events
        self.ledger.append(
            "phase",
            self.step,
            policy=self.phase.name,
            end=self.phase.end,
            budget=None if budget is None else str(budget),
            decides={"first": events.start, "every": events.step, "before": events.stop},
            notes=list(self.policy.notes),
        )
        self._change(self._entered)
        if (observed := self._study("start")) is not None:
            self._decide(observed)

    def _entered(self) -> RankPlan:
        """Return what the policy changes when its phase begins, if it can begin from the factors there are."""
        sites = {name: site for name, site in self.adapter.sites.items() if site.present}
        factors: dict[str, dict[Signal, Lazy]] = {
            name: {Signal.A: lambda s=s: s.a().detach(), Signal.B: lambda s=s: s.b().detach()}
            for name, s in sites.items()
        }
        self.policy.check_start(Observation(self.step, factors))
        return self.policy.enter(self.state, self.layout)

    def _part(self) -> None:
        """Part factors that modules share, since each module gets a gate of its own."""
        if alone := {name: (Share(None),) for name, slot in self.layout.items() if slot.shared}:
            plan = RankPlan(alone, "each module gets a gate of its own")
            self.operations.apply(plan, self.now, time.perf_counter())

    def leave(self) -> None:
        """End the phase: let its policy leave, and make its gates part of the factors."""
        self._change(lambda: self.policy.leave(self.state, self.layout))
        if (gate := self.gates.gate) is not None:
            reports = self.gates.fold(self.transaction)
            self.ledger.append("fold", self.step, policy=self.phase.name, gates=reports, total=gate.total(reports))

    def outer_when_due(self) -> None:
        """Update gates that are trained on held-out data, if they are to be before the next step."""
        gate = self.gates.gate
        if gate is not None and gate.outer(self.step + 1) and self.adapter.enabled and self.step < self.total_steps:
            self.outer_step(self.data.next_outer(self.transaction))

    def outer_step(self, batch: Any) -> Tensor:
        """Update gates that are trained on held-out data with `batch`; its loss."""
        loss = self.data.loss_of(batch)
        with own_random_numbers(self.seed, self.step, "outer"), evaluating(self.data.model):
            return self.gates.outer_step(loss, self.step + 1, self.transaction)

    def listen(self) -> None:
        """Arm the probes for the next step, in the phase that step belongs to."""
        upcoming = self.step + 1
        phase = self.all[self.index_of(upcoming)]
        if signals := phase.policy.listen(upcoming):
            self.probes.arm(sources(signals), upcoming)
        else:
            self.probes.disarm()

    def index_of(self, step: int) -> int:
        for i in range(max(self.index, 0), len(self.all)):
            if step < self.all[i].end:
                return i
        return len(self.all) - 1

    def looks_at_factors(self) -> bool:
        """Whether what happens after this step reads or writes factors that are in shards. The answer is the same in
        all processes, and False on most steps and for factors that are not in shards."""
        if not self.adapter.sharded:
            return False
        step, phase = self.counted, self.index_of(self.counted)
        policy = self.all[phase].policy
        due = phase != self.index or policy.when.due(step) or bool(FACTORS & policy.listen(step))
        return due or bool(self.operations.frozen and step + 1 >= self.phase.end)

    def advance(self, observed: Observation | None) -> None:
        step = self.step
        while self.index < self.index_of(step):
            self.enter(self.index + 1)
        expected = self.policy.listen(step)
        due = self.policy.when.due(step)
        if expected and observed is None:
            if due and not self.adapter.enabled:
                self._skip("the adapter is disabled", warn=True)
            elif due:
                raise RankFlowError(
                    f"step {step}: {self.phase.name} decides now but saw no signals; "
                    "call before_step() after backward and before optimizer.step()"
                )
            return
        if observed is not None:
            observed = self.surgeon.averages.take(observed, expected, self.policy.decay)
            self.state, bad = self.policy.heard(self.state, observed, step)
            if bad is not None:
                self._skip(f"{bad} is not finite", skipped="non_finite", warn=due)
                return
        if due:
            if self.adapter.enabled and (studied := self._study("every")) is not None:
                observed = studied
            self._decide(observed if observed is not None else Observation(step))

    def _decide(self, observed: Observation) -> None:
        if not self.adapter.enabled:
            self._skip("the adapter is disabled", warn=True)
            return
        observed = observed.but_unheard(self.hearing.unheard(self.layout))
        plan = self._change(lambda: self.policy.decide(self.state, observed, self.layout, self.step))
        if not plan:
            self._skip(plan.reason or "nothing to change")

    def _change(self, ask: Callable[[], RankPlan]) -> RankPlan:
        """Carry out the plan that the policy gives when asked; an empty one changes nothing."""
        began = time.perf_counter()
        try:
            plan = self.processes.agree(lambda: self._sparing(ask()), self.layout, self.step)
            if plan:
                self.operations.apply(plan, self.now, began)
        except PlanError as e:
            raise PlanError(f"{e} (step {self.step}, policy {self.phase.name})") from e
        if plan:
            self.state = self.policy.decided(self.state, plan, self.layout, self.step)
        return plan

    def _sparing(self, plan: RankPlan) -> RankPlan:
        """Return `plan`, changed if it would take everything that trains out of the adapter."""

        def sizes(name: str) -> Tensor:
            site = self.adapter.sites[name]
            return direction_sizes(site.a().detach(), site.b().detach(), site.scaling)[: site.rank]

        if self.data.trains_more and all(
            isinstance(op, Train) and not op.on for ops in plan.ops.values() for op in ops
        ):
            return plan  # the rest of the model trains on
        plan, spared = spare_last(plan, self.layout, self.hearing.reached, sizes)
        if spared is not None and not self._spared:
            self._spared = True
            warnings.warn(
                f"step {self.step}: {self.phase.name} would take every module that trains out of the adapter; {spared} "
                "stays, with as few directions as limits allow. Give limits a min of 1, or let the policy take less",
                stacklevel=5,
            )
        return plan

    def decisions_on_shapes(self, step: int) -> int:
        """How many decisions after `step` may make tensors of shapes not seen before: none where they write into what
        there is, or have to come back to a few ranks."""
        if self.lifecycle.mode == "mask" or all(slot.buckets for slot in self.layout.values()):
            return 0
        return sum(due > step for phase in self.all for due in phase.policy.when.events)

    def _skip(self, reason: str, *, warn: bool = False, **more: Any) -> None:
        """Tell the ledger why nothing is decided. `more` is for programs: `skipped="non_finite"`."""
        self.ledger.append("skip", self.step, policy=self.phase.name, reason=reason, **more)
        if warn:
            warnings.warn(f"step {self.step}: {self.phase.name} skips its decision: {reason}", stacklevel=4)

    def _study(self, when: str) -> Observation | None:
        """Run the policy's studies of this kind; the last Observation, or None when there are none."""
        observed = None
        for study in self.policy.studies:
            if study.when == when:
                observed = self.data.study(study, self.processes, self.seed, self.step, self.transaction)
                self.state, bad = self.policy.heard(self.state, observed, self.step)
                if bad is not None:
                    self._skip(f"study {study.name}: {bad} is not finite", skipped="non_finite", warn=True)
                    return None
        return observed


@dataclass(frozen=True)
class Now:
    """The step at which something is done, the policy it is done for, and the transaction that undoes it."""

    step: int
    policy: str
    transaction: Transaction | None


class Operations:
    """Carries plans out on a live adapter in all processes alike, and appends them to the ledger."""

    def __init__(self, surgeon: Surgeon, processes: SingleProcess, ledger: Ledger):
        self.frozen: set[str] = set()  # modules whose training this phase has switched off
        self._surgeon = surgeon
        self._processes = processes
        self._ledger = ledger

    def apply(self, plan: RankPlan, now: Now, began: float) -> None:
        """Carry out a policy's plan, which is an event of the run; its decision began at `began` on the clock."""
        before = self._surgeon.layout
        self.perform(plan, now)
        after = self._surgeon.layout
        for name, ops in plan.ops.items():
            if any(isinstance(op, Train) for op in ops):
                if after[name].trainable:
                    self.frozen = self.frozen - {name}
                elif before[name].trainable:
                    self.frozen = self.frozen | {name}
        self._ledger.append(
            "resize",
            now.step,
            plan,
            policy=now.policy,
            reason=plan.reason,
            ranks={n: s.rank for n, s in after.items() if s.rank != before[n].rank},
            total_rank=after.total_rank,
            params=after.params,
            digest=after.digest,
            seconds=round(time.perf_counter() - began, 6),
        )

    def perform(self, plan: RankPlan, now: Now) -> None:
        """Carry out a plan without a line in the ledger."""
        before = self._trained
        with Transaction(now.transaction) as transaction:
            transaction.undo(self._processes.undone)
            self._processes.attempt(lambda: self._surgeon.apply(plan, now.step, transaction))
            self._processes.resized(self._surgeon.layout, now.step, replaced=self._trained != before)

    @property
    def _trained(self) -> tuple[int, set[str]]:
        """Which parameters have gradients, to be compared; a wrapper that reduces them waits for all that it knows
        of."""
        return self._surgeon.version, {name for name, slot in self._surgeon.layout.items() if slot.trainable}

    def set_capacity(self, capacities: Mapping[str, int], now: Now) -> None:
        """Give factors these capacities (`Surgeon.set_capacity`)."""
        with Transaction(now.transaction) as transaction:
            transaction.undo(self._processes.undone)
            if self._processes.attempt(lambda: self._surgeon.set_capacity(capacities, transaction)):
                self._processes.resized(self._surgeon.layout, now.step, replaced=True)

    def keep_frozen(self) -> None:
        """Freeze again what somebody has let train, as PEFT's `disable_adapter` does when it ends."""
        for name in self.frozen:
            for p in self._surgeon.adapter.sites[name].tensors().values():
                if p.requires_grad:
                    p.requires_grad_(False)
                    p.grad = None

    def freeze(self, names: set[str], now: Now) -> None:
        """Freeze exactly these modules, as plans of this phase did before a checkpoint, whose files do not say so."""
        changed = {n: (Train(n not in names),) for n in self._surgeon.layout if n in names ^ self.frozen}
        if changed:
            self.perform(RankPlan(changed, "resume"), now)
        self.frozen = names

    def thaw(self, now: Now) -> None:
        """Let modules train again that plans of this phase have frozen. It is called before the first step of the next
        phase, which would otherwise inherit them, and after the last one."""
        if self.frozen:
            ops = {name: (Train(True),) for name in self._surgeon.layout if name in self.frozen}
            self.apply(RankPlan(ops, "the phase is over"), now, time.perf_counter())
