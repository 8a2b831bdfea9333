"""Plans carried out on a live adapter in all processes alike, wholly or not at all, and told to the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rankflow.distributed.single import SingleProcess
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Train
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.ledger import Ledger


@dataclass(frozen=True)
class Now:
    """When something is done, on whose behalf, and with what it is undone."""

    step: int
    policy: str
    transaction: Transaction | None


class Operations:
    """What the surgeon is told to do in the course of one run."""

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
        """Carry out a plan that the ledger need not know."""
        before = self._trained
        with Transaction(now.transaction) as transaction:
            transaction.undo(self._processes.undone)
            self._processes.attempt(lambda: self._surgeon.apply(plan, now.step, transaction))
            self._processes.resized(self._surgeon.layout, now.step, replaced=self._trained != before)

    @property
    def _trained(self) -> tuple[int, set[str]]:
        """Tells which parameters have gradients: a wrapper that reduces them waits for all that it knows of."""
        return self._surgeon.version, {name for name, slot in self._surgeon.layout.items() if slot.trainable}

    def settle(self, rooms: Mapping[str, int], now: Now) -> None:
        """Give factors this room, and no more (`Surgeon.settle`)."""
        with Transaction(now.transaction) as transaction:
            transaction.undo(self._processes.undone)
            if self._processes.attempt(lambda: self._surgeon.settle(rooms, transaction)):
                self._processes.resized(self._surgeon.layout, now.step, replaced=True)

    def freeze(self, names: set[str], now: Now) -> None:
        """Let these modules and no others be frozen as by this phase's plans: `requires_grad` is in no adapter file."""
        changed = {n: (Train(n not in names),) for n in self._surgeon.layout if n in names ^ self.frozen}
        if changed:
            self.perform(RankPlan(changed, "resume"), now)
        self.frozen = names

    def thaw(self, now: Now) -> None:
        """A phase leaves no module frozen: what its plans switched off trains again before the next one's first step,
        which would otherwise inherit it, and after the last."""
        if self.frozen:
            ops = {name: (Train(True),) for name in self._surgeon.layout if name in self.frozen}
            self.apply(RankPlan(ops, "the phase is over"), now, time.perf_counter())
