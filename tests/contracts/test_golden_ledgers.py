"""What every shipped policy file decides in a small run stays what it was, down to the last byte of the ledger.

Each ledger is compared with the one in golden/ledgers, without the times in it; its last line has the losses and a hash
of the trained weights. Another machine may round differently, so that floats need only be close there and hashes of
floats are not compared. RANKFLOW_GOLDEN=bytes compares everything, for the machine that wrote the files, and
RANKFLOW_GOLDEN=write writes them anew, for a change of behaviour that is meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import trained
from torch import nn

from rankflow.config.load import shipped
from rankflow.training.trainer import RankFlowCallback
from tests.contracts.test_shipped import STEPS, begun
from tests.training.test_trainer import trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "ledgers"
MODE = os.environ.get("RANKFLOW_GOLDEN", "close")
TRAINER = "trainer"
CHANGING = re.compile(r', "(?:time|seconds)": [-+.\de]+')  # fields that differ between two equal runs
DECIMAL = re.compile(r"(\d+\.\d+)")
HASH = re.compile(r"[0-9a-f]{64}")
EXACT = {"digest"}  # the only hash that is not of floats: of the layout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, whatever the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def told(ledger: Path, losses: list[float], model: nn.Module) -> str:
    """The ledger's lines without times, and one of what the run came to."""
    weights = hashlib.sha256()
    for name, tensor in trained(model).items():
        weights.update(name.encode() + tensor.numpy().tobytes())
    last = json.dumps({"losses": losses, "weights": weights.hexdigest()})
    return f"{CHANGING.sub('', ledger.read_text())}{last}\n"


def close(now: Any, then: Any, key: str = "") -> bool:
    """Whether both are equal but for the last digits of floats, also of those in sentences, and hashes of floats."""
    if type(now) is not type(then):
        return False
    if isinstance(now, dict):
        return list(now) == list(then) and all(close(now[k], then[k], k) for k in now)
    if isinstance(now, list):
        return len(now) == len(then) and all(close(a, b, key) for a, b in zip(now, then, strict=True))
    if isinstance(now, float):
        return now == pytest.approx(then, rel=1e-4, abs=1e-4)
    if isinstance(now, str) and key not in EXACT and HASH.fullmatch(now):
        return HASH.fullmatch(then) is not None
    if isinstance(now, str) and DECIMAL.search(now):
        a, b = ([float(x) if i % 2 else x for i, x in enumerate(DECIMAL.split(s))] for s in (now, then))
        return close(a, b)
    return now == then


def compare(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.jsonl"
    if MODE == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if MODE != "close":
        assert text == path.read_text()
        return
    now, then = ([json.loads(line) for line in t.splitlines()] for t in (text, path.read_text()))
    assert len(now) == len(then)
    for a, b in zip(now, then, strict=True):
        assert close(a, b), f"{name}.jsonl: now {a}, then {b}"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_policy_decides_what_it_always_has(tmp_path, name):
    ledger = tmp_path / "ledger.jsonl"
    run = begun(name, ledger=ledger).until(STEPS)
    run.flow.finish()
    compare(name, told(ledger, run.losses, run.model))


def test_a_run_of_the_trainer_decides_what_it_always_has(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    run = trainer(tmp_path, RankFlowCallback("grow_then_squeeze", ledger=ledger), logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert run.model is not None
    compare(TRAINER, told(ledger, losses, run.model))


def test_every_golden_ledger_is_of_a_run_that_there_is():
    assert {path.stem for path in GOLDEN.iterdir()} == {*shipped(), TRAINER}


def test_what_counts_as_close():
    event = {"event": "resize", "step": 3, "digest": "a" * 64, "margin": 0.25, "N": "b" * 64, "reason": "97.998% stays"}
    assert close(event, event | {"margin": 0.25001, "N": "c" * 64, "reason": "97.997% stays"})
    others: list[dict[str, Any]] = [
        {"step": 4},
        {"digest": "c" * 64},
        {"margin": 0.26},
        {"N": ""},
        {"reason": "96.998% stays"},
        {"more": 1},
        {"reason": "97.998% goes"},
        {"margin": None},
    ]
    assert not any(close(event, event | other) for other in others)
