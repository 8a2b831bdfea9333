"""Old names of arguments."""

from __future__ import annotations

import pytest

from rankflow.deprecation import renamed_arguments


@renamed_arguments(kind="from_format", gate="accept")
def call(source: str, *, from_format: str | None = None, accept: int = 0) -> tuple[str, str | None, int]:
    return source, from_format, accept


def test_an_old_name_works_and_warns_at_the_callers_line():
    with pytest.warns(FutureWarning, match="from_format") as caught:
        assert call("a", kind="peft") == ("a", "peft", 0)
    assert [warning.filename for warning in caught] == [__file__]


def test_new_names_are_taken_without_a_warning():
    assert call("a", from_format="peft", accept=1) == ("a", "peft", 1)


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="from_format= and kind="):
        call("a", from_format="peft", kind="peft")
