"""The documentation is made of everything that there is, and its links to the repository lead somewhere."""

from __future__ import annotations

import inspect
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankflow
from rankflow.config.load import describe, shipped

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOME = "https://github.com/rankflow/rankflow"


@cache
def reference() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "_hooks" / "reference.py"))


def rows(markdown: str) -> list[list[str]]:
    """The cells of every line of a table but its rule."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("policy", describe(), ids=lambda policy: policy.name)
def test_a_policys_page_has_its_formula_source_settings_file_and_when_to_use_it(policy):
    page = reference()["policy_page"](policy.name)
    assert policy.source in page
    assert "## When to use it" in page
    assert shipped()[policy.name].read_text().split("schema.json\n")[1].strip() in page
    settings = [row for row in rows(page) if row[0] in {f"`{s.name}`" for s in policy.settings}]
    assert len(settings) == len(policy.settings)
    assert all(len(row) == 4 and row[3] for row in settings)


def test_every_key_of_a_policy_file_has_a_meaning():
    found = rows(reference()["policy_files"]())
    keys = [row for row in found if row[0] != "key"]
    assert {"`policy`", "`until`", "`mode`", "`mean_rank`", "`size`", "`every`", "`min`"} <= {row[0] for row in keys}
    assert all(row[-1] and not row[-1].startswith("`") for row in keys)


def test_every_key_of_a_json_output_has_a_meaning():
    table = rows(reference()["json_outputs"]())
    assert {row[-1] for row in table if row[0] == "key"} == {"meaning"}
    found = [row for row in table if row[0] != "key"]
    assert {"`rank_stable`", "`energy_kept`", "`total_ranks`", "`margins`"} <= {row[0] for row in found}
    assert [row[0] for row in found if not row[-1]] == []


def test_every_command_and_every_public_name_is_there():
    made = reference()
    commands = made["typer"].main.get_command(made["app"]).commands
    page = made["command_line"]()
    assert all(f"## `rankflow {name}`\n" in page for name in commands)
    assert all(row[1] for row in rows(page) if row[0].startswith("`-"))  # every option has a help text
    api = made["python_api"]()
    assert all(f"::: rankflow.{name}\n" in api for name in rankflow.__all__)
    assert "Other names" not in api


def test_public_docstrings_name_parameters_that_there_are():
    """`mkdocs build --strict` refuses a line of `Args` that names none, or several."""
    documented = {name: inspect.getdoc(getattr(rankflow, name)) or "" for name in rankflow.__all__}
    documented = {name: text for name, text in documented.items() if "\nArgs:\n" in text}
    assert {"attach", "squeeze", "RankFlowCallback"} <= documented.keys()
    for name, text in documented.items():
        lines = text.partition("\nArgs:\n")[2].partition("\n\n")[0].splitlines()
        named = {line.strip().partition(":")[0].lstrip("*") for line in lines if re.match(r" {4}\S", line)}
        assert named <= {*inspect.signature(getattr(rankflow, name)).parameters}, name


def test_pages_ask_for_what_can_be_made_and_all_of_it_is_asked_for():
    asked = [name for page in PAGES for name in re.findall(r"^<!-- made: (\w+) -->$", page.read_text(), re.MULTILINE)]
    assert sorted(asked) == sorted(reference()["MADE"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_the_repository_lead_to_files_that_are_there(page: Path):
    for place in re.findall(rf"{HOME}/(?:blob|tree|raw)/main/([^\s)#>\"]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / place).exists(), place
    if page.parent == ROOT:
        for place in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / place).exists(), place


def test_how_to_cite_names_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rankflow.__version__
    assert f"## [{rankflow.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
