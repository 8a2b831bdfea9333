"""Writes that can be undone: all of them are made, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rankflow.lora.interrupts import HeldBack


class Transaction:
    """Remembers how to undo each write made through it, and does so when its `with` block is left by an exception.

    With an `outer` one, what was written is undone too when that one is left by an exception later. The outermost one
    holds back interrupts (`rankflow.lora.interrupts`).
    """

    def __init__(self, outer: Transaction | None = None) -> None:
        # One list for all: an inner one has nothing to hand over when it ends, which an interrupt could prevent
        self._undo: list[Callable[[], object]] = [] if outer is None else outer._undo
        self._first = len(self._undo)
        self._outer = outer
        self._held_back = HeldBack()

    def attr(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value"""
        old = getattr(owner, name)
        self.write(lambda: setattr(owner, name, value), lambda: setattr(owner, name, old))

    def contents(self, owner: dict[Any, Any] | list[Any], value: Mapping[Any, Any] | Iterable[Any]) -> None:
        """Give a dict or a list the contents of `value`, in that order, and keep it the same object."""
        old, new = owner.copy(), owner.__class__(value) if isinstance(owner, list) else dict(value)
        self.write(lambda: _fill(owner, new), lambda: _fill(owner, old))

    def tensor(self, t: Tensor, value: Tensor) -> None:
        """Write `value` into `t`, in place."""
        old = t.detach().clone()
        self.write(lambda: _copy(t, value), lambda: _copy(t, old))

    def keep(self, owner: Any, *names: str) -> None:
        """Restore these attributes on a rollback to the objects and contents that they hold now."""
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, dict | list):
                self.contents(value, value)
            self.attr(owner, name, value)

    def undo(self, undo: Callable[[], object]) -> None:
        """Register `undo`, to be called when everything written from here on has been undone."""
        self.write(lambda: None, undo)

    def write(self, do: Callable[[], object], undo: Callable[[], object]) -> None:
        """`undo` must be right whether `do` failed before, halfway or after, and may be called again."""
        self._undo.append(undo)
        do()

    def rollback(self) -> None:
        """Undo everything, last write first; where one cannot be undone, the others are all the same."""
        failures: list[BaseException] = []
        while len(self._undo) > self._first:
            undo = self._undo[-1]
            try:
                try:
                    undo()
                except Exception:
                    raise
                except BaseException as e:  # an interrupt, halfway: once more
                    failures.append(e)
                    undo()
            except BaseException as e:
                failures.append(e)
            self._undo.pop()
        if failures:
            raise failures[0]

    def __enter__(self) -> Transaction:
        if self._outer is None:
            self._held_back.__enter__()
            self.undo(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.rollback()
        finally:
            if self._outer is None:
                self._held_back.__exit__()


@torch.no_grad()
def _copy(t: Tensor, value: Tensor) -> None:
    t.copy_(value)


def _fill(owner: dict[Any, Any] | list[Any], value: Any) -> None:
    if isinstance(owner, list):
        owner[:] = value
    else:
        owner.clear()
        owner.update(value)
