"""A run seen from its ledger: where it stands, when it decides next, and what a terminal shows of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from loops import tiny_llama, token_batches
from typer.testing import CliRunner

import rankflow
from rankflow.analysis.run import find_ledger, follow, standing
from rankflow.cli.app import app
from rankflow.errors import CheckpointError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Keep
from rankflow.plans.plan import RankPlan
from rankflow.training.ledger import Ledger

LAYOUT = Layout({f"layers.{i}.{kind}": Slot(4, 16, 8, 2.0) for kind in ("q", "v") for i in range(3)})
PHASES = [{"policy": "one", "begin": 0, "end": 40}, {"policy": "two", "begin": 40, "end": 101}]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a ledger takes for the time of day."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def begun(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.append("attach", 0, layout=LAYOUT.to_json(), phases=PHASES, total_steps=100, seed=0)
    decides = {"first": 10, "every": 10, "before": 40}
    ledger.append("phase", 0, policy="one", end=40, budget="total rank 12", decides=decides, notes=[])
    return ledger


def test_the_next_decision_and_the_time_to_it_come_from_the_pace_so_far(tmp_path: Path, clock):
    ledger = begun(tmp_path / "rankflow.jsonl")
    at = standing(Ledger.read(tmp_path / "rankflow.jsonl", times=True), 1003.0)
    assert (at.step, at.due, at.wait, at.budget) == (0, 10, None, "total rank 12")  # no pace yet
    clock[0] = 1020.0  # 2 seconds a step
    ledger.append("resize", 10, RankPlan({"layers.1.q": (Keep((0,)),)}, "why"), policy="one", reason="why")
    clock[0] = 1023.0  # a study after the decision, which is no step
    ledger.append("skip", 10, policy="one", reason="nothing to change")
    at = standing(Ledger.read(tmp_path / "rankflow.jsonl", times=True), 1030.0)
    assert (at.step, at.due, at.total_rank) == (10, 20, 21)
    assert at.wait == pytest.approx(1023 + 20 - 1030)
    assert standing(Ledger.read(tmp_path / "rankflow.jsonl", times=True), 1050.0).wait == pytest.approx(-7)
    ledger.append("skip", 30, policy="one", reason="nothing to change")
    assert standing(ledger, 0.0).due == 40  # where the next phase begins
    ledger.append("finish", 100)
    at = standing(ledger, 0.0)
    assert (at.finished, at.due, at.wait) == (True, None, None)


def test_the_time_of_a_line_is_no_part_of_its_event(tmp_path: Path, clock):
    path = tmp_path / "rankflow.jsonl"
    first = begun(path)
    assert json.loads(path.read_text().splitlines()[0])["time"] == 1000.0
    clock[0] = 5000.0
    second = begun(tmp_path / "other.jsonl")
    assert first.events == second.events == Ledger.read(path).events == Ledger(path).events
    assert Ledger.read(path, times=True).events[0]["time"] == 1000.0


def test_ledgers_are_found_by_folder_and_the_latest_of_several_runs_is_taken(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_ledger(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no folder that it may come to"):
        find_ledger(tmp_path / "nowhere" / "rankflow.jsonl")
    assert find_ledger(tmp_path) == tmp_path / "rankflow.jsonl"  # may come
    for i, name in enumerate(("old", "new")):
        begun(tmp_path / name / "rankflow.jsonl")
        stamp = 1_000_000 * (i + 1)
        os.utime(tmp_path / name / "rankflow.jsonl", (stamp, stamp))
    assert find_ledger(tmp_path) == tmp_path / "new" / "rankflow.jsonl"
    begun(tmp_path / "rankflow.jsonl")
    assert find_ledger(tmp_path) == tmp_path / "rankflow.jsonl"


def test_following_waits_for_the_ledger_leaves_half_lines_and_ends_with_the_run(tmp_path: Path):
    path = tmp_path / "rankflow.jsonl"

    def run() -> None:
        time.sleep(0.05)
        ledger = begun(path)
        with path.open("a") as file:
            file.write('{"event": "fin')
            file.flush()
            time.sleep(0.1)
            file.write('ish", "step": 100}\n')
        assert ledger

    writer = threading.Thread(target=run)
    writer.start()
    seen = [None if ledger is None else [e["event"] for e in ledger.events] for ledger in follow(path, 0.02)]
    writer.join()
    assert seen[0] is None
    assert ["attach", "phase"] in seen
    assert seen[-1] == ["attach", "phase", "finish"]


def test_a_real_run_is_shown_with_its_ranks_budget_and_next_decision(tmp_path: Path):
    model = tiny_llama(r=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    policy = {"policy": "squeeze", "budget": {"mean_rank": 2}, "when": {"start": 4, "every": 4}}
    flow = rankflow.attach(model, optimizer, policy, total_steps=20, ledger=tmp_path / "rankflow.jsonl")
    steps = iter(token_batches(20))

    def train(n: int) -> None:
        for batch in itertools.islice(steps, n):
            model(**batch).loss.backward()
            flow.before_step()
            optimizer.step()
            flow.after_step()
            optimizer.zero_grad()

    train(10)
    result = CliRunner().invoke(app, ["watch", str(tmp_path), "--once"])
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert "step 8 of 20" in shown
    assert "policy squeeze" in shown
    assert re.search(r"next step 12 (in some|late by) \d+ s", shown)
    assert f"ranks {flow.layout.total_rank} in all {flow.layout.params:,} parameters" in shown
    assert "skip squeeze" in shown
    train(10)
    flow.finish()
    over = CliRunner().invoke(app, ["watch", str(tmp_path)])  # ends by itself
    assert "the run is over" in over.stdout
    assert f"{flow.layout.total_rank} in all" in over.stdout
    assert "resize squeeze" in " ".join(over.stdout.split())
    missing = CliRunner().invoke(app, ["watch", str(tmp_path / "gone")])
    assert missing.exit_code == 2
    assert "give a run's ledger" in missing.stderr
