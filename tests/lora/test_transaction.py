"""Writes that are undone together."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import snapshot
from tiny import Tiny, timeless, tiny

from rankflow.lora.adapter import Adapter
from rankflow.lora.interrupts import HeldBack, give_way
from rankflow.lora.interrupts import _blocks as held_back
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon
from rankflow.training.controller import Controller
from rankflow.training.ledger import Ledger
from rankflow.training.phases import Operations
from tests.contracts.test_nothing_lost import Told, assert_same, phases


@pytest.fixture(autouse=True)
def _python_gets_interrupts() -> Iterator[None]:
    """Which a shell switches off for what it runs in the background, and tests inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_cannot_be_undone_is_no_hindrance_to_the_rest():
    owner = SimpleNamespace(a=1, b=2)

    def broken() -> None:
        raise OSError("gone")

    transaction = Transaction()
    transaction.attr(owner, "a", 10)
    transaction.undo(broken)
    transaction.attr(owner, "b", 20)
    with pytest.raises(OSError, match="gone"):
        transaction.rollback()
    assert (owner.a, owner.b) == (1, 2)


@pytest.mark.parametrize("fails", ["inside", "outside", "nowhere"])
def test_an_inner_journal_is_undone_with_the_outer_one(fails: str):
    owner: Any = SimpleNamespace(a=1, of={"x": 1}, listed=[1, 2])
    of, listed = owner.of, owner.listed
    try:
        with Transaction() as outer:
            outer.attr(owner, "a", 2)
            with Transaction(outer) as inner:
                inner.keep(owner, "of", "listed")
                owner.of["y"] = 2
                owner.of = {}
                owner.listed.clear()
                inner.attr(owner, "a", 3)
                if fails == "inside":
                    raise KeyError
            if fails == "outside":
                raise KeyError
    except KeyError:
        assert (owner.a, owner.of, owner.listed) == (1, {"x": 1}, [1, 2])
        assert owner.of is of
        assert owner.listed is listed
    else:
        assert fails == "nowhere"
        assert (owner.a, owner.of, owner.listed) == (3, {}, [])


def test_what_is_interrupted_while_it_is_undone_is_undone_all_the_same():
    owner: Any = SimpleNamespace(of={"x": 1, "y": 2}, a=1)
    calls: list[str] = []

    def halfway() -> None:
        calls.append("undo")
        owner.of.clear()
        if len(calls) == 1:
            raise KeyboardInterrupt
        owner.of.update({"x": 1, "y": 2})

    def work() -> None:
        with Transaction() as transaction:
            transaction.attr(owner, "a", 2)
            transaction.undo(halfway)
            raise KeyError

    with pytest.raises(KeyboardInterrupt):
        work()
    assert (owner.of, owner.a) == ({"x": 1, "y": 2}, 1)


# -- interrupts -------------------------------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_end_of_the_outermost_journal_and_is_let_through_then():
    owner, before = SimpleNamespace(a=1), signal.getsignal(signal.SIGINT)
    reached = []

    def work() -> None:
        with Transaction() as outer:
            with Transaction(outer) as inner:
                signal.raise_signal(signal.SIGINT)
                inner.attr(owner, "a", 2)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert (owner.a, reached) == (2, ["the end"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_let_through_at_once_and_everything_undone():
    owner, before = SimpleNamespace(a=1), signal.getsignal(signal.SIGINT)

    def work() -> None:
        with Transaction() as transaction:
            transaction.attr(owner, "a", 2)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            owner.a = 3

    with pytest.raises(KeyboardInterrupt):
        work()
    assert owner.a == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_waits_is_let_through_where_nothing_is_half_done():
    owner = SimpleNamespace(a=1)

    def work() -> None:
        with Transaction() as transaction:
            signal.raise_signal(signal.SIGINT)
            transaction.attr(owner, "a", 2)
            give_way()
            owner.a = 3

    with pytest.raises(KeyboardInterrupt):
        work()
    assert owner.a == 1


def test_handlers_that_python_does_not_know_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Transaction():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def elsewhere() -> None:
        with Transaction():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def interrupted_at(code: CodeType, skip: int, work: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt before an instruction of `code`, of which `skip` are let run; whether there was one."""
    left, hit = skip, False

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, hit
        if event == "opcode":
            if left == 0:
                hit = True
                sys.settrace(None)
                raise KeyboardInterrupt
            left -= 1
        return inside

    def entering(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    traced = sys.gettrace()
    sys.settrace(entering)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            work()
    finally:
        sys.settrace(traced)
    return hit


WORKS = [
    Transaction.__init__, Transaction.__enter__, Transaction.__exit__, Transaction.write, Transaction.attr,
    HeldBack.__exit__,
    Controller._wholly, Controller._take_step, Ledger.begin, Ledger.write, Ledger._write, Operations.perform,
    Operations.apply, Surgeon.apply, Adapter.write_config,
]  # fmt: skip


@pytest.mark.parametrize("function", WORKS, ids=lambda f: f.__qualname__)
def test_a_step_interrupted_before_any_instruction_is_whole_or_not_at_all(tmp_path: Path, function: Any):
    """One in so many of them: calls of what is called often are many."""
    handler = signal.getsignal(signal.SIGINT)
    stride = {"Transaction.write": 41, "Transaction.attr": 97, "Surgeon.apply": 7}.get(function.__qualname__, 3)
    whole = grown(tmp_path / "whole")
    whole.flow.after_step()
    run, at = grown(tmp_path / "l"), 0
    undone, lines = state_of(run), (tmp_path / "l").read_bytes()
    while interrupted_at(function.__code__, at, run.flow.after_step):
        signal.signal(signal.SIGINT, handler)  # a real interrupt would have waited
        held_back.clear()
        assert torch.is_grad_enabled()
        if run.flow.step > 1:
            assert_same(run.end(), whole.end(), at)
            assert timeless(Ledger.read(tmp_path / "l").events) == whole.end()["events"]
            (tmp_path / "l").unlink()
            run = grown(tmp_path / "l")
            undone, lines = state_of(run), (tmp_path / "l").read_bytes()
        assert_same(state_of(run), undone, at)
        assert (tmp_path / "l").read_bytes() == lines
        at += stride
    assert at
    assert_same(run.end(), whole.end())


def grown(path: Path) -> Tiny:
    """A run whose second step is taken but for what rankflow does after it: to grow."""
    plans = {2: RankPlan({"first": (Grow(1),), "second": (Keep((0,)),)}, "grow")}
    run = Tiny(phases(Told(plans=plans), until=9), 8, model=tiny(), ledger=Ledger(path)).until(1)
    run.backward_and_step()
    return run


def state_of(run: Tiny) -> dict[str, Any]:
    return {"live": snapshot(run.model, run.optimizer), "flow": run.flow.state_dict()}
