"""Callbacks that are told when a resize has replaced parameters, which averages, other optimizers or lists may hold."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Op
from rankflow.plans.plan import RankPlan
from rankflow.surgery.staging import Staged

Parameters = Mapping[str, nn.Parameter]  # of one module, by role: A, B, bias, magnitude
OnResize = Callable[[str, Parameters, Parameters, Sequence[Op]], object]


class Follower(Protocol):
    """A second model that is resized as the first one is (`rankflow.surgery.ema`)."""

    def follow(self, plan: RankPlan, step: int, staged: Sequence[Staged], transaction: Transaction) -> None:
        """Carry out `plan`, as the first model did, through `transaction`."""

    def set_capacity(self, capacities: Mapping[str, int], transaction: Transaction) -> None:
        """Take over other capacities (`Surgeon.set_capacity`)."""

    def set_masked_ranks(self, ranks: Mapping[str, int], transaction: Transaction) -> None:
        """Take over ranks below the capacities (`Surgeon.set_masked_ranks`)."""

    def start(self, adapter: Adapter) -> None:
        """Follow the run that begins on `adapter`, which may have got other ranks since."""


class Listeners:
    """Callbacks that are called with (module name, old, new, ops) for every module that a resize has changed.

    `old` and `new` hold the module's parameters by role (`A`, `B`, and `bias` or `magnitude` where it has them); `old`
    is empty for a module that comes back into the adapter, `new` for one that leaves it. Under `mode: mask` factors are
    written in place, and both are the same; where only their capacity changes, `ops` is empty.

    They are called when model and optimizer have the new parameters, as a part of the step, which is done wholly or not
    at all. One that raises undoes the resize. Where a resize is undone, for whatever reason, they are called once more,
    with `old` and `new` exchanged and no ops, when model and optimizer are back; so is one that raised, or that an
    interrupt came before: let it replace what it finds.
    """

    def __init__(self) -> None:
        self._callbacks: OrderedDict[int, OnResize] = OrderedDict()
        self._followers: list[Follower] = []
        self._parted = False
        self._adapter: Callable[[], Adapter | None] = lambda: None  # of the run that is on

    def add(self, callback: OnResize) -> RemovableHandle:
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    @property
    def followers(self) -> Sequence[Follower]:
        return () if self._parted else self._followers

    def add_follower(self, follower: Follower) -> None:
        adapter = self._adapter()
        if adapter is not None and (ranks := {n: site.rank for n, site in adapter.sites.items() if site.masked}):
            follower.set_masked_ranks(ranks, Transaction())
        self._followers.append(follower)

    def start(self, adapter: Adapter) -> None:
        """Follow the run that begins on `adapter`."""
        self._parted = False
        self._adapter = weakref.ref(adapter)
        for follower in self._followers:
            follower.start(adapter)

    def part(self, transaction: Transaction) -> None:
        """Let followers stay as they are from here on: the run is over, and its best checkpoint is about to be
        loaded."""
        transaction.attr(self, "_parted", True)

    def expect(self, transaction: Transaction) -> Transaction:
        """A transaction for `tell` to note whom it has told. It is made before anything is written, so that it is
        undone last."""
        told = Transaction()
        transaction.undo(told.rollback)
        return told

    def tell(self, told: Transaction, staged: Sequence[Staged], ops: Mapping[str, Sequence[Op]]) -> None:
        for s in staged:
            if s.resized or s.fill is not None:
                swap, name = s.swap, s.swap.site.name
                for callback in list(self._callbacks.values()):
                    told.undo(partial(callback, name, swap.new, swap.old, ()))
                    callback(name, swap.old, swap.new, ops.get(name, ()))
