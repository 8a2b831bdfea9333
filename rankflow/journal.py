"""Writes that can be undone: all of them are made, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Journal:
    """Remembers how to undo each write made through it, and does so when its `with` block is left by an exception.

    With an `outer` one, what was written is undone too when that one is left by an exception later.
    """

    def __init__(self, outer: Journal | None = None) -> None:
        self._outer = outer
        self._undo: list[Callable[[], object]] = []

    def attr(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value"""
        old = getattr(owner, name)
        self.write(lambda: setattr(owner, name, value), lambda: setattr(owner, name, old))

    def contents(self, owner: dict[Any, Any] | list[Any], value: Mapping[Any, Any] | Iterable[Any]) -> None:
        """Let a dict or a list hold what `value` holds, in that order, without becoming another object."""
        old, new = owner.copy(), owner.__class__(value) if isinstance(owner, list) else dict(value)
        self.write(lambda: _fill(owner, new), lambda: _fill(owner, old))

    def tensor(self, t: Tensor, value: Tensor) -> None:
        """Let `t` hold `value`, in place."""
        old = t.detach().clone()
        self.write(lambda: _copy(t, value), lambda: _copy(t, old))

    def keep(self, owner: Any, *names: str) -> None:
        """Let these attributes hold what they hold now, in the same objects, whatever is written to them otherwise."""
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, dict | list):
                self.contents(value, value)
            self.attr(owner, name, value)

    def undo(self, undo: Callable[[], object]) -> None:
        """What else is to be done when everything written from here on has been undone."""
        self.write(lambda: None, undo)

    def write(self, do: Callable[[], object], undo: Callable[[], object]) -> None:
        """`undo` must be right whether `do` failed before, halfway or after."""
        self._undo.append(undo)
        do()

    def rollback(self) -> None:
        """Undo everything, last write first; where one cannot be undone, the others are all the same."""
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except BaseException:
                self.rollback()
                raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.rollback()
        elif self._outer is not None:
            self._outer._undo += self._undo


@torch.no_grad()
def _copy(t: Tensor, value: Tensor) -> None:
    t.copy_(value)


def _fill(owner: dict[Any, Any] | list[Any], value: Any) -> None:
    if isinstance(owner, list):
        owner[:] = value
    else:
        owner.clear()
        owner.update(value)
