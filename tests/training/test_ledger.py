"""The ledger: whole lines, replay, restore, kept matrices."""

from __future__ import annotations

import json

import pytest
import torch

from rankflow.errors import CheckpointError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop, Grow, Keep, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.training.ledger import Ledger

START = Layout({"a": Slot(4, 16, 8, 2.0), "b": Slot(2, 16, 8, 2.0)})
PLANS = [
    RankPlan({"a": (Keep((0, 2)),), "b": (Grow(3),)}, "first"),
    RankPlan(
        {"a": (Refactor(torch.randn(1, 2, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)),)}, "second"
    ),
    RankPlan({"a": (Drop(),), "b": (Keep((0, 1, 2, 3)), Grow(1))}, "third"),
]


def record(ledger: Ledger, plans: list[RankPlan], layout: Layout = START, step: int = 0) -> Layout:
    for plan in plans:
        step += 10
        layout = plan.apply_to(layout)
        ledger.append("resize", step, plan, reason=plan.reason)
    return layout


def begun(path=None, **options) -> Ledger:
    ledger = Ledger(path, **options)
    ledger.append("attach", 0, layout=START.to_json())
    return ledger


def test_replay_gives_the_last_layout(tmp_path):
    ledger = begun(tmp_path / "l.jsonl")
    last = record(ledger, PLANS)
    assert ledger.layout() == last
    read = Ledger.read(tmp_path / "l.jsonl")
    assert read.layout() == last
    assert [step for step, _ in read.history()] == [0, 10, 20, 30]
    assert read.history()[1][1] == {"a": 2, "b": 5}


def test_last_line_cut_short_is_dropped_and_the_file_mended(tmp_path):
    path = tmp_path / "l.jsonl"
    record(begun(path), PLANS[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "resize", "st')
    assert len(Ledger.read(path).events) == 3
    assert path.read_bytes() != whole, "reading must not touch the file"
    Ledger(path).append("skip", 40, reason="x")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["attach", "resize", "resize", "skip"]


def test_damage_in_the_middle_is_refused_with_its_line(tmp_path):
    path = tmp_path / "l.jsonl"
    record(begun(path), PLANS[:2])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[2]]) + "\n")
    with pytest.raises(CheckpointError, match="line 2"):
        Ledger.read(path)


@pytest.mark.parametrize("content", [None, ""])
def test_missing_and_empty_files_are_refused(tmp_path, content):
    path = tmp_path / "l.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"l\.jsonl"):
        Ledger.read(path)


def test_restore_voids_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "l.jsonl"
    ledger = begun(path)
    middle = record(ledger, PLANS[:1])
    seen = list(ledger.events)
    record(ledger, PLANS[1:], middle, step=10)
    resumed = Ledger(path)
    resumed.restore(seen, 10)
    assert resumed.layout() == middle
    assert Ledger.read(path).layout() == middle
    last = record(resumed, PLANS[2:], PLANS[1].apply_to(middle).with_ranks({"a": 2}), step=20)
    assert Ledger.read(path).events == resumed.events
    assert Ledger.read(path).layout().ranks == last.ranks


def test_restore_into_another_file_carries_the_history_over(tmp_path):
    first = begun(tmp_path / "one.jsonl")
    middle = record(first, PLANS[:2])
    other = Ledger(tmp_path / "two.jsonl")
    other.restore(first.events, 20)
    assert Ledger.read(tmp_path / "two.jsonl").layout() == middle


def test_kept_matrices_rebuild_the_plan_and_damage_is_noticed(tmp_path):
    ledger = begun(tmp_path / "l.jsonl", keep_matrices=True)
    record(ledger, PLANS[:2])
    event = ledger.events[-1]
    (op,) = ledger.plan(event).ops["a"]
    assert torch.equal(op.N, PLANS[1].ops["a"][0].N)
    assert torch.equal(op.M, PLANS[1].ops["a"][0].M)
    with pytest.raises(CheckpointError, match="keep_matrices"):
        begun().plan({"step": 3, "plan": {}})


def test_a_ledger_without_its_beginning_is_not_replayed():
    ledger = Ledger()
    ledger.append("skip", 3, reason="x")
    with pytest.raises(CheckpointError, match="attach"):
        ledger.layout()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError])
def test_a_line_that_was_not_synced_is_not_there(tmp_path, monkeypatch, stop):
    def interrupted(*args):
        raise stop

    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    ledger.append("attach", 0, layout=Layout({"q": Slot(4, 8, 8, 1.0)}).to_json())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("rankflow.training.ledger.sync_open", interrupted)
        with pytest.raises((stop, CheckpointError)):
            ledger.append("skip", 1, reason="x")
    assert path.read_bytes() == before
