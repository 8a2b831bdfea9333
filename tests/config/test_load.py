"""Policy files: what they mean, and what is said about everything that is wrong in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rankflow.config import registry
from rankflow.config import schema as grammar
from rankflow.config.load import describe, load_policy, shipped
from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limit
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.methods.increlora import IncreLora
from rankflow.policies.methods.squeeze import Squeeze

ROOT = Path(__file__).parents[2]


def complaints(policy) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_policy(policy)
    return str(e.value).splitlines()


def complaint(policy) -> str:
    (line,) = complaints(policy)
    return line


# -- what files mean ------------------------------------------------------------------------------------------------

LIFECYCLE = """
phases:
  - {policy: increlora, until: 40%, budget: {mean_rank: 8}, when: {start: 5%, every: 2%}}
  - {policy: squeeze,   until: 80%, budget: {size: 1.5KiB}, params: {metric: outputs}}
  - {policy: hold}
limits:
  "*": {min: 1, max: 32}
  "*.key": {max: 4}
  "^layers\\\\.0\\\\.q$": 3
tie: [["*.q", "*.k"]]
rank_buckets: [1, 2, 4]
rank_multiple: 2
"""


def test_a_lifecycle(tmp_path):
    path = tmp_path / "life.yaml"
    path.write_text(LIFECYCLE)
    life = load_policy(path)
    assert life == load_policy(str(path)) == load_policy(life)
    assert life.source == str(path)
    (grow, first, until), (_, second, _), (hold, third, none) = life.policies
    assert (grow, until, hold, none) == ("increlora", "40%", "hold", None)
    assert first == IncreLora(budget=Budget("mean_rank", 8), when=When("5%", "2%"))
    assert second == Squeeze(budget=Budget("size", 1536), metric="outputs")
    assert third.budget is None
    assert not third.when.resolve(100).events
    assert life.limits.entries == (
        Limit("*", 1, 32),
        Limit("*.key", None, 4),
        Limit("^layers\\.0\\.q$", None, 3, peft=True),
    )
    assert (life.limits.ties, life.limits.buckets, life.limits.multiple) == ((("*.q", "*.k"),), (1, 2, 4), 2)


def test_a_mapping_means_what_the_same_file_means(tmp_path):
    path = tmp_path / "life.yaml"
    path.write_text(LIFECYCLE)
    assert load_policy(yaml.safe_load(LIFECYCLE)).policies == load_policy(path).policies


def test_what_is_left_out_is_the_policy_s_own_default():
    for name in registry.policy_names():
        ((_, policy, _),) = load_policy({"policy": name}).policies
        assert policy == registry.policy_class(name)()


def test_objects_are_taken_as_they_are():
    policy = Squeeze(energy=0.9)
    life = load_policy(policy)
    assert life.policies == (("squeeze", policy, None),)
    assert load_policy(life) is life

    class Mine(Policy):
        pass

    assert load_policy(Mine()).policies[0][0] == "mine"


def test_settings_of_shipped_objects_are_checked_too():
    with pytest.raises(
        ConfigError, match=r"increlora: beta1: should be less than 1, not 2\nincrelora: score: is 'exct'"
    ):
        load_policy(IncreLora(beta1=2, score="exct"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("32MiB", 32 * 2**20), ("500KB", 500_000), ("1.5 GiB", 3 * 2**29), (77, 77)]
)
def test_sizes(text, size):
    ((_, policy, _),) = load_policy({"policy": "hold", "budget": {"size": text}}).policies
    assert policy.budget == Budget("size", size)


# -- what is wrong with them ----------------------------------------------------------------------------------------


def test_everything_is_said_at_once_each_with_its_place(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("""
phases:
  - {policy: increlora, budget: {mean_rnk: 8}, when: {start: 110%, every: 1.5}}
  - {policy: squeeze, until: 80%, params: {metrc: outputs, shape: halvin, energy: 2}}
  - {policy: hldo}
