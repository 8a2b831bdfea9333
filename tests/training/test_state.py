"""Training state says who wrote it and is refused when anything in it has changed."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crashing import ticking
from helpers import same
from tiny import Tiny

import rankflow
from rankflow.errors import CheckpointError
from rankflow.training.checkpoint import load_state, save_state
from rankflow.training.state import FORMAT, check_seal, seal
from tests.contracts.test_crash import Full

POLICY = {"policy": "sora", "when": {"start": 2, "every": 2}, "limits": {"*": {"min": 1}}}
STATE: dict[str, Any] = {
    "step": 3,
    "share": 0.1,
    "none": None,
    "names": ["a", "b"],
    "policy": {"x": torch.tensor([1.0, float("nan"), -0.0]), "half": torch.ones(2, 3).bfloat16(), "n": torch.tensor(7)},
}


def run() -> Tiny:
    return Tiny(POLICY, 8).until(3)


def forms(sealed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What people's own files give back of it."""
    file = io.BytesIO()
    torch.save({"flow": sealed, "epoch": 1}, file)
    file.seek(0)
    save_state(SimpleNamespace(state_dict=lambda: sealed), folder)  # type: ignore[arg-type]
    return {"torch": torch.load(file, weights_only=True)["flow"], "folder": load_state(folder), "copy": dict(sealed)}


def test_what_was_not_changed_is_taken_in_whatever_file_it_was(tmp_path: Path):
    for name, state in forms(seal(STATE), tmp_path).items():
        assert same({k: check_seal(state)[k] for k in STATE}, STATE), name


CHANGES = {
    "a number": lambda s: s.update(step=4),
    "a rounding": lambda s: s.update(share=0.1 + 1e-16),
    "a bit of a tensor": lambda s: s["policy"]["x"].view(torch.uint8)[5].bitwise_xor_(1),
    "the sign of a zero": lambda s: s["policy"]["x"][2].fill_(0.0),
    "a type": lambda s: s["policy"].update(half=s["policy"]["half"].float()),
    "a shape": lambda s: s["policy"].update(half=s["policy"]["half"].T.contiguous()),
    "an order": lambda s: s.update(names=["b", "a"]),
    "a loss": lambda s: s["policy"].pop("n"),
    "an addition": lambda s: s.update(more=1),
    "another checksum": lambda s: s.update(checksum="0" * 64),
    "no checksum": lambda s: s.pop("checksum"),
    "an object": lambda s: s.update(names={1, 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_changed_is_noticed(change: str):
    state = copy.deepcopy(seal(STATE))
    CHANGES[change](state)
    with pytest.raises(CheckpointError, match=r"damaged.*") as error:
        check_seal(state)
    assert len(str(error.value)) < 300


def test_states_of_other_versions_say_whose_they_are():
    newer = {**seal(STATE), "format": FORMAT + 3, "rankflow": "9.1"}
    with pytest.raises(CheckpointError, match=rf"written by rankflow 9\.1, format {FORMAT + 3}; .*upgrade"):
        check_seal(newer)
    with pytest.raises(CheckpointError, match=r"0\.1 or older, format 1; .*go on with that rankflow"):
        check_seal({**STATE, "format": 1})
    for nothing in ({}, [], None, {"step": 1}):
        with pytest.raises(CheckpointError, match="not the training state"):
            check_seal(nothing)


def test_a_run_refuses_it_before_anything_is_changed():
    first = run()
    state = first.flow.state_dict()
    before = copy.deepcopy(first.end())
    damaged = copy.deepcopy(state)
    next(iter(damaged["gates"]["theta"].values()))["value"][0] += 1e-6
    with pytest.raises(CheckpointError, match="damaged"):
        first.flow.load_state_dict(damaged)
    assert same(first.end(), before)
    with pytest.raises(CheckpointError, match="damaged"):
        Tiny(POLICY, 8, state=damaged)
    first.flow.load_state_dict(state)


def test_it_is_a_snapshot_that_the_run_leaves_alone():
    going = run()
    state = going.flow.state_dict()
    before = copy.deepcopy(state)
    going.step()
    assert same(state, before)
    check_seal(state)


# -- in a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_state(run().flow, folder)
    return folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        load_state(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "SHA256SUMS"])
def test_one_byte_anywhere_or_an_end_cut_off(saved: Path, tmp_path: Path, name: str):
    folder, rng = tmp_path / "c", random.Random(name)
    shutil.copytree(saved, folder)
    path = folder / "rankflow" / name
    raw = path.read_bytes()
    for _ in range(40):
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ rng.randrange(1, 256)]) + raw[at + 1 :])
        refused(folder, r"damaged.*earlier checkpoint")
        path.write_bytes(raw[: rng.randrange(len(raw))])
        refused(folder, r"damaged.*earlier checkpoint")
    path.unlink()
    refused(folder, "damaged")
    path.write_bytes(raw)
    assert load_state(folder) is not None


def test_a_disk_that_is_full_at_any_write_leaves_the_state_there_was(tmp_path: Path):
    going = run()
    save_state(going.flow, tmp_path)
    before = going.flow.state_dict()
    going.step()
    for at in range(10**6):
        disk = Full(at)
        with ticking(disk), contextlib.suppress(OSError):
            save_state(going.flow, tmp_path)
        found = load_state(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["rankflow"], at
        if disk.calls <= at:
            break
        assert same(found, before) or same(found, going.flow.state_dict()), at
    assert at > 5
    assert same(found, going.flow.state_dict())


def test_a_folder_of_a_newer_rankflow(saved: Path, tmp_path: Path):
    state = load_state(saved)
    newer = {**(state or {}), "format": FORMAT + 1, "rankflow": "0.9"}
    save_state(SimpleNamespace(state_dict=lambda: newer), tmp_path)  # type: ignore[arg-type]
    refused(tmp_path, rf"rankflow 0\.9, format {FORMAT + 1}; this is rankflow {rankflow.__version__}")


def test_sums_are_those_that_sha256sum_checks(saved: Path):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved / "rankflow", capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads((saved / "rankflow" / "state.json").read_text())["rankflow"] == rankflow.__version__


def test_a_reason_that_looks_like_a_tensor_stays_a_reason(tmp_path: Path):
    odd = seal({"reason": "tensor: all of them", "x": torch.ones(2)})
    assert same(forms(odd, tmp_path)["folder"], odd)


def test_a_sealed_run_goes_on(saved: Path):
    whole = Tiny(POLICY, 8).until(3)
    again = Tiny(POLICY, 8, state=load_state(saved))
    assert again.flow.step == 3
    assert same(again.flow.state_dict()["gates"], whole.flow.state_dict()["gates"])
