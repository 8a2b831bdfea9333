"""Intruder dimensions against full SVDs, and against PEFT's own count."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gpt2_base, minilm_base, minilm_folder, randomise, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import ConfigError, inspect
from rankflow.analysis.intruders import intruders
from tests.analysis.test_inspection import make
from tests.cli.test_app import refused, run


def by_full_svd(W0: Tensor, delta: Tensor, top_k: int, epsilon: float) -> tuple[tuple[int, ...], np.ndarray]:
    """Intruders among the first `top_k`, and every direction's best cosine."""
    base, tuned = (np.linalg.svd(W.double().numpy(), full_matrices=False)[0] for W in (W0, W0 + delta))
    best = np.abs(tuned.T @ base).max(1)[:top_k]
    return tuple(np.flatnonzero(best < epsilon).tolist()), best


def weight(rows: int, columns: int, seed: int, pace: float) -> Tensor:
    """Singular vectors at random, singular values falling to a floor, and apart from each other there too."""
    g = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns, generator=g, dtype=torch.float64), full_matrices=False)
    at = torch.arange(len(Vh) if rows >= columns else rows)
    return U * (0.05 + torch.exp(-pace * at) + 0.02 * (1 - at / len(at))) @ Vh


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(48, 32), (32, 48), (64, 64), (200, 24), (12, 30)]),
    seed=st.integers(0, 1000),
    pace=st.sampled_from([0.02, 0.1, 0.5]),
    size=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]),
    epsilon=st.sampled_from([0.2, 0.5, 0.8]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_they_are_those_of_the_full_decompositions(
    shape: tuple[int, int], seed: int, pace: float, size: float, epsilon: float, dtype: torch.dtype
):
    W0 = weight(*shape, seed, pace).to(dtype)
    g = torch.Generator().manual_seed(seed + 1)
    A = (torch.randn(4, shape[1], generator=g) / shape[1] ** 0.5).to(dtype)
    B = (size * torch.randn(shape[0], 4, generator=g) / shape[0] ** 0.5).to(dtype)
    found = intruders(W0, A, B, 1.5, top_k=6, epsilon=epsilon)
    want, best = by_full_svd(W0.double(), 1.5 * (B.double() @ A.double()), 6, epsilon)
    near = {i for i, cosine in enumerate(best) if abs(cosine - epsilon) < 1e-3}  # which rounding decides
    assert set(found.found) - near == set(want) - near
    assert (found.top_k, found.undecided) == (6, ())


def test_vectors_of_w0_far_from_the_first_count_too():
    """An update along W0's weakest singular vector makes that the first direction: strong, and no stranger."""
    W0 = weight(80, 60, 0, 0.1)
    U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
    A, B = Vh[-1:], 3.0 * U[:, -1:]
    assert intruders(W0, A, B, 1.0).found == ()
    stranger = torch.linalg.svd(W0, full_matrices=True).U[:, -1:]  # outside the range of W0
    assert intruders(W0, A, 3.0 * stranger, 1.0).found == (0,)


def test_more_directions_than_there_are_and_weights_without_any():
    W0 = weight(6, 4, 0, 0.1)
    A, B = torch.ones(1, 4).double(), torch.ones(6, 1).double()
    assert intruders(W0, A, B, 1.0, top_k=10).top_k == 4
    assert 0 in intruders(torch.zeros(64, 64), torch.ones(1, 64), torch.ones(64, 1), 1.0, top_k=2).found
    same = intruders(torch.eye(64), torch.ones(1, 64), torch.ones(64, 1), 1.0, top_k=2)  # no order among equals
    assert same.top_k == 2


def tuned_minilm(folder: Path, **config) -> PeftModel:
    settings = {"r": 4, "target_modules": r".*layer\.[05]\.(attention\.self\.query|intermediate\.dense|output\.dense)"}
    model = wrap(minilm_base(), LoraConfig(lora_alpha=6, **{**settings, **config}))
    g = torch.Generator().manual_seed(0)
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            p.data = torch.randn(p.shape, generator=g) * (0.02 + 0.02 * (i % 7))
    model.save_pretrained(folder)
    return model


def test_the_count_is_that_of_peft(tmp_path: Path):
    model = tuned_minilm(tmp_path / "adapter")
    said: list[str] = []
    with torch.no_grad():
        reduce_intruder_dimension(model, top_k=8, logging_sink=said.append)
    counts = {}
    for line in said:
        if match := re.fullmatch(r"base_model\.model\.(.+): (?:Intruders: (\d+)|No intruders)", line):
            counts[match[1]] = int(match[2] or 0)
    found = inspect(tmp_path / "adapter", base=minilm_folder(), top_k=8)
    ours = {m.name: len(m.intruders.found) for m in found.modules if m.intruders}
    assert ours == counts
    assert len(set(counts.values())) > 2
    assert {t.type: t.intruders for t in found.types}["intermediate.dense"] == sum(
        count for name, count in counts.items() if name.endswith("intermediate.dense")
    )
    assert found.notes == ()


def test_conv1d_of_transformers_is_turned(tmp_path: Path):
    model = wrap(gpt2_base(), LoraConfig(r=2, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for m in inspect(tmp_path / "adapter", base=tmp_path / "base", top_k=3).modules:
        A, B = (factors[f"base_model.model.{m.name}.lora_{x}.weight"] for x in "AB")
        assert m.intruders is not None
        assert m.intruders.found == by_full_svd(base[f"{m.name}.weight"].T, m.scaling * B @ A, 3, 0.5)[0]


def test_the_command_says_how_many(tmp_path: Path):
    tuned_minilm(tmp_path / "adapter")
    shown = run("inspect", tmp_path / "adapter", "--base", minilm_folder(), "--top-k", 8, "--modules").stdout
    assert "of 8" in shown
    data = json.loads(run("inspect", tmp_path / "adapter", "--base", minilm_folder(), "--json").stdout)
    assert data["epsilon"] == 0.5
    assert {m["intruders"]["top_k"] for m in data["modules"]} == {10}


def test_bases_that_do_not_serve(tmp_path: Path):
    adapter = make(tmp_path / "adapter", ["layers.0.q", "layers.1.q"])
    base = tmp_path / "base"
    assert "no model" in refused("inspect", adapter, "--base", base)
    base.mkdir()
    assert "no model" in refused("inspect", adapter, "--base", base)
    weights = {f"layers.{i}.q.weight": torch.randn(32, 32) for i in range(2)}

    def write(**changed: Tensor) -> None:
        renamed = {name.replace("__", "."): t for name, t in changed.items()}
        save_file({**weights, **renamed}, base / "model.safetensors")

    write(layers__1__q__weight=torch.randn(32, 31))
    assert "[32, 31] and the adapter's is [32, 32]" in refused("inspect", adapter, "--base", base)
    write(layers__1__q__weight=torch.full((32, 32), torch.nan))
    assert "NaN or infinite" in refused("inspect", adapter, "--base", base)
    write(layers__1__q__weight=torch.zeros(512, 1, dtype=torch.uint8))
    found = inspect(adapter, base=base)
    assert [m.intruders is None for m in found.modules] == [False, True]
    assert "quantised" in found.notes[0]
    save_file({"layers.0.q.weight": weights["layers.0.q.weight"]}, base / "model.safetensors")
    assert "1 modules have no matrix in the base to compare with: layers.1.q" in inspect(adapter, base=base).notes
    save_file({"elsewhere.weight": torch.ones(1)}, base / "model.safetensors")
    assert "none of the adapter's modules" in refused("inspect", adapter, "--base", base)
    (base / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "not a whole safetensors file" in refused("inspect", adapter, "--base", base)
    shutil.rmtree(base)
    for option, value, message in (("top_k", 0, "top_k is 0"), ("epsilon", 1.0, "epsilon is 1.0")):
        with pytest.raises(ConfigError, match=message):
            inspect(adapter, base=base, **{option: value})
    tuned_minilm(tmp_path / "dora", use_dora=True)
    assert "DoRA rescales" in refused("inspect", tmp_path / "dora", "--base", minilm_folder())
