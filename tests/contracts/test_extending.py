"""What the guides under docs/extending print is all that is needed: the file, put where the page says, is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import lora, loss_of
from packages import assert_pair_is_read, drop_file
from safetensors.torch import load_file

from rankflow import check, squeeze
from rankflow.errors import OptimizerError
from rankflow.formats import as_lora, single_file
from rankflow.formats.as_lora.registry import forms
from rankflow.formats.open import open_adapter
from rankflow.formats.single_file.registry import shipped
from rankflow.lora.adapter import Adapter
from rankflow.optim import handlers
from rankflow.plans.ops import Keep
from rankflow.plans.plan import RankPlan
from rankflow.serving import engines as engine_files
from rankflow.serving.engine import Fate
from rankflow.serving.engines import engines
from rankflow.surgery.surgeon import Surgeon
from tests.formats.test_convert import PARTS, delta, drawn, write
from tests.serving.test_verdicts import folder

ROOT = Path(__file__).parents[2]
LISTINGS = [engines, shipped, forms]


def printed(page: str, nth: int = 0) -> tuple[str, str]:
    """The path of the file that a guide is about, and the file as printed."""
    text = (ROOT / "docs" / "extending" / page).read_text(encoding="utf-8")
    paths = re.findall(r"one file to add is `rankflow/(\S+)\.py`|one file as well:\n`rankflow/(\S+)\.py`", text)
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return "".join(paths[nth]), codes[nth]


def add(page: str, package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int = 0) -> None:
    """Put a guide's file into the folder that it names."""
    path, source = printed(page, nth)
    assert f"rankflow.{path.rpartition('/')[0].replace('/', '.')}" == package.__name__
    drop_file(package, path.rpartition("/")[2], source, tmp_path / "added", monkeypatch)


@pytest.fixture(autouse=True)
def listed_anew() -> Iterator[None]:
    """Folders are listed again by each test, and after the last."""
    for listing in LISTINGS:
        listing.cache_clear()
    yield
    for listing in LISTINGS:
        listing.cache_clear()


# -- an engine --------------------------------------------------------------------------------------------------------


def test_the_engine_of_the_guide_is_checked_for_and_written_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add("engine.md", engine_files, tmp_path, monkeypatch)
    src = folder(tmp_path / "src")
    squeeze(src, tmp_path / "three", target_rank=3)
    assert [problem.fate for problem in check(tmp_path / "three", "toy").problems] == [Fate.SILENT]
    squeeze(tmp_path / "three", tmp_path / "served", keep=True, engine="toy")
    assert check(tmp_path / "served", "toy").problems == ()
    assert [p.fate for p in check(folder(tmp_path / "biased", bias="all"), "toy").problems] == [Fate.REFUSED]


# -- an optimizer -----------------------------------------------------------------------------------------------------


class Sparrow(torch.optim.Optimizer):
    """Adam under other names."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            mean = state.setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
            square = state.setdefault("average_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 0.01)
            p.addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-3)


Sparrow.__module__ = "aviary.birds"


def test_the_optimizer_of_the_guide_is_carried_through_a_resize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = lora("linear")
    optimizer = Sparrow([p for p in model.parameters() if p.requires_grad])
    loss_of(model, "linear").backward()
    optimizer.step()
    adapter = Adapter(model)
    plan = RankPlan({name: [Keep((2, 0))] for name in adapter.sites}, "told")
    with pytest.raises(OptimizerError):
        Surgeon(adapter, optimizer).apply(plan)
    add("optimizer.md", handlers, tmp_path, monkeypatch)
    before = {n: {**optimizer.state[site.A]} for n, site in adapter.sites.items()}
    Surgeon(adapter, optimizer).apply(plan)
    for name, site in adapter.sites.items():
        after = optimizer.state[site.A]
        torch.testing.assert_close(after["average"], before[name]["average"][[2, 0]])
        torch.testing.assert_close(after["average_sq"], before[name]["average_sq"][[2, 0]])
        assert after["step"] == 1


# -- a format ---------------------------------------------------------------------------------------------------------


def test_the_format_of_the_guide_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add("format.md", single_file, tmp_path, monkeypatch)
    factors = drawn(PARTS["unet"][2], scale=0.7, seed=3)
    src = write("kohya", tmp_path, "unet", factors)
    squeeze(src, tmp_path / "new.safetensors", target_rank=6, to_format="slashed")
    found = open_adapter(tmp_path / "new.safetensors")
    assert found.kind == "slashed"
    for name, f in factors.items():
        a, b = found.factors("slashed/" + name.replace(".", "/"))
        torch.testing.assert_close(b.double() @ a.double(), delta(*f), rtol=1e-5, atol=1e-6)
    squeeze(tmp_path / "new.safetensors", tmp_path / "back.safetensors", target_rank=6, to_format="kohya")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(src).keys()


def test_the_form_of_the_guide_is_read_as_the_lora_that_it_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add("format.md", as_lora, tmp_path, monkeypatch, 1)
    assert_pair_is_read(tmp_path)


# -- an option --------------------------------------------------------------------------------------------------------


def test_the_option_of_the_guide_is_on_the_command_line_and_does_what_it_says(tmp_path: Path):
    """In a copy of the package, as the command line is made when it is imported."""
    page = (ROOT / "docs" / "extending" / "option.md").read_text(encoding="utf-8")
    diff = re.search(r"```diff\n(.*?)```", page, re.DOTALL)
    file = re.search(r"one file to change is `(\S+)`", page)
    assert diff
    assert file
    shutil.copytree(ROOT / "rankflow", tmp_path / "rankflow", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file[1]).read_text()
    for hunk in diff[1].split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in f" {sign}") for sign in "-+")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / file[1]).write_text(text)
    folder(tmp_path / "src")
    words = ["squeeze", "src", "--energy", "0.01", "--min-rank", "2", "-o", "out", "--report", "report.json"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "rankflow", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {module["rank_after"] for module in json.loads((tmp_path / "report.json").read_text())["modules"]} == {2}


# -- a policy -------------------------------------------------------------------------------------------------------

SUITE = [  # all that lists policies, or holds for each
    "tests/contracts/test_policies.py",
    "tests/contracts/test_shipped.py",
    "tests/contracts/test_docs_site.py",
    "tests/config",
    "tests/policies/test_idleness.py",
    "tests/test_layering.py",
]


@pytest.mark.slow
def test_the_policy_of_the_guide_passes_all_that_holds_for_policies(tmp_path: Path):
    for part in ("rankflow", "policies", "tests", "docs", "examples"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *ROOT.glob("mkdocs.yml")):
        shutil.copy(file, tmp_path)
    path, code = printed("policy.md")
    (tmp_path / "rankflow" / path).with_suffix(".py").write_text(code)
    text = (ROOT / "docs/extending/policy.md").read_text()
    (policy_file,) = map(textwrap.dedent, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    (tmp_path / "policies" / Path(path).with_suffix(".yaml").name).write_text(policy_file)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    schema = run("-m", "rankflow.config.schema")  # as the guide says
    (tmp_path / "policies" / "schema.json").write_text(schema)
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "trim or schema or describes or layering", *SUITE)
