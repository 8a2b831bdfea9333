"""Faults that tests must notice, from the lists named FAULTS in `faults_x.py` beside `test_x.py`."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    name: str
    file: str  # under rankflow/
    old: str  # occurs once in it
    new: str
    tests: str = ""  # which of the tests: "::test_x", "-k word", or more files


class Planted(NamedTuple):
    fault: Fault
    command: str  # pytest's words for the tests that must turn red


def every_fault() -> list[Planted]:
    """All faults there are, each with the tests of the file beside its list."""
    planted = []
    for path in sorted((ROOT / "tests").rglob("faults_*.py")):
        test = path.with_name(path.name.replace("faults_", "test_", 1)).relative_to(ROOT).as_posix()
        for fault in runpy.run_path(str(path))["FAULTS"]:
            joint = "" if fault.tests.startswith("::") else " "
            planted.append(Planted(fault, f"{test}{joint}{fault.tests}".strip()))
    return planted
