"""A run is found from what it left, and its losses are read where the Trainer wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankflow.analysis.run import find_ledger, losses_beside


def state(path: Path, *losses: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]
    path.write_text(json.dumps({"log_history": [*lines, {"step": 9, "eval_loss": 7.0}]}))
    return path


@pytest.mark.parametrize("saved", ["out", "out/adapter", "out/checkpoint-20"])
def test_the_ledger_is_found_from_an_adapter_that_was_saved_with_it(tmp_path: Path, saved: str):
    adapter = tmp_path / saved
    adapter.mkdir(parents=True)
    ledger = tmp_path / "out" / "rankflow.jsonl"
    ledger.touch()
    (adapter / "adapter_config.json").write_text("{}")
    assert find_ledger(adapter) == ledger


def test_folders_that_hold_no_adapter_are_not_looked_for_elsewhere(tmp_path: Path):
    (tmp_path / "rankflow.jsonl").touch()
    (tmp_path / "empty").mkdir()
    assert find_ledger(tmp_path / "empty") == tmp_path / "empty" / "rankflow.jsonl"


def test_losses_are_those_beside_the_ledger_or_of_its_newest_checkpoint(tmp_path: Path):
    ledger = tmp_path / "rankflow.jsonl"
    assert losses_beside(ledger) == []
    state(tmp_path / "checkpoint-9" / "trainer_state.json", 3.0)
    state(tmp_path / "checkpoint-100" / "trainer_state.json", 2.0, float("nan"), 1)
    assert losses_beside(ledger) == [(0, 2.0), (20, 1.0)]
    state(tmp_path / "trainer_state.json", 0.5)
    assert losses_beside(ledger) == [(0, 0.5)]


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 3}', '{"log_history": [{"loss": 1, "step": {}}]}'])
def test_a_damaged_state_is_warned_of(tmp_path: Path, text: str):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.warns(UserWarning, match="no losses"):
        assert losses_beside(tmp_path / "rankflow.jsonl") == []


def test_losses_that_are_no_numbers_are_left_out_and_said(tmp_path: Path):
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"loss": {}, "step": 1}, {"loss": 2.0, "step": 2}, {"loss": NaN, "step": 3}]}'
    )
    with pytest.warns(UserWarning, match="1 losses"):
        assert losses_beside(tmp_path / "rankflow.jsonl") == [(2, 2.0)]
