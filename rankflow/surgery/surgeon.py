"""Applies plans to a live adapter and its optimizer, wholly or not at all. Nothing else writes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.optim import Optimizer

from rankflow.errors import PlanError, RankFlowError
from rankflow.gating.gates import Gates
from rankflow.linalg.random import keyed_generator
from rankflow.lora import site_edits
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.observe.averages import Averages
from rankflow.optim.moments import SeedV
from rankflow.optim.optimizer_state import OnUnknownState, OptimizerState
from rankflow.optim.warmup import Ramps
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Share, Train
from rankflow.plans.plan import RankPlan
from rankflow.surgery.holders import Holders
from rankflow.surgery.listeners import Listeners
from rankflow.surgery.staging import Added, Stage, Staged, check_finite


class Surgeon:
    """Resize one adapter.

    Args:
        adapter: what to resize.
        optimizer: holds every trainable parameter of the adapter in exactly one group; None to resize without one.
        seed: of new directions, together with step and module name.
        on_unknown_state: `error` refuses optimizer state that nobody knows how to resize; `reset` starts the state of
            resized modules afresh.
        warmup: optimizer steps over which the updates of a new direction are ramped up.
        seed_v: second moments of new directions: `siblings` scaled to the direction, their plain `mean`, or `zero`.
        stage_device: where to compute, when it is not to be on the adapter's own device.
        listeners: who is told of what it does.

    Raises:
        OptimizerError: an optimizer that a resize would break.
    """

    def __init__(
        self,
        adapter: Adapter,
        optimizer: Optimizer | None = None,
        *,
        seed: int = 0,
        on_unknown_state: OnUnknownState = "error",
        warmup: int = 10,
        seed_v: SeedV = "siblings",
        stage_device: torch.device | str | None = None,
        listeners: Listeners | None = None,
    ):
        self.adapter = adapter
        self.listeners = listeners if listeners is not None else Listeners()
        self.holders = Holders()
        self.seed = seed
        self.warmup = warmup
        self.version = 0  # of the parameters: goes up whenever some are replaced
        self.optimizer_state = OptimizerState(optimizer, adapter, on_unknown_state) if optimizer is not None else None
        if self.optimizer_state is not None:
            self.optimizer_state.check((), {})
        self._stage = Stage(adapter.config, self.optimizer_state, seed_v, stage_device)
        self._layout = adapter.layout()
        self.ramps = Ramps(adapter, self.optimizer_state)
        self.gates = Gates(adapter, self.optimizer_state, seed)
        self.averages = Averages(adapter)

    @property
    def layout(self) -> Layout:
        """The layout that exists now, with the limits that were last set."""
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self._agree(layout)
        self._layout = layout

    def apply(
        self,
        plan: RankPlan,
        step: int = 0,
        transaction: Transaction | None = None,
        added: Mapping[str, Sequence[Added]] | None = None,
    ) -> Layout:
        """Carry out `plan` and return the layout after it. Whatever is raised, nothing has changed then.

        With a `transaction` it is undone, too, should that one be. `added` has the directions that another model got by
        this plan, by module, where this one is to get the same.

        Old parameters of resized modules are replaced by new ones, without gradients; whoever holds old ones holds
        stale ones (`version` tells). Kept directions and their optimizer state stay bit for bit.

        Raises:
            PlanError: the plan was made from another layout, or breaks its limits.
            AdapterError: the adapter can no longer be resized (merged, resized by somebody else, not finite), or never
                could (`rankflow.plans.peft_inits`).
            OptimizerError: the optimizer does not hold the adapter, or holds what cannot be carried.
        """
        self.adapter.check()
        layout = self._agree(self._layout)
        target = plan.apply_to(layout)
        if not plan:
            return self._layout
        if any(not isinstance(op, Train) for ops in plan.ops.values() for op in ops):
            self.adapter.refuse_resizing()
        self.gates.check(plan)
        lost = self._check_optimizer(plan, layout)
        lost |= {name for name, ops in plan.ops.items() if any(isinstance(op, Share) and op.group for op in ops)}
        carry = plan.state == "carry"
        values = self.gates.values() if self.gates.scope == "component" else {}
        staged = [
            self._stage.module(
                self.adapter.sites[name],
                ops,
                keyed_generator(self.seed, step, target[name].shared or name),  # what is shared starts alike
                carry=carry and name not in lost,
                gate=values.get(name),
                added=None if added is None else iter(added[name]),
            )
            for name, ops in plan.ops.items()
        ]
        check_finite(staged)
        youths = {
            name: self.ramps.after(name, ops, layout[name].rank, self.warmup, self._rewarm(plan, name in lost))
            for name, ops in plan.ops.items()
        }
        with Transaction(transaction) as transaction:
            told = self.listeners.expect(transaction)
            self.gates.follow(transaction)
            for s in staged:
                self._commit(transaction, s, target[s.swap.site.name].rank)
            replaced = self._replace(transaction, staged)
            self.ramps.write(transaction, youths, layout.ranks)
            self.gates.write(transaction, plan, target)
            self.averages.carry(transaction, plan.ops)
            self._verify(staged, target)
            transaction.attr(self, "_layout", target)
            transaction.attr(self, "version", self.version + replaced)
            self.listeners.tell(told, staged, plan.ops)
            for follower in self.listeners.followers:
                follower.follow(plan, step, staged, transaction)
        return target

    def set_capacity(self, capacities: Mapping[str, int], transaction: Transaction | None = None) -> bool:
        """Give factors these capacities, and those of all other modules their rank (see `rankflow.lora.capacity`).

        What the adapter computes stays, and its optimizer state. Returns whether parameters were replaced. With a
        `transaction`, all of it is undone too if that is.

        Raises:
            PlanError: a capacity below the module's rank.
        """
        self._agree(self._layout)
        sites = self.adapter.sites
        for name, capacity in capacities.items():
            if capacity < sites[name].rank:
                raise PlanError(f"{name}: its rank {sites[name].rank} is above the capacity {capacity}")
        wanted = {name: capacities.get(name, site.rank) for name, site in sites.items()}
        staged = [self._stage.at_capacity(s, wanted[name]) for name, s in sites.items() if s.capacity != wanted[name]]
        masked = {name: site.rank if name in capacities and wanted[name] else None for name, site in sites.items()}
        with Transaction(transaction) as transaction:
            told = self.listeners.expect(transaction)
            self.gates.follow(transaction)
            for s in staged:
                self._commit(transaction, s, 0)
            for name, rank in masked.items():
                site_edits.mask(sites[name], transaction, rank)
            replaced = self._replace(transaction, staged)
            self._verify(staged, self._layout)
            transaction.attr(self, "version", self.version + replaced)
            self.listeners.tell(told, staged, {})
            for follower in self.listeners.followers:
                follower.set_capacity(capacities, transaction)
        return replaced

    def set_masked_ranks(self, ranks: Mapping[str, int], transaction: Transaction | None = None) -> None:
        """Set the ranks of factors that were loaded from a checkpoint with capacities above them.

        Raises:
            PlanError: a rank above the capacity.
        """
        with Transaction(transaction) as transaction:
            for name, rank in ranks.items():
                if rank > (site := self.adapter.sites[name]).capacity:
                    raise PlanError(f"{name}: the checkpoint has rank {rank}, above the capacity {site.capacity}")
                site_edits.mask(site, transaction, rank)
            for follower in self.listeners.followers:
                follower.set_masked_ranks(ranks, transaction)
            live = {name: site.rank for name, site in self.adapter.sites.items()}
            transaction.attr(self, "_layout", self._layout.with_ranks(live))

    @property
    def masked_ranks(self) -> dict[str, int]:
        """Ranks of the modules whose capacity may be above them."""
        return {name: site.rank for name, site in self.adapter.sites.items() if site.masked}

    # -- before anything is written ---------------------------------------------------------------------------------

    def _agree(self, layout: Layout) -> Layout:
        """Return `layout` with training, precision and scaling, which the owner may have changed, as they are live."""
        live = self.adapter.layout()
        for name in {**layout, **live}:
            if name not in layout or name not in live or layout[name].rank != live[name].rank:
                ranks = [str(x[name].rank) if name in x else "unknown" for x in (layout, live)]
                raise PlanError(f"{name}: rank is {ranks[0]} in the layout but {ranks[1]} in the model")
        slots = {}
        for name, slot in layout.items():
            now = live[name]
            slots[name] = replace(slot, trainable=now.trainable, itemsize=now.itemsize, scaling=now.scaling)
        return Layout(slots)

    def _check_optimizer(self, plan: RankPlan, layout: Layout) -> set[str]:
        if self.optimizer_state is None:
            return set()
        on = {
            n: site_edits.switched(self.adapter.sites[n])
            for n, ops in plan.ops.items()
            if layout[n].rank and any(isinstance(op, Train) and op.on for op in ops)
        }
        touched = {
            n
            for n, ops in plan.ops.items()
            if plan.state == "carry" and any(not isinstance(op, Train | Share) for op in ops)
        }
        return self.optimizer_state.check(touched, on)

    def _rewarm(self, plan: RankPlan, lost: bool) -> int | None:
        if plan.state == "reset":
            return plan.rewarm
        return self.warmup if lost else None

    # -- writing ----------------------------------------------------------------------------------------------------

    def _replace(self, transaction: Transaction, staged: Sequence[Staged]) -> bool:
        """Let config and optimizer follow what was committed. Returns whether parameters were replaced."""
        resized = [s for s in staged if s.resized]
        if resized:
            self.adapter.write_config(transaction)
        if self.optimizer_state is not None:
            self.optimizer_state.write(transaction, [s.swap for s in resized])
            for s in staged:
                if s.fill is not None:
                    self.optimizer_state.fill(transaction, s.swap)
            self.holders.watch(transaction, [s.swap for s in resized])
        return bool(resized)

    def _commit(self, transaction: Transaction, staged: Staged, rank: int) -> None:
        site, swap = staged.swap.site, staged.swap
        if staged.fill is not None:
            site_edits.fill(site, transaction, staged.fill["A"], staged.fill["B"], rank)
        if staged.resized:
            if staged.entries is not None and swap.new:
                site_edits.rejoin(site, transaction, staged.entries)
            if swap.new:
                site_edits.put(site, transaction, swap.new["A"], swap.new["B"])
            elif site.has_factors:
                site_edits.leave(site, transaction)
        if staged.train is not None:
            site_edits.train(site, transaction, staged.train)

    def _verify(self, staged: Sequence[Staged], target: Layout) -> None:
        """Raise, within the transaction, if model, config, optimizer and `target` do not agree."""
        problem = None
        live = self.adapter.layout()
        for name, slot in target.items():
            now = live[name]
            if (now.rank, now.in_features, now.out_features) != (slot.rank, slot.in_features, slot.out_features):
                problem = f"{name}: is {now} and should be {slot}"
        for s in staged:
            if live[s.swap.site.name].trainable != target[s.swap.site.name].trainable:
                problem = f"{s.swap.site.name}: trainable is {live[s.swap.site.name].trainable}"
        if self.optimizer_state is not None:
            problem = problem or self.optimizer_state.verify([s.swap for s in staged])
        if any(s.resized for s in staged):
            problem = problem or self.adapter.config_problem()
        if problem is not None:
            raise RankFlowError(f"{problem} after a resize, which was undone; please report this")
