"""What the guides under docs/extending print is all that is needed: the file, put where the page says, is found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packages import drop_file

from rankflow import check, squeeze
from rankflow.serving import engines as engine_files
from rankflow.serving.engine import Fate
from rankflow.serving.engines import engines
from tests.serving.test_verdicts import folder

ROOT = Path(__file__).parents[2]


def printed(page: str) -> tuple[str, str]:
    """The path of the file that a guide is about, and the file as printed."""
    text = (ROOT / "docs" / "extending" / page).read_text(encoding="utf-8")
    path = re.search(r"one file to add is `rankflow/(\S+)\.py`", text)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert path
    assert code
    return path[1], code[1]


def add(page: str, package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a guide's file into the folder that it names."""
    path, source = printed(page)
    assert f"rankflow.{path.rpartition('/')[0].replace('/', '.')}" == package.__name__
    drop_file(package, path.rpartition("/")[2], source, tmp_path / "added", monkeypatch)


@pytest.fixture
def toy_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    add("engine.md", engine_files, tmp_path, monkeypatch)
    engines.cache_clear()
    yield
    engines.cache_clear()


@pytest.mark.usefixtures("toy_engine")
def test_the_engine_of_the_guide_is_checked_for_and_written_for(tmp_path: Path):
    src = folder(tmp_path / "src")
    squeeze(src, tmp_path / "three", target_rank=3)
    assert [problem.fate for problem in check(tmp_path / "three", "toy").problems] == [Fate.SILENT]
    squeeze(tmp_path / "three", tmp_path / "served", keep=True, engine="toy")
    assert check(tmp_path / "served", "toy").problems == ()
    assert [p.fate for p in check(folder(tmp_path / "biased", bias="all"), "toy").problems] == [Fate.REFUSED]
