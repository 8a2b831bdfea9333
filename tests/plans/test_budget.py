"""Budgets, limits and the two ways of spending: against brute force, and at their edges."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from rankflow.errors import ConfigError, PlanError
from rankflow.plans.allocate import allocate, even, grow_by_score, round_scores
from rankflow.plans.budget import Budget, reachable
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limit, Limits

NAMES = [f"model.layers.{i}.attn.{m}_proj" for i in range(2) for m in "qkv"]


def layout(ranks=(4, 4, 4, 4, 4, 4), shapes=None, **limits) -> Layout:
    shapes = shapes or [(16, 16)] * len(ranks)
    return Layout({NAMES[i]: Slot(r, *shapes[i], 2.0, **limits) for i, r in enumerate(ranks)})


# -- budgets --------------------------------------------------------------------------------------------------------


def test_each_kind_resolves_to_whole_units():
    wide = layout((2, 3), [(8, 16), (4, 4)])
    assert Budget("mean_rank", 2.5).resolve(wide) == Budget("total_rank", 5)
    assert Budget("mean_rank", 2.4).resolve(wide) == Budget("total_rank", 4)
    assert Budget("fraction", 0.5).resolve(wide) == Budget("max_params", (2 * 24 + 3 * 8) // 2)
    assert Budget("size", 4096).resolve(wide) == Budget("size", 4096)
    assert [Budget(k, 1).spent(wide) for k in ("total_rank", "max_params", "size")] == [5, 72, 288]


def test_shares_are_those_that_were_written_not_their_binary_neighbours():
    many = Layout({str(i): Slot(1, 4, 4, 1.0) for i in range(100)})
    assert Budget("mean_rank", 0.29).resolve(many).amount == 29  # 0.29 * 100 is 28.999999999999996
    assert Budget("mean_rank", 1.1).resolve(many).amount == 110


def test_modules_that_left_count_in_the_mean():
    assert Budget("mean_rank", 2).resolve(layout((0, 0, 4))).amount == 6


@pytest.mark.parametrize(
    ("kind", "amount", "words"),
    [
        ("mean_rank", 0, "not a positive number"),
        ("mean_rank", float("nan"), "not a positive number"),
        ("total_rank", 2.5, "not a whole number"),
        ("fraction", 1.1, "over 1"),
        ("rank", 3, "unknown budget 'rank'"),
    ],
)
def test_impossible_amounts_are_refused(kind, amount, words):
    with pytest.raises(ConfigError, match=words):
        Budget(kind, amount)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="leaves no rank at all"):
        Budget("mean_rank", 0.1).resolve(layout())


# -- limits ---------------------------------------------------------------------------------------------------------


def spans(limited: Layout) -> list[tuple[int, int]]:
    return [(slot.min_rank, slot.max_rank) for slot in limited.values()]


def test_later_lines_win_over_earlier_ones():
    limits = Limits((Limit("*", 1, 8), Limit("*.q_proj", max=4), Limit("re:.*layers\\.1.*", min=2)))
    assert spans(limits.apply(layout())) == [(1, 4), (1, 8), (1, 8), (2, 4), (2, 8), (2, 8)]


def test_limits_never_widen_what_a_module_is_able_to():
    able = Layout({"experts": Slot(4, 8, 8, 1.0, min_rank=1, max_rank=6, multiple=2)})
    slot = Limits((Limit("*", 0, 99),), multiple=3).apply(able)["experts"]
    assert (slot.min_rank, slot.max_rank, slot.multiple) == (1, 6, 6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["q_proj", "layers.1.attn.q_proj", "^model\\.layers\\.0\\..*", "[qk]_proj", "v_proj$"]),
        unique=True,
        min_size=1,
    )
)
def test_a_rank_pattern_matches_as_it_does_in_peft(keys):
    """Each key gets a rank of its own, so that the limit tells which key PEFT would have taken."""
    pattern = {key: i + 1 for i, key in enumerate(keys)}
    limited = Limits(tuple(Limit(k, max=v, peft=True) for k, v in pattern.items())).apply
    expected = [pattern.get(get_pattern_key(pattern, name), 16) for name in NAMES]
    try:
        assert [slot.max_rank for slot in limited(layout()).values()] == expected
    except ConfigError as e:  # a key that some earlier key leaves nothing to still matches a module
        pytest.fail(str(e))


def test_a_number_under_a_glob_is_a_maximum_too():
    limited = Limits((Limit("*.k_proj", max=2, peft=True),)).apply(layout())
    assert [slot.max_rank for slot in limited.values()] == [16, 2, 16, 16, 2, 16]


def test_all_patterns_that_match_nothing_are_named_with_what_is_nearest():
    with pytest.raises(ConfigError) as e:
        Limits((Limit("*.quary", 1), Limit("re:layers.*", 1), Limit("*.0.attn.v_prj", 1), Limit("re:(", 1))).apply(
            layout()
        )
    lines = str(e.value).splitlines()
    assert len(lines) == 4
    assert "'*.quary' matches no module" in lines[0]
    assert "'*.0.attn.v_prj' matches no module; the nearest is 'model.layers.0.attn.v_proj'" in lines[2]
    assert "not a regular expression" in lines[3]


def test_contradictions_are_errors():
    with pytest.raises(ConfigError, match=r"q_proj: min 6 \(\*\.q_proj\) and max 4 \(\*\) leave no rank"):
        Limits((Limit("*", max=4), Limit("*.q_proj", min=6))).apply(layout())
    with pytest.raises(ConfigError, match="together allow no rank"):
        Limits((Limit("*", 5, 7),), buckets=(4, 8)).apply(layout())
    with pytest.raises(ConfigError, match="together allow no rank"):
        Limits((Limit("*.q_proj", 1, 2), Limit("*.k_proj", 3)), ties=(("*.q_proj", "*.k_proj"),)).apply(layout())


def test_ties_join_groups_and_split_by_what_a_pattern_captures():
    ties = [slot.tie for slot in Limits(ties=(("*.q_proj", "*.k_proj"),)).apply(layout()).values()]
    assert ties[0] == ties[1] == ties[3] == ties[4] is not None
    assert ties[2] is ties[5] is None
    by_layer = Limits(ties=((r"re:.*layers\.(\d)\..*",),)).apply(layout())
    assert [len({s.tie for n, s in by_layer.items() if f".{i}." in n}) for i in (0, 1)] == [1, 1]
    assert len({slot.tie for slot in by_layer.values()}) == 2
    joined = Limits(ties=(("*.q_proj", "*.k_proj"), ("*.k_proj", "*.v_proj"))).apply(layout())
    assert len({slot.tie for slot in joined.values()}) == 1


def test_tied_modules_of_different_rank_are_refused():
    with pytest.raises(ConfigError, match="must start at one rank"):
        Limits(ties=(("*.q_proj",),)).apply(layout((4, 4, 4, 8, 4, 4)))


# -- allocate -------------------------------------------------------------------------------------------------------


def best(gains, slots, budget):
    """The greatest sum of gains there is, by trying everything."""
    names = list(slots)
    top = 0.0
    for ranks in itertools.product(*(range(len(gains[n]) + 1) for n in names)):
        taken = slots.with_ranks(dict(zip(names, ranks, strict=True)))
        if budget.spent(taken) > budget.amount or not all(s.allows(s.rank) for s in taken.values()):
            continue
        ties = {}
        if any(ties.setdefault(s.tie, s.rank) != s.rank for s in taken.values() if s.tie):
            continue
        top = max(top, sum(sum(gains[n][:r]) for n, r in zip(names, ranks, strict=True)))
    return top


@st.composite
def problems(draw, plain: bool):
    count = draw(st.integers(1, 4))
    gains, slots = {}, {}
    multiple = 1 if plain else draw(st.sampled_from([1, 2]))
    buckets = () if plain else draw(st.sampled_from([(), (1, 4)] if multiple == 1 else [(), (2, 4)]))
    tie = None if plain else draw(st.sampled_from([None, "t"]))
    for name in NAMES[:count]:
        values = draw(st.lists(st.floats(0, 10, width=16), min_size=0 if plain else 4, max_size=4))
        gains[name] = sorted(values, reverse=True)
        width = 8 if plain else draw(st.sampled_from([4, 8, 40]))
        low = draw(st.integers(0, 1)) if plain and values else 0
        slots[name] = Slot(4, 8, width, 1.0, low, 4, multiple=multiple, buckets=buckets, tie=tie if count > 2 else None)
    if not plain and tie and count > 2:
        slots[NAMES[0]] = replace(slots[NAMES[0]], tie=None)
    return gains, Layout(slots)


@settings(max_examples=150, deadline=None)
@given(problems(plain=True), st.integers(1, 16))
def test_the_optimum_is_exact_where_costs_are_equal(problem, amount):
    gains, slots = problem
    budget = Budget("total_rank", amount)
    can = sum(len(g) for g in gains.values())
    least = sum(slot.min_rank for slot in slots.values())
    if amount < least or not can:
        with pytest.raises(ConfigError):
            allocate(gains, slots, budget)
        return
    ranks = allocate(gains, slots, budget)
    assert sum(ranks.values()) == min(amount, can)
    got = sum(sum(gains[n][:r]) for n, r in ranks.items())
    assert got == pytest.approx(best(gains, slots, budget), rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(problems(plain=False), st.integers(60, 800))
def test_it_is_within_one_increment_where_costs_differ(problem, amount):
    gains, slots = problem
    budget = Budget("max_params", amount)
    top = best(gains, slots, budget)
    try:
        ranks = allocate(gains, slots, budget)
    except ConfigError:
        assert top == 0  # not a single direction can be had
        return
    taken = slots.with_ranks(ranks)
    assert budget.spent(taken) <= amount
    assert all(slot.allows(slot.rank) for slot in taken.values())
    assert len({slot.rank for slot in taken.values() if slot.tie}) <= 1
    rungs = [r for r in range(5) if slots[NAMES[0]].allows(r)]
    jump = max(b - a for a, b in itertools.pairwise(rungs))
    members = [[n for n, s in slots.items() if s.tie], *([n] for n, s in slots.items() if not s.tie)]
    increment = max(sum(sum(gains[n][:jump]) for n in unit) for unit in members)
    got = sum(sum(gains[n][:r]) for n, r in ranks.items())
    assert top - increment - 1e-3 <= got <= top + 1e-3


def test_what_counts_is_gain_per_cost():
    slots = layout((4, 4), [(8, 8), (8, 72)])  # 16 and 80 parameters a rank
    gains = {NAMES[0]: [2.0] * 4, NAMES[1]: [3.0] * 4}
    assert list(allocate(gains, slots, Budget("max_params", 80)).values()) == [4, 0]


def test_equal_gains_come_out_even_and_earlier_modules_first():
    assert allocate({n: [1.0] * 4 for n in NAMES}, layout(), Budget("total_rank", 15)) == dict(
        zip(NAMES, (3, 3, 3, 2, 2, 2), strict=True)
    )
    assert even(layout(), Budget("total_rank", 13)) == dict(zip(NAMES, (3, 2, 2, 2, 2, 2), strict=True))


def test_noise_in_the_last_bits_decides_nothing():
    exact = {n: [1.0, 0.5] for n in NAMES}
    noisy = {n: [1.0 + 1e-7 * i, 0.5 - 1e-8 * i] for i, n in enumerate(NAMES)}
    budget = Budget("total_rank", 8)
    assert allocate(noisy, layout(), budget) == allocate(exact, layout(), budget)
    assert round_scores({"a": 1.0 + 1e-9, "b": 3e-20 * (1 + 1e-9)}) == round_scores({"a": 1.0, "b": 3e-20})


def test_small_gains_are_not_lost_beside_large_ones():
    gains = {NAMES[0]: [1e6], NAMES[1]: [1e-3], NAMES[2]: [2e-3]}
    ranks = allocate(gains, layout((1, 1, 1)), Budget("total_rank", 2))
    assert list(ranks.values()) == [1, 0, 1]


def test_present_ranks_over_their_maximum_come_down_and_under_their_minimum_come_up():
    slots = Layout({"a": Slot(8, 16, 16, 1.0, 0, 4), "b": Slot(1, 16, 16, 1.0, 3, 8)})
    assert allocate({"a": [9.0] * 8, "b": [1.0]}, slots, Budget("total_rank", 20)) == {"a": 4, "b": 3}


def test_budgets_that_limits_make_impossible_say_what_is_possible():
    slots = Limits((Limit("*", 2, 4),)).apply(layout())
    assert reachable(slots, Budget("total_rank", 1)) == (12, 24)
    with pytest.raises(ConfigError, match=r"budget is total rank 11 but limits allow no less than total rank 12"):
        allocate({}, slots, Budget("total_rank", 11))


def test_gains_that_are_no_numbers_are_refused():
    with pytest.raises(PlanError, match=r"q_proj: score is nan"):
        allocate({NAMES[0]: [float("nan")]}, layout((1,)), Budget("total_rank", 1))


# -- growth ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
    st.lists(st.integers(0, 6), min_size=6, max_size=6),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(4, 16),
)
def test_growth_never_passes_the_budget_and_meets_it(scores, ranks, top_k, grow_by, more, top):
    slots = layout(tuple(ranks), max_rank=top) if sum(ranks) else layout((1, *ranks[1:]), max_rank=top)
    room = sum(max(0, s.max_rank - s.rank) for s in slots.values())
    budget = Budget("total_rank", slots.total_rank + min(more, room) or 1)
    by_name = dict(zip(NAMES, scores, strict=True))
    grown = grow_by_score(by_name, slots, budget, top_k, grow_by)
    after = slots.with_ranks(grown)
    assert all(slot.rank <= after[n].rank <= max(slot.rank, slot.max_rank) for n, slot in slots.items())
    assert after.total_rank - slots.total_rank == min(more, room, top_k * grow_by)
    all_of_it = slots.with_ranks(grow_by_score(by_name, slots, budget, None, grow_by))
    assert all_of_it.total_rank == budget.amount


def test_the_best_modules_grow_and_ties_go_by_order():
    slots, budget = layout((1,) * 6), Budget("total_rank", 100)
    assert grow_by_score(dict(zip(NAMES, (1, 5, 5, 9, 5, 0), strict=True)), slots, budget, 3, 2) == {
        NAMES[3]: 3,
        NAMES[1]: 3,
        NAMES[2]: 3,
    }
    assert list(grow_by_score({}, slots, budget, 2, 1)) == NAMES[:2]


def test_the_last_event_is_cut_short():
    grown = grow_by_score(
        dict(zip(NAMES, (6, 5, 4, 3, 2, 1), strict=True)), layout((1,) * 6), Budget("total_rank", 9), 6, 2
    )
    assert grown == {NAMES[0]: 3, NAMES[1]: 2}


def test_what_a_module_cannot_take_goes_to_the_next():
    slots = Layout({"a": Slot(3, 16, 16, 1.0, 0, 4), "b": Slot(1, 16, 16, 1.0), "c": Slot(1, 16, 16, 1.0)})
    assert grow_by_score({"a": 9, "b": 5, "c": 1}, slots, Budget("total_rank", 50), 2, 2) == {"a": 4, "b": 3, "c": 2}


def test_modules_under_their_minimum_come_first():
    slots = layout((1, 1, 1, 1, 1, 1), min_rank=2)
    grown = grow_by_score({NAMES[5]: 1.0}, slots, Budget("total_rank", 13), 1, 4)
    assert list(slots.with_ranks(grown).ranks.values()) == [2, 2, 2, 2, 2, 3]
    with pytest.raises(ConfigError, match="minima ask for total rank 12"):
        grow_by_score({}, slots, Budget("total_rank", 11), 1, 1)


def test_buckets_and_ties_grow_in_their_own_steps():
    slots = layout((2, 2, 2), buckets=(2, 8), tie="t")
    assert grow_by_score({NAMES[0]: 1.0}, slots, Budget("total_rank", 23), None, 2) == {}
    assert set(grow_by_score({NAMES[0]: 1.0}, slots, Budget("total_rank", 24), 1, 2).values()) == {8}


def test_a_module_that_left_can_come_back():
    assert grow_by_score({NAMES[0]: 2.0}, layout((0, 4)), Budget("total_rank", 8), 1, 2) == {NAMES[0]: 2}
