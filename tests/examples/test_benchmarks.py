"""The measuring scripts that no other test runs do run, at sizes that measure nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
RUNS = {
    "agreement.py": ["--processes", "2", "3", "--modules", "2"],
    "overhead.py": ["--steps", "30", "--batch", "1", "--only", "idle", "increlora, shipped"],
    "squeeze_speed.py": ["--quick", "--peft-repeats", "0", "--repeats", "2"],
    "two_processes.py": ["--steps", "24", "--batch", "1", "--modules", "3", "--width", "32", "--repeats", "1"],
}


@pytest.mark.parametrize("script", RUNS)
def test_it_ends_with_its_tables(script: str, tmp_path: Path):
    folder = ["--folder", str(tmp_path)] if script == "squeeze_speed.py" else []
    run = subprocess.run(
        [sys.executable, FOLDER / script, *RUNS[script], *folder], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "┃" in run.stdout
