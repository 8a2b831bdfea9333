"""Failures at every line of rankflow that a piece of work runs, and at every single write that can be undone."""

from __future__ import annotations

import ast
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import rankflow
from rankflow.lora.interrupts import HeldBack
from rankflow.lora.transaction import Transaction

PACKAGE = str(Path(rankflow.__file__).parent)
_WRITE = Transaction.write.__code__
_FINALIZING = weakref.finalize.__call__.__code__
_UNDOING = {Transaction.__exit__.__code__, Transaction.rollback.__code__}  # no way back from there
_UNDOING |= {HeldBack.__exit__.__code__, HeldBack.deliver.__code__}  # all is done by then


class Planted(Exception):
    pass


@cache
def _cleaning(file: str) -> frozenset[int]:
    """Lines inside `finally`: what fails there has no one to clean up after it."""
    tries = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Try)]
    return frozenset(
        line for node in tries for stmt in node.finalbody for line in range(stmt.lineno, (stmt.end_lineno or 0) + 1)
    )


def _at_the_end_of_something(frame: FrameType | None) -> bool:
    """Whether this runs because an object is gone (`weakref.finalize`), whenever that is found out: it is no part of
    the work, and Python drops what is raised there."""
    while frame is not None:
        if frame.f_code is _FINALIZING and frame.f_locals["_"] is not None:  # else somebody calls it himself
            return True
        frame = frame.f_back
    return False


@contextmanager
def failing(at: int) -> Iterator[Callable[[], int]]:
    """`Planted` is raised at the place of that number; what is yielded tells how many places there were.

    A place is a line of rankflow's the first time it runs, and both before and after every write of a `Transaction`. So
    whatever is written, in whatever way, some place lies between it and the next thing that is.
    """
    seen: set[tuple[CodeType, int]] = set()
    places = 0

    def place() -> None:
        nonlocal places
        places += 1
        if places - 1 == at:
            sys.settrace(None)
            raise Planted

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        code, line = frame.f_code, frame.f_lineno
        if code is _WRITE:
            if event in ("line", "return") and sys.exc_info()[0] is None:
                place()
        elif event == "line" and (code, line) not in seen and line not in _cleaning(code.co_filename):
            seen.add((code, line))
            place()
        return inside

    def entering(frame: FrameType, event: str, argument: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code not in _UNDOING
        return inside if ours and not _at_the_end_of_something(frame.f_back) else None

    before = sys.gettrace()
    sys.settrace(entering)
    try:
        yield lambda: places
    finally:
        sys.settrace(before)
