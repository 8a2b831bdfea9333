"""Runs that are killed in the middle of anything end where one does that nobody killed: see `helpers/killing.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import MEMORY

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

import killing


@pytest.fixture(scope="module")
def whole() -> Iterator[killing.Whole]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of forks beside threads of others
        yield killing.Whole(Path(name) / "whole")


def test_the_run_has_resizes_gates_and_averages_in_it(whole: killing.Whole):
    events = [e["event"] for e in whole.end["events"]]
    assert events.count("resize") > 4
    assert "fold" in events
    assert whole.end["flow"]["averages"]
    assert whole.calls > 500


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_ends_where_one_does_that_was_not(whole: killing.Whole, seed: int):
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem, kills = killing.trial(whole, Path(name) / "run", seed)
    assert problem is None
    assert kills > 0


@pytest.mark.slow
def test_many_killed_runs():
    words = ["--trials", os.environ.get("RANKFLOW_KILLS", "10"), "--seed", os.environ.get("RANKFLOW_FUZZ_SEED", "100")]
    script = Path(killing.__file__)
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
