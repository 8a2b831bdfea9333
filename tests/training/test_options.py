"""Options of a run are checked where they are given, and are the same at both doors."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import rankflow
from rankflow.training.options import RunOptions


@pytest.mark.parametrize(
    "options",
    [{"on_unknown_state": "ignore"}, {"penalty": "loss"}, {"batches": {"input_ids": [1]}}, {"outer_batches": 3}],
)
def test_a_wrong_option_is_refused_when_it_is_given(options: dict):
    with pytest.raises(rankflow.ConfigError, match=next(iter(options))):
        RunOptions(**options)


def test_both_doors_take_the_options_under_their_names_with_their_defaults():
    own = {field.name: field.default for field in fields(RunOptions)}
    attach, callback = (
        {name: p.default for name, p in inspect.signature(door).parameters.items()}
        for door in (rankflow.attach, rankflow.RankFlowCallback.__init__)
    )
    assert {name: attach[name] for name in own} == own
    kept = own.keys() - {"penalty", "seed"}  # the Trainer computes the loss, and has a seed
    assert {name: callback[name] for name in kept} == {name: own[name] for name in kept}


def test_processes_compare_all_but_how_long_they_wait():
    assert RunOptions(timeout=1.0).alike() == RunOptions(timeout=2.0).alike()
    assert RunOptions(seed=1).alike() != RunOptions(seed=2).alike()
