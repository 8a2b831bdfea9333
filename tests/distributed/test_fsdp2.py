"""Adapters that FSDP2 has in shards, under `mode: mask`: what one process does, in two of them over gloo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import sharded
import torch
from loops import tiny_llama
from sharded import ALL, CASES, FAILURES, QUICK

from rankflow.analysis.run_comparison import compare
from rankflow.training.ledger import Ledger

Found = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return sharded.together(tmp_path_factory.mktemp("shards"), QUICK)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return sharded.together(tmp_path_factory.mktemp("more_shards"), [name for name in ALL if name not in QUICK])


@pytest.fixture
def found(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """What `name` came to in each process."""
    return [of[name] for of in request.getfixturevalue("quick" if name in QUICK else "others")]


def named(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


def told(events: list[dict]) -> Ledger:
    ledger = Ledger()
    ledger.events = events
    return ledger


def same_end(one: dict, each: dict) -> None:
    assert not isinstance(each, str), each
    assert each["ranks"] == one["ranks"]
    same = compare(told(one["events"]), told(each["events"]))
    assert same.same, str(same)
    for key in ("weights", "moments"):
        assert each[key].keys() == one[key].keys()
        for name, w in one[key].items():
            torch.testing.assert_close(each[key][name], w, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", named(CASES))
def test_two_processes_with_shards_do_what_one_does(found: list[Any], name: str):
    one = sharded.alone(name)
    for each in found:
        same_end(one, each)
    resized = [e["ranks"] for e in one["events"] if e["event"] == "resize"]
    assert resized or name == "lisa"
    if name == "leave and return":
        managed = found[0]["managed"]  # parameters that FSDP2 knows, after each step
        least = managed.index(min(managed))
        assert max(managed[:least]) > managed[least] < max(managed[least:])


@pytest.mark.parametrize("name", named(CASES))
def test_all_of_it_loads_as_a_plain_adapter(found: list[Any], name: str):
    model = {key: value for key, value in CASES[name][1].items() if key in ("use_dora", "target_modules")}
    for each in found:
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules")
        plain = tiny_llama(dropout=0.0, **model, **{field: each["config"][field] for field in fields}).double()
        lost = plain.load_state_dict(each["weights"], strict=False)
        assert not lost.unexpected_keys
        assert not [key for key in lost.missing_keys if ".default" in key]
        torch.testing.assert_close(sharded.whole_outputs(plain), each["after"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", named(["resumed"]))
def test_a_run_goes_on_from_its_state(found: list[Any], name: str):
    for each in found:
        same_end(sharded.alone("phases"), each)


@pytest.mark.parametrize("name", ["gated"])
def test_under_gates_adapters_can_be_saved_and_runs_given_up(found: list[Any], name: str):
    for each in found:
        assert not isinstance(each, str), each
        assert each["open"] < 0.9
        torch.testing.assert_close(each["plain"], each["outputs"], rtol=1e-5, atol=1e-6)
        assert "save when the phase is over" in each["state"]
        assert each["detached"] == ["the run was given up, and its gates are not in the factors"]


@pytest.mark.parametrize("name", named(f"fails at {at}" for at in FAILURES))
def test_what_one_process_cannot_write_changes_nothing_anywhere(found: list[Any], name: str):
    for each, words in zip(found, ("DistributedError: process 1 failed", "MemoryError: no room"), strict=True):
        assert not isinstance(each, str), each
        assert [message.startswith(words) for message in each["failures"]] == [True]
        same_end(sharded.alone("phases"), each)


@pytest.mark.parametrize("name", ["refusals"])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("resize", "set mode: mask"),
        ("study", "gora has passes over data of its own"),
        ("loss", 'use penalty="gradient"'),
        ("replicated too", "not by rows over all processes"),
        ("offloaded", "is offloaded to the CPU"),
        ("by columns", "not by rows over all processes"),
        ("factors apart", "call fully_shard on the layer around it"),
        ("partly", "is not in shards, and other factors are"),
    ],
)
def test_what_shards_do_not_admit_is_refused(found: list[Any], name: str, what: str, says: str):
    for each in found:
        assert isinstance(each, dict), each
        assert each[what].startswith("ConfigError")
        assert says in each[what]
        assert "ignored_params" in each[what] or what in ("loss", "factors apart")
