"""Writes that are undone together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rankflow.journal import Journal


def test_what_cannot_be_undone_is_no_hindrance_to_the_rest():
    owner = SimpleNamespace(a=1, b=2)

    def broken() -> None:
        raise OSError("gone")

    journal = Journal()
    journal.attr(owner, "a", 10)
    journal.undo(broken)
    journal.attr(owner, "b", 20)
    with pytest.raises(OSError, match="gone"):
        journal.rollback()
    assert (owner.a, owner.b) == (1, 2)


@pytest.mark.parametrize("fails", ["inside", "outside", "nowhere"])
def test_an_inner_journal_is_undone_with_the_outer_one(fails: str):
    owner: Any = SimpleNamespace(a=1, of={"x": 1}, listed=[1, 2])
    of, listed = owner.of, owner.listed
    try:
        with Journal() as outer:
            outer.attr(owner, "a", 2)
            with Journal(outer) as inner:
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