limits: {"*": {mx: 3, min: -1}, "*.x": {min: 3, max: 2}}
rank_buckets: [0]
budgt: 3
""")
    lines = complaints(path)
    places = ["phases[0].until", "phases[0].budget.mean_rnk", "phases[0].when.start", "phases[0].when.every"]
    places += ["phases[1].params.metrc", "phases[1].params.shape", "phases[1].params.energy", "phases[2].policy"]
    places += ["limits['*'].mx", "limits['*'].min", "limits['*.x']", "rank_buckets[0]", "budgt"]
    assert sorted(line.removeprefix(f"{path}: ").split(": ")[0] for line in lines) == sorted(places)
    text = "\n".join(lines)
    assert "phases[0].until: is missing" in text
    assert "metrc: unknown key; did you mean 'metric'? known: shape, metric" in text
    assert "mean_rnk: unknown key; did you mean 'mean_rank'?" in text
    assert (
        "shape: is 'halvin', but should be 'constant', 'linear', 'cubic', 'cosine' or 'halving'; "
        "did you mean 'halving'?" in text
    )
    assert "no policy is called 'hldo'; did you mean 'hold'?" in text
    assert "start: 110% is not between 0% and 100%" in text
    assert "every: 1.5 is neither a number of steps nor a percentage" in text
    assert "limits['*.x']: min 3 is above max 2" in text
    assert "mx: unknown key; known: min, max" in text or "mx: unknown key; did you mean 'max'?" in text


def test_every_setting_refuses_a_neighbouring_name_and_a_wrong_type():
    for name in registry.policy_names():
        for setting in registry.params_model(registry.policy_class(name)).model_fields:
            line = complaint({"policy": name, "params": {setting + "s": 1}})
            assert f"params.{setting}s: unknown key; did you mean {setting!r}?" in line
            assert f"params.{setting}: " in complaint({"policy": name, "params": {setting: {"a": 1}}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "policy: is missing; known: .*increlora"),
        ({"phases": []}, "phases: list should have at least 1 item"),
        ({"phases": 3}, "phases: should be a valid list"),
        ({"phases": [{"policy": "hold"}], "policy": "hold"}, "policy: stands beside `phases`"),
        ({"phases": [{"policy": "hold", "limits": {}}]}, r"phases\[0\].limits: unknown key; .*known: policy, .*until"),
        ({"policy": "hold", "until": "10%"}, "until: unknown key"),
        ({"policy": "os.system"}, "no policy is called 'os.system'; known"),
        ({"policy": ["hold"]}, "policy: "),
        (
            {"policy": "hold", "budget": {"mean_rank": 8, "size": "1MB"}},
            "exactly one of .*mean_rank and size are given",
        ),
        ({"policy": "hold", "budget": {}}, "budget: wants exactly one of .*none is given"),
        ({"policy": "hold", "budget": 8}, "budget: should be a mapping, not 8"),
        ({"policy": "hold", "budget": {"fraction": 2}}, "budget.fraction: should be less than or equal to 1"),
        ({"policy": "hold", "budget": {"mean_rank": "8"}}, "budget.mean_rank: should be a valid number, not '8'"),
        ({"policy": "hold", "budget": {"mean_rank": float("inf")}}, "should be a finite number"),
        ({"policy": "hold", "budget": {"total_rank": 2.5}}, "budget.total_rank: should be a valid integer"),
        ({"policy": "hold", "budget": {"size": "32Mb"}}, "'32Mb' is neither a number of bytes nor a size such as"),
        ({"policy": "hold", "budget": {"size": 0}}, "not a positive number"),
        ({"policy": "hold", "params": {"a": 1}}, "params.a: unknown key"),
        ({"policy": "hold", "limits": {"*": {"max": 0}}}, "max: should be greater than 0"),
        ({"policy": "hold", "limits": {"*": True}}, r"limits\['\*'\]: should be a mapping, not True"),
        ({"policy": "increlora", "params": {"beta1": True}}, "params.beta1: should be a valid number, not True"),
        (
            {"policy": "increlora", "params": {"top_k": 0}},
            "top_k: is 0, but should be 'auto', or should be greater than 0",
        ),
    ],
)
def test_each_mistake_has_its_own_words(data, words):

    assert re.search(words, complaint(data)), complaint(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with `policy:`"),
        ("- hold", "begins with `policy:`"),
        ("policy: [hold", "not valid YAML"),
        ("policy: hold\nlimits: {*.key: {max: 3}}", "begins with \\* needs quotes"),
        ("policy: hold\nlimits:\n  q: {max: 3}\n  q: {max: 4}", "line 4: .*key 'q' stands twice"),
        ("policy: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_files_that_are_no_policy_files(tmp_path, text, words):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_policy(path)


def test_names_and_paths_that_do_not_exist(tmp_path):
    assert "no policy is called 'incrlora'; did you mean 'increlora'?" in complaint("incrlora")
    assert "a policy of that name is shipped: use 'squeeze'" in complaint(tmp_path / "squeeze.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in complaint(tmp_path / "bytes.yaml")
    assert "not int" in complaint(3)


# -- what is published ----------------------------------------------------------------------------------------------


def layout(rank: int) -> Layout:
    return Layout({f"layers.{i}.{m}": Slot(rank, 384, 384, 2.0) for i in range(6) for m in "qkvo"})


START = {
    "adalora": 6,
    "adalora_then_squeeze": 12,
    "bayesian_lora": 16,
    "colora": 8,
    "colora_then_increlora": 4,
    "diffora": 4,
    "elalora": 4,
    "eva": 8,
    "gora": 8,
    "hold": 8,
    "lisa": 4,
    "rigl": 4,
    "sora": 8,
    "sora_then_hold": 8,
    "squeeze": 16,
}  # the rank a shipped file starts from, if not 2


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_files_load_by_name_and_make_sense_from_their_start_rank(name):
    assert shipped()[name].read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert load_policy(name) == load_policy(shipped()[name])
    for steps in (100, 240, 400, 5000):
        load_policy(name).resolve(steps, layout(START.get(name, 2)))


def test_every_policy_has_a_shipped_file():
    assert set(registry.policy_names()) <= set(shipped())


def test_the_published_schema_is_that_of_the_code():
    assert json.loads((shipped()["hold"].parent / "schema.json").read_text()) == grammar.schema()


def test_the_schema_knows_every_setting_with_its_meaning():
    text = json.dumps(grammar.schema())
    for description in describe():
        for setting in description.settings:
            assert json.dumps(setting.meaning) in text


def test_every_policy_describes_itself_and_its_settings():
    described = describe()
    assert [d.name for d in described] == sorted(p.stem for p in (ROOT / "rankflow/policies/methods").glob("[!_]*.py"))
    for d in described:
        cls = registry.policy_class(d.name)
        assert d.source
        assert d.summary.endswith((".", ":"))
        assert {s.name for s in d.settings} == {f.name for f in fields(cls)} - {"budget", "when"}
        for setting in d.settings:
            assert setting.meaning
            assert setting.type
            assert setting.default == getattr(cls(), setting.name)


@pytest.mark.slow
def test_a_wheel_brings_the_policy_files_along(tmp_path):
    """Built from a copy, unpacked elsewhere, read by a Python that does not see the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in [*tracked, "README.md"]:
        if name.startswith(("rankflow/", "policies/")) or name in ("pyproject.toml", "LICENSE", "README.md"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(copy),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    code = (
        "import rankflow.config.load as c; print(c.__file__); print(*c.shipped().values(), sep='\\n');"
        "[c.load_policy(name) for name in c.shipped()]"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    module, *files = out.stdout.split()
    assert Path(module).is_relative_to(site)
    assert {Path(f).name for f in files} == {p.name for p in (ROOT / "policies").glob("*.yaml")}
    assert all(Path(f).is_relative_to(site) and Path(f).with_name("schema.json").is_file() for f in files)


def test_nothing_but_listed_files_is_ever_imported():
    before = set(sys.modules)
    complaint({"policy": "antigravity"})
    complaint({"policy": "../../evil"})
    assert not {m for m in set(sys.modules) - before if "antigravity" in m or "evil" in m}


@pytest.mark.parametrize(
    ("file", "places"),
    [
        (
            {"policy": "incralora", "params": {"grow_byy": 2}, "when": {"start": "300%"}, "budgett": {}},
            {"policy", "params.grow_byy", "when.start", "budgett"},
        ),
        (
            {"policy": "none of them", "params": {"x": 1}, "limits": {"*": {"min": -1}}},
            {"policy", "limits['*'].min"},
        ),
        ({"policy": ["sora"], "mode": "msk"}, {"policy", "mode"}),
        (
            {"phases": [{"policy": "squeze", "until": "5%", "budget": {"mean_rank": 0}}, {"policy": "hold", "a": 1}]},
            {"phases[0].policy", "phases[0].budget.mean_rank", "phases[1].a"},
        ),
        (
            {"phases": [{"until": 3, "wehn": {}}, {"policy": "lissa", "params": {"activ": 1}}], "tie": 3},
            {"phases[0].policy", "phases[0].wehn", "phases[1].policy", "phases[1].params.activ", "tie"},
        ),
    ],
)
def test_a_policy_that_there_is_not_hides_no_other_mistake(file, places):
    with pytest.raises(ConfigError) as e:
        load_policy(file)
    assert {line.split(": ")[1] for line in str(e.value).splitlines()} == places
