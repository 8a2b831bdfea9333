"""Policies of other people's packages and of scripts go by their name wherever a shipped one does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from packages import install
from pydantic import Field
from tiny import Tiny
from typer.testing import CliRunner

from rankflow import ConfigError, Policy, RankPlan, load_policy, register_policy
from rankflow.cli.app import app
from rankflow.config import registry
from rankflow.config.load import describe

SOURCE = '''
from dataclasses import dataclass
from rankflow import Policy, RankPlan, When
from rankflow.plans.ops import Keep

@dataclass(frozen=True, kw_only=True)
class TakeOne(Policy):
    """Takes one direction from every module."""

    least: int = 2

    def decide(self, state, obs, layout, step):
        wide = [name for name, slot in layout.items() if slot.rank > self.least]
        return RankPlan({name: (Keep(tuple(range(layout[name].rank - 1))),) for name in wide}, "one each")

broken = 3
'''


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No test leaves a policy behind."""
    yield
    registry.PLUGINS._registered.clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, one of which has two policies: `take_one`, and one that is none."""
    monkeypatch.syspath_prepend(str(tmp_path))
    declared = {"take_one": "takers:TakeOne", "not_one": "takers:broken", "sora": "takers:TakeOne"}
    install(tmp_path, "takers", SOURCE, {"rankflow.policies": declared})
    yield tmp_path
    sys.modules.pop("takers", None)


def complaint(policy: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_policy(policy)  # type: ignore[arg-type]
    return str(error.value)


@dataclass(frozen=True, kw_only=True)
class Odd(Policy):
    """Does nothing, with settings of every kind."""

    share: Annotated[float, Field(gt=0, lt=1, description="how much")] = 0.5
    how: Literal["much", "little"] = "much"
    steps: list[int] = field(default_factory=lambda: [1, 2])
    must: int

    def decide(self, state, obs, layout, step):
        return RankPlan(reason="nothing to do")


# -- installed --------------------------------------------------------------------------------------------------------


def test_an_installed_policy_is_known_by_name_in_files_mappings_phases_and_lists(site):
    (site / "mine.yaml").write_text("policy: take_one\nparams: {least: 3}\nwhen: {start: 2, every: 2}\n")
    assert "take_one" in registry.policy_names()
    load_policy({"policy": "squeeze", "budget": {"mean_rank": 2}})
    assert "takers" not in sys.modules  # it was not asked for
    alone = load_policy(site / "mine.yaml").policies[0]
    phases = load_policy(
        {
            "phases": [
                {"policy": "hold", "until": 2},
                {"policy": "take_one", "params": {"least": 3}, "when": {"start": 4}},
            ]
        }
    )
    assert [name for name, _, _ in phases.policies] == ["hold", "take_one"]
    for name, policy, _ in (alone, phases.policies[1]):
        assert (name, policy.name, type(policy).__name__, policy.least) == ("take_one", "take_one", "TakeOne", 3)  # type: ignore[attr-defined]
    assert load_policy("take_one").policies[0][1] == type(alone[1])()
    described = {d.name: d for d in describe()}
    assert [(s.name, s.type, s.default) for s in described["take_one"].settings] == [("least", "int", 2)]
    assert "takers:broken" in described["not_one"].summary


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ({"policy": "take_one", "params": {"lest": 3}}, "params.lest: unknown key; did you mean 'least'"),
        ({"policy": "take_one", "params": {"least": "3"}}, "params.least: should be a valid integer"),
        ({"policy": "take_ome", "budgett": 1}, "budgett: unknown key; did you mean 'budget'"),
        ({"policy": "take_ome"}, "did you mean 'take_one'"),
        ({"policy": "not_one"}, "takers:broken of package takers 1.0: 3 is no class derived from rankflow.Policy"),
        ({"policy": "sora"}, "rankflow's own and takers:TakeOne"),
        ({"policy": "takers:TakeOne"}, "no policy is called"),
        (
            {"phases": [{"policy": "hodl", "until": 2}, {"policy": "take_one", "least": 3}]},
            "phases[1].least: unknown key",
        ),
    ],
)
def test_its_settings_are_checked_as_shipped_ones_are(site, file, place):
    assert place in complaint(file)


def test_the_command_line_knows_it(site):
    (site / "mine.yaml").write_text("policy: take_one\nparams: {least: 3}\n")
    shown = CliRunner().invoke(app, ["policies", "take_one"])
    assert "least" in shown.stdout
    assert "take_one" in CliRunner().invoke(app, ["policies"]).stdout
    assert CliRunner().invoke(app, ["policies", "not_one"]).exit_code == 2


def test_a_run_of_it_goes_on_where_it_was(site):
    policy = {"policy": "take_one", "params": {"least": 1}, "when": {"start": 2, "every": 4}}
    whole, half = Tiny(policy, 8).until(8), Tiny(policy, 8).until(4)
    state = half.flow.state_dict()
    model = half.model
    half.flow.detach()
    del half
    again = Tiny(load_policy(policy), 8, model=model, state=state).until(8)
    assert set(whole.flow.layout.ranks.values()) == {1}
    assert again.flow.layout.ranks == whole.flow.layout.ranks


# -- registered -------------------------------------------------------------------------------------------------------


def test_a_registered_policy_goes_by_its_class_in_snake_case_or_by_the_name_given():
    assert register_policy(Odd) is Odd
    assert load_policy({"policy": "odd", "params": {"must": 1}}).policies == (("odd", Odd(must=1), None),)
    assert "params.must: is missing" in complaint({"policy": "odd"})
    assert "share: should be less than 1" in complaint({"policy": "odd", "params": {"must": 1, "share": 2.0}})
    assert "did you mean 'little'" in complaint({"policy": "odd", "params": {"must": 1, "how": "litle"}})
    assert "share: should be less than 1" in complaint(Odd(must=1, share=2.0))  # made in Python, and as strict
    assert {s.name: s.default for s in next(d for d in describe() if d.name == "odd").settings}["steps"] == [1, 2]
    register_policy(Odd, name="other")
    assert load_policy({"policy": "other", "params": {"must": 1}}).policies[0][0] == "other"


def test_a_notebook_registers_the_same_name_again():
    def cell(default: int) -> type[Policy]:
        @register_policy
        @dataclass(frozen=True, kw_only=True)
        class Again(Policy):
            least: int = default

        return Again

    for default in (1, 2):
        cell(default)
        assert load_policy({"policy": "again"}).policies[0][1].least == default  # type: ignore[attr-defined]


def test_what_is_no_policy_is_not_registered():
    @dataclass(frozen=True, kw_only=True)
    class Unfit(Policy):
        model: CliRunner = field(default_factory=CliRunner)

    class Bare(Odd):
        more: int = 1

    for wrong, why in [
        (int, "no class derived"),
        (Policy, "no class derived"),
        (Unfit, "cannot stand in a policy file"),
        (Bare, "@dataclass"),
        (Odd(must=1), "no class derived"),
    ]:
        with pytest.raises(ConfigError, match=why):
            register_policy(wrong)  # type: ignore[type-var]
    for name in ("squeeze", "sora_then_hold", "a b"):
        with pytest.raises(ConfigError):
            register_policy(Odd, name=name)
    assert registry.policy_names() == sorted(registry.shipped_policies())
