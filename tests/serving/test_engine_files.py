"""An engine is one file: what is in the folder, or offered by an installed package, is checked for and written for."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from packages import drop_file, install

from rankflow import ConfigError, check, squeeze
from rankflow.serving import engines as files
from rankflow.serving.engine import Fate
from rankflow.serving.engines import engine_named, engine_names, engines
from tests.serving.test_verdicts import folder

TOY = '''
    """What a toy engine does: it knows ranks that are powers of two alone."""

    from rankflow.serving.engine import Engine, Fate, Problem


    class Toy(Engine):
        def rank_problems(self, adapter):
            odd = tuple(name for name, rank in adapter.layout.ranks.items() if rank & (rank - 1))
            return [Problem("rank", "drops these", Fate.SILENT, self.rewrite(adapter), odd)] if odd else []


    ENGINE = Toy("toy", "peft", scale="config", ranks=(2, 16), setting="--rank", fates={"bias": Fate.REFUSED})
'''


@pytest.fixture(params=["a file in the folder", "an installed package"], autouse=True)
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = textwrap.dedent(TOY)
    if "file" in request.param:
        drop_file(files, "toy", source, tmp_path / "more", monkeypatch)
    else:
        monkeypatch.syspath_prepend(str(tmp_path))
        install(tmp_path, "acme_toy", source, {"rankflow.engines": {"toy": "acme_toy:ENGINE"}})
        monkeypatch.delitem(sys.modules, "acme_toy", raising=False)
    engines.cache_clear()
    yield
    engines.cache_clear()


def test_the_engine_is_one_of_all(tmp_path: Path):
    assert {"toy", "vllm", "peft"} <= {*engine_names()}
    assert check(folder(tmp_path / "src"), "toy").problems == ()
    found = check(folder(tmp_path / "biased", bias="all"), "toy").problems
    assert [problem.fate for problem in found] == [Fate.REFUSED]


def test_what_only_it_does_is_a_problem(tmp_path: Path):
    src = folder(tmp_path / "src")
    squeeze(src, tmp_path / "out", target_rank=3)
    [problem] = check(tmp_path / "out", "toy").problems
    assert problem.fate is Fate.SILENT
    assert len(problem.modules) == 6
    assert check(src, "toy").hint.count("--rank 16") == 1


def test_adapters_are_written_for_it(tmp_path: Path):
    squeeze(folder(tmp_path / "src"), tmp_path / "out", target_rank=2, engine="toy")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert not config["rank_pattern"]


def test_what_is_no_engine_of_that_name_is_refused_when_it_is_asked_for(tmp_path: Path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    source = "from rankflow.serving.engine import Engine\nENGINE = Engine('other', 'peft')\nNONE = 1\n"
    added = {"none": "acme_other:NONE", "one": "acme_other:ENGINE"}
    install(site, "acme_other", source, {"rankflow.engines": added})
    for name in added:
        with pytest.raises(ConfigError, match=f"{name} is acme_other"):
            engine_named(name)
    assert engine_named("vllm").name == "vllm"
