"""Margins mean what they say: smaller changes of scores decide the same, and the least larger one does not."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rankflow.plans.allocate import allocate, allocation_margin, closest, grow_by_score, growth_margin
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import prune, pruning_margin


def layout(ranks: list[int], shapes: list[tuple[int, int]] | None = None, **limits) -> Layout:
    shapes = shapes or [(16, 16)] * len(ranks)
    return Layout({f"m{i}": Slot(r, *shapes[i], 1.0, **limits) for i, r in enumerate(ranks)})


def drawn(rng: random.Random, modules: int, directions: int) -> dict[str, list[float]]:
    return {f"m{i}": sorted((rng.random() for _ in range(directions)), reverse=True) for i in range(modules)}


@pytest.mark.parametrize("seed", range(20))
def test_scores_that_change_by_less_than_the_margin_decide_the_same(seed: int):
    rng = random.Random(seed)
    of, budget = layout([4] * 5), Budget("total_rank", rng.randint(1, 19))
    gains = drawn(rng, 5, 4)
    ranks = allocate(gains, of, budget)
    margin = allocation_margin(gains, ranks, of, budget)
    assert margin is not None
    d = 0.99 * margin / (2 - margin)  # then (1 - d) taken > (1 + d) left still
    for _ in range(10):
        factors = {name: 1 + d * rng.choice((-1, 1)) for name in gains}
        moved = {name: [g * factors[name] for g in found] for name, found in gains.items()}
        assert allocate(moved, of, budget) == ranks


@pytest.mark.parametrize("seed", range(20))
def test_the_pair_that_is_closest_changes_places_just_beyond_it(seed: int):
    rng = random.Random(seed)
    of, budget = layout([4] * 5), Budget("total_rank", rng.randint(2, 18))
    gains = drawn(rng, 5, 4)
    ranks = allocate(gains, of, budget)
    margin = allocation_margin(gains, ranks, of, budget)
    pairs = {
        1 - gains[j][ranks[j]] / gains[i][ranks[i] - 1]: (i, j)
        for i, j in itertools.permutations(gains, 2)
        if ranks[i] > 0 and ranks[j] < 4
    }
    assert margin is not None
    assert margin == pytest.approx(min(pairs), abs=2e-5)
    taken, left = pairs[min(pairs)]
    beyond = 1.0001 / (1 - margin)
    moved = {**gains, left: [g * beyond for g in gains[left]]}
    assert allocate(moved, of, budget)[left] > ranks[left]
    assert taken != left


def test_what_could_not_be_had_instead_does_not_count():
    gains = {"m0": [5.0, 4.0], "m1": [4.5, 3.9]}
    dear = layout([2, 2], [(8, 8), (32, 32)])  # 16 and 64 parameters a direction
    budget = Budget("max_params", 2 * 16)
    assert allocate(gains, dear, budget) == {"m0": 2, "m1": 0}
    assert allocation_margin(gains, {"m0": 2, "m1": 0}, dear, budget) is None
    least = layout([2, 2], min_rank=1)
    ranks = allocate(gains, least, Budget("total_rank", 2))
    assert allocation_margin(gains, ranks, least, Budget("total_rank", 2)) is None, "minima compete with nobody"


def test_ties_have_no_margin_and_what_is_worth_nothing_has_no_rival():
    even = layout([2, 2])
    budget = Budget("total_rank", 3)
    for gains, expected in (([1.0, 1.0], 0.0), ([0.0, 0.0], None), ([2.0, 0.0], None)):
        both = {"m0": gains, "m1": gains}
        assert allocation_margin(both, allocate(both, even, budget), even, budget) == expected
    both = {"m0": [2.0, 1.0], "m1": [2.0, 1.0]}
    assert allocation_margin(both, allocate(both, even, Budget("total_rank", 4)), even, Budget("total_rank", 4)) is None


def test_growth_stands_between_the_last_that_grew_and_the_next_that_could():
    of = layout([2, 2, 8, 2], max_rank=8)
    scores = {"m0": 4.0, "m1": 3.0, "m2": 3.9, "m3": 1.0}  # m2 has all it may have
    grown = grow_by_score(scores, of, Budget("total_rank", 20), 1, 2)
    assert list(grown) == ["m0"]
    assert growth_margin(scores, grown, of) == pytest.approx(0.25)
    grown = grow_by_score(scores, of, Budget("total_rank", 32), None, 2)
    assert growth_margin(scores, grown, of) is None, "all that could have grown"
    assert growth_margin({}, {"m0": 4}, of) is None


def test_pruning_stands_between_the_last_that_stays_and_the_first_that_goes():
    of = layout([2, 3])
    scores = {"m0": torch.tensor([3.0, 8.0]), "m1": torch.tensor([4.0, 1.0, 2.0])}
    budget = Budget("total_rank", 3)
    ops = prune(scores, of, budget)
    assert RankPlan(ops).apply_to(of).ranks == {"m0": 2, "m1": 1}
    assert pruning_margin(scores, ops, of, budget) == pytest.approx(1 - 2 / 3)


def test_the_closest_is_of_those_that_there_are():
    assert closest((None, 0.3, 0.2)) == 0.2
    assert closest((None,)) is None
