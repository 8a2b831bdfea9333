"""Keeping code under `torch.compile` eager for as long as anybody listens: a compiled graph would ignore new hooks."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_listeners: set[int] = set()
_stance: list[Any] = []  # the one that the first listener set, until the last has left


def stay_eager(listener: object) -> weakref.finalize:
    """Compiled code runs eagerly until what is returned is called, or `listener` is gone.

    Listeners come and go in any order; after the last one the stance is again what it was before the first.
    """
    leave = weakref.finalize(listener, _leave, id(listener))  # first: whatever interrupts the rest is undone by it
    if not _listeners:
        _stance.append(torch.compiler.set_stance("force_eager"))
    _listeners.add(id(listener))
    return leave


def _leave(listener: int) -> None:
    _listeners.discard(listener)
    if not _listeners and _stance:
        _stance.pop().__exit__(None, None, None)
