"""Let Ctrl-C wait until the change in progress is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_blocks: list[HeldBack] = []  # those the main thread is in, outermost first


class HeldBack:
    """Let an interrupt wait for the end of the `with` block. A second one of the same kind is let through at once.

    Interrupts are SIGINT and SIGTERM where Python handles them, and the main thread is the one that gets them.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waiting: set[int] = set()

    def __enter__(self) -> HeldBack:
        if threading.current_thread() is threading.main_thread():
            _blocks.append(self)
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, self._wait)
        return self

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self in _blocks and number not in self._waiting:
            self._waiting.add(number)
            return
        self._waiting.discard(number)
        self._handlers[number](number, frame)

    def deliver(self) -> None:
        """Raise the interrupt that waits, if there is one."""
        while self._waiting:
            number = self._waiting.pop()
            self._handlers[number](number, None)

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        if self in _blocks:
            del _blocks[_blocks.index(self) :]
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._wait:
                signal.signal(number, handler)
        self.deliver()


def give_way() -> None:
    """Let through an interrupt that waits, as nothing is half done at this point, whatever block this is in."""
    if threading.current_thread() is threading.main_thread():
        for block in _blocks:
            block.deliver()
