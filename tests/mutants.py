"""Deliberate faults, each of which must turn at least one test red. Run: python tests/mutants.py [WORD ...]

Every mutant replaces one piece of one file in a scratch copy of the package and runs the tests that should notice.
Words given on the command line pick the mutants whose name holds one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    name: str
    file: str  # under rankflow/
    old: str
    new: str
    tests: str  # what should turn red


MUTANTS: list[Mutant] = []


def survives(mutant: Mutant) -> bool:
    """Whether the tests stay green with the fault in place."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "rankflow"
        shutil.copytree(ROOT / "rankflow", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "policies", Path(scratch) / "policies")
        path = package / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}, not once; update it"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        env = {**os.environ, "PYTHONPATH": scratch, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> None:
    console = Console()
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    alive = [m for m in track(chosen, "mutants", console=console) if survives(m)]
    for mutant in alive:
        console.print(f"[red]survived[/red] {mutant.name}: {mutant.tests} stayed green")
    console.print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants were noticed")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
