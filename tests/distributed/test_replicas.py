"""Two processes over gloo: the same ranks as one, replicas that stay equal, and errors that say what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import replicas
import torch
from replicas import CASES, SIZE, together, under_the_trainer
from safetensors.torch import load_file

import rankflow
from rankflow import ConfigError
from rankflow.analysis.run_comparison import compare
from rankflow.distributed.comm import limit
from rankflow.training.ledger import Ledger

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict]:
    return together(folder)


def told(events: list[dict]) -> Ledger:
    ledger = Ledger()
    ledger.events = events
    return ledger


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does_and_stay_equal(folder: Path, found: list[dict], name: str):
    policy, model, options = CASES[name]
    one = replicas.alone(policy, options.get("micro", 1), **model)
    for each in (of[name] for of in found):
        assert not isinstance(each, str), each
        assert each["ranks"] == one["ranks"]
        same = compare(told(one["events"]), told(each["events"]))
        assert same.same, str(same)
        for key, w in one["weights"].items():
            torch.testing.assert_close(each["weights"][key], w, rtol=1e-3, atol=1e-5)
            assert torch.equal(each["weights"][key], found[0][name]["weights"][key])
        assert each["averages"].keys() == one["averages"].keys()
        for module, averages in one["averages"].items():
            for key, average in averages.items():
                torch.testing.assert_close(each["averages"][module][key], average, rtol=1e-3, atol=1e-12)
    assert any(e["event"] == "resize" for e in one["events"]) or name == "sora, nothing closed"
    assert [of[name]["path"] for of in found] == [True] + [False] * (SIZE - 1)
    written = Ledger.read(folder / f"{name}.jsonl")
    assert compare(written, told(found[0][name]["events"])).numbers is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("all_in_shards", ["or set mode: mask in the policy file"] * 2),
        ("unscaled_too_early", ["before scaler.unscale_"] * 2),
        ("joined", ["give every process as many batches"] * 2),
        ("base_in_tensor_parallel", ["spread by tensor parallelism"] * 2),
        ("adapter_in_tensor_parallel", ["spread by tensor parallelism"] * 2),
        ("fsdp1", ["FullyShardedDataParallel keeps parameters of its own"] * 2),
        ("without_wrapper", ["are not those of process 0", "are not those of process 0"]),
        ("one_fails", ["process 1 failed, and all stop with it: MemoryError", "MemoryError: no room"]),
        ("different_policies", ["phases[0].when.every is 3 in process 0 and 4 in process 1"] * 2),
        ("different_seeds", ["seed is 0 in process 0 and 1 in process 1"] * 2),
        ("different_steps", ["total_steps is 12 in process 0 and 13 in process 1"] * 2),
        ("different_adapters", ["adapter_name is default in process 0 and other in process 1"] * 2),
        ("different_ranks", ["up_proj is rank 2, linear 48 x 32", "and rank 3, linear 48 x 32"]),
        ("data_in_one", ["batches is not given in process 0 and given in process 1"] * 2),
        ("one_is_ahead", ["process 1 is at finish after step 2", "process 0 is at gradients of step 3"]),
        ("one_is_silent", ["(finish after step 0), and another process has ended or", ""]),
        ("one_leaves", ["another process has ended or does not answer", "left"]),
        ("one_never_attaches", ["process 0 waited for the others to attach", ""]),
    ],
)
def test_what_one_process_does_is_told_in_all(found: list[dict], name: str, says: list[str]):
    for of, wanted in zip(found, says, strict=True):
        assert wanted in (of[name] or "")


@pytest.mark.parametrize("given", ["soon", 0, -1, float("nan"), float("inf")])
def test_how_long_others_are_waited_for_is_a_number_of_seconds(given: object, monkeypatch: pytest.MonkeyPatch):
    for seconds in (None, given):
        monkeypatch.setenv("RANKFLOW_TIMEOUT", str(given))
        with pytest.raises(ConfigError, match="RANKFLOW_TIMEOUT" if seconds is None else "timeout"):
            limit(seconds)  # type: ignore[arg-type]
    monkeypatch.setenv("RANKFLOW_TIMEOUT", "90")
    assert (limit(None), limit(5)) == (90, 5)
    monkeypatch.delenv("RANKFLOW_TIMEOUT")
    assert limit(None) == 60


def test_what_is_no_module_or_keeps_parameters_of_its_own_is_refused_by_name():
    """Stand-ins of the same names: neither can be made in one process without what it is for."""

    class PipelineStage:
        pass

    class DeepSpeedEngine(torch.nn.Linear):
        pass

    optimizer = torch.optim.SGD([torch.zeros(1)])
    for model, says in ((PipelineStage(), "PipelineStage is not a module"), (DeepSpeedEngine(1, 1), "DeepSpeedEngine")):
        with pytest.raises(ConfigError, match=says):
            rankflow.attach(model, optimizer, "hold", total_steps=1)  # type: ignore[arg-type]


def test_an_overflow_in_one_process_skips_the_step_in_all(found: list[dict]):
    first, second = (of["one_sees_infinity"] for of in found)
    assert not isinstance(first, str), first
    assert first["moved"] == second["moved"] == [at != 2 for at in range(replicas.STEPS)]
    assert first["scale"] == second["scale"] == 2.0
    assert first["ranks"] == second["ranks"]
    for key, w in first["weights"].items():
        assert torch.equal(w, second["weights"][key])


def test_adapters_beside_shards_start_as_that_of_the_first_process(found: list[dict]):
    first, second = (of["one_starts_elsewhere"]["weights"] for of in found)
    assert all(torch.equal(w, second[key]) for key, w in first.items())
    assert first.keys() == second.keys()


@pytest.mark.slow
def test_the_trainer_with_two_processes_resizes_and_resumes(tmp_path: Path):
    found = under_the_trainer(tmp_path)
    for name in ("whole", "resumed"):
        first, second = (of[name] for of in found)
        assert first["ranks"] == second["ranks"] == found[0]["whole"]["ranks"]
        for key, w in first["weights"].items():
            assert torch.equal(w, second["weights"][key])
            torch.testing.assert_close(w, found[0]["whole"]["weights"][key], rtol=1e-5, atol=1e-7)
    events = [json.loads(line)["event"] for line in (tmp_path / "whole" / "rankflow.jsonl").read_text().splitlines()]
    assert events.count("resize") > 1
    assert events.count("finish") == 1  # one process writes it
    saved = load_file(tmp_path / "whole" / "checkpoint-20" / "adapter_model.safetensors")
    ranks = {k.split(".lora_A")[0].removeprefix("base_model.model."): len(t) for k, t in saved.items() if "lora_A" in k}
    assert ranks == {name: rank for name, rank in found[0]["whole"]["ranks"].items() if rank}
