"""When things happen, and the curves between."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.errors import ConfigError
from rankflow.plans.schedule import CURVES, When, curve, resolve_step


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (400, 400), ("0%", 0), ("10%", 100), ("12.34 %", 123), ("100%", 1000), (" 5% ", 50)]
)
def test_steps_and_percentages(value, steps):
    assert resolve_step(value, 1000) == steps


@pytest.mark.parametrize("value", [-1, "-1%", "101%", "100.1%", "10", "ten%", "%", "nan%", "inf%", 0.1, True, None, ""])
def test_what_is_neither_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^when\.start: "):
        resolve_step(value, 1000, what="when.start")


def test_a_first_phase_begins_one_interval_in_and_a_later_one_at_once():
    assert list(When(every="10%").resolve(100).events) == list(range(10, 101, 10))
    assert list(When(every="10%").resolve(100, 40, 80).events) == [40, 50, 60, 70]


def test_start_and_stop_are_of_the_whole_run_and_stop_is_exclusive():
    assert list(When("10%", "5%", "30%").resolve(200).events) == [20, 30, 40, 50]


def test_a_start_before_the_phase_keeps_its_beat():
    assert list(When(7, 10).resolve(100, 40, 70).events) == [47, 57, 67]


def test_a_phase_that_begins_with_the_run_is_not_due_before_the_first_step():
    assert When(0, 10).resolve(30).events[0] == 1


def test_a_small_share_of_a_short_run_is_every_step_but_zero_steps_are_an_error():
    assert When(every="1%").resolve(10).every == 1
    with pytest.raises(ConfigError, match=r"when\.every"):
        When(every=0).resolve(10)


def test_percentages_mean_nothing_before_the_run_is_known():
    with pytest.raises(ConfigError, match="still holds percentages"):
        When(every="5%").due(5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 60), st.integers(0, 70))
def test_due_next_and_progress_agree_with_the_list_of_events(start, every, stop, step):
    when = When(start, every, stop).resolve(60)
    events = [s for s in range(start, 61) if s < stop and (s - start) % every == 0]
    assert list(when.events) == events
    assert when.due(step) == (step in events)
    assert when.next(step) == next((e for e in events if e > step), None)
    done = sum(e <= step for e in events)
    assert when.progress(step) == (pytest.approx(done / len(events)) if events else 0.0)
    if events:
        assert when.progress(events[-1]) == 1.0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CURVES)), st.floats(1, 1e4), st.floats(1, 1e4), st.lists(st.floats(0, 1), min_size=2))
def test_curves_move_one_way_between_their_ends(name, first, last, ts):
    values = [curve(name, first, last, t) for t in sorted(ts)]
    slack = 1e-9 * max(first, last)
    assert all(min(first, last) - slack <= v <= max(first, last) + slack for v in values)
    sign = 1 if last >= first else -1
    assert all(sign * (b - a) >= -slack for a, b in itertools.pairwise(values))
    assert curve(name, first, last, 1.0) == last
    if name != "constant":
        assert curve(name, first, last, 0.0) == pytest.approx(first)


def test_the_ladder_halves_in_equal_shares():
    assert [curve("halving", 64, 8, t / 6) for t in range(7)] == [64, 64, 32, 32, 16, 16, 8]
    assert [curve("halving", 12, 4, t / 2) for t in range(3)] == [12, 6, 4]


def test_most_of_a_cubic_change_comes_early():
    assert curve("cubic", 12, 4, 0.5) == pytest.approx(4 + 8 / 8)
    assert math.isclose(curve("linear", 12, 4, 0.5), 8)


def test_a_cosine_is_half_a_period():
    for t in (0.0, 0.1, 0.5, 0.8):
        assert curve("cosine", 0.3, 0.0, t) == pytest.approx(0.3 / 2 * (1 + math.cos(t * math.pi)))


def test_a_share_of_a_phase_is_counted_in_its_own_updates():
    assert [When().resolve(100).at(t) for t in (0, 0.75, 1)] == [0, 75, 100]
    assert [When(stop=50).resolve(100, 40, 80).at(t) for t in (0, 0.5, 1)] == [40, 60, 80]
    assert When().resolve(100, 60).at(1) == 100
    with pytest.raises(ConfigError, match="not resolved against a run"):
        When().at(0.5)


def test_an_unknown_curve_is_named():
    with pytest.raises(ConfigError, match="unknown curve 'square'; known: constant"):
        curve("square", 1, 2, 0.5)  # type: ignore[arg-type]
