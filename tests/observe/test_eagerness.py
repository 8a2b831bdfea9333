"""Who listens keeps compiled code eager, and nobody for longer than that."""

from __future__ import annotations

import gc
import itertools
from contextlib import suppress

import pytest
import torch
from failing import Planted, failing

from rankflow.observe.compile import stay_eager


class Listener:
    pass


def compiles() -> bool:
    torch._dynamo.reset()
    graphs = []
    plus = torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert plus(torch.ones(2)).tolist() == [2, 2]
    return bool(graphs)


@pytest.fixture(autouse=True)
def nobody_listens():
    """Runs of other tests that were left in the middle listen until they are collected."""
    gc.collect()


def test_the_last_to_leave_lets_code_compile_again():
    assert compiles()
    one, other = Listener(), Listener()
    first, second = stay_eager(one), stay_eager(other)
    assert not compiles()
    first()
    assert not compiles()
    second()
    second()
    assert compiles()


def test_a_listener_that_is_gone_has_left():
    one = Listener()
    stay_eager(one)
    assert not compiles()
    del one
    assert compiles()


def test_a_stance_of_the_users_comes_back():
    with torch.compiler.set_stance("force_eager"):
        leave = stay_eager(Listener())
        leave()
        assert not compiles()
    assert compiles()


def test_who_fails_while_beginning_to_listen_has_left_when_gone():
    for at in itertools.count():
        listener = Listener()
        with suppress(Planted), failing(at) as places:
            stay_eager(listener)
        del listener
        assert compiles(), at
        if places() <= at:
            break
    assert at > 3
