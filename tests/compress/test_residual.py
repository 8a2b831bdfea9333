"""What was cut off goes back to the bit, every prefix of a sorted adapter is best, distances are the dense ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankflow import AdapterError, ConfigError, canonicalize, diff, expand, inspect, squeeze
from tests.compress.test_squeeze import TARGETS, deltas, loaded, saved
from tests.compress.test_target import run

EVERY = LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=r".*\.(q|up)|conv1|conv2|emb",
    rank_pattern={"up": 3, "conv2": 5},
    use_rslora=True,
    target_parameters=["experts.down_proj"],
)


def files(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[key]) for key, t in ours.items())


def configs(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.6}, {"max_params": 250}], ids=str)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_squeeze_and_its_residual_make_the_sorted_source_again(tmp_path, target, dtype):
    src = saved(tmp_path / "src", EVERY)
    report = squeeze(src, tmp_path / "small", keep_residual=tmp_path / "residual.safetensors", dtype=dtype, **target)
    plain = squeeze(src, tmp_path / "plain", dtype=dtype, **target)
    assert report.ranks == plain.ranks
    assert same(files(tmp_path / "small"), files(tmp_path / "plain"))  # a residual changes nothing else
    if "max_params" in target:
        assert 0 in report.ranks.values(), "the case needs a module that left"
    ranks = expand(tmp_path / "small", tmp_path / "residual.safetensors", tmp_path / "whole")
    assert ranks == {m.name: m.rank for m in inspect(src).modules}
    assert configs(tmp_path / "whole") == configs(src)
    before, after = deltas(loaded(src)), deltas(loaded(tmp_path / "whole"))
    tolerance = 1e-5 if dtype is None else 2e-2
    for name, delta in before.items():
        assert float((after[name] - delta).norm()) <= tolerance * float(delta.norm())
    if dtype is None:
        canonicalize(src, tmp_path / "sorted")
        cut = {name for name, rank in report.ranks.items() if rank < ranks[name]}
        for key, t in files(tmp_path / "sorted").items():
            if any(f".{name}." in key for name in cut):
                assert torch.equal(files(tmp_path / "whole")[key], t)


def test_every_prefix_of_a_sorted_adapter_is_the_best_of_its_rank(tmp_path):
    src = saved(tmp_path / "src", LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    canonicalize(src, tmp_path / "sorted")
    tensors = files(tmp_path / "sorted")
    for name, delta in deltas(loaded(src)).items():
        sigma = torch.linalg.svdvals(delta[0])
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        for k in range(1, 5):
            error = (delta[0] - 1.5 * b[:, :k] @ a[:k]).norm()
            assert float(error) == pytest.approx(float(sigma[k:].norm()), abs=1e-5 * float(sigma[0]))


def test_distances_are_those_of_the_dense_updates(tmp_path):
    first = saved(tmp_path / "first", EVERY)
    second = saved(tmp_path / "second", LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS), seed=2)
    found = diff(first, second)
    ours, theirs = deltas(loaded(first)), deltas(loaded(second))
    ours["experts.down_proj"] = ours.pop("experts")  # a live model names the module, a file its parameter
    assert {m.name for m in found.modules} == ours.keys() | theirs.keys()
    for m in found.modules:
        zero = torch.zeros_like(ours.get(m.name, theirs.get(m.name)))
        a, b = ours.get(m.name, zero), theirs.get(m.name, zero)
        assert m.distance == pytest.approx(float((a - b).norm()), rel=1e-5)
        assert m.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
    assert found.distance == pytest.approx(math.hypot(*(m.distance for m in found.modules)))
    squeeze(first, tmp_path / "small", target_rank=2)
    assert diff(first, tmp_path / "small").distance == pytest.approx(
        squeeze(first, target_rank=2, dry_run=True).error, rel=1e-4
    )


def test_an_adapter_is_no_distance_from_itself_in_another_basis(tmp_path):
    src = saved(tmp_path / "src", EVERY)
    canonicalize(src, tmp_path / "sorted")
    assert diff(src, src).relative < 1e-15
    assert diff(src, tmp_path / "sorted").relative < 1e-6  # its float32 files
    assert json.loads(run("diff", src, tmp_path / "sorted", "--json"))["distance"] > 0
    assert "over |dW|" in run("diff", src, tmp_path / "sorted")


def test_a_residual_that_claims_more_than_there_can_be_is_none(tmp_path):
    src, residual = saved(tmp_path / "src", LoraConfig(r=4, target_modules=TARGETS)), tmp_path / "residual.safetensors"
    squeeze(src, tmp_path / "small", target_rank=2, keep_residual=residual)
    with safe_open(residual, "pt") as file:
        metadata = dict(file.metadata())
    shapes = json.loads(metadata["rankflow_shapes"])
    for shape, refused in (([1 << 24, 1 << 24], False), ([1 << 24, (1 << 24) + 1], True), ([1 << 50, 1], True)):
        metadata["rankflow_shapes"] = json.dumps({**shapes, next(iter(shapes)): shape})
        save_file(load_file(residual), tmp_path / "claims.safetensors", metadata)
        with pytest.raises(AdapterError) as e:
            expand(tmp_path / "small", tmp_path / "claims.safetensors", tmp_path / "x")
        assert ("is not a residual that" in str(e.value)) == refused
    assert not (tmp_path / "x").exists()


def test_mistakes_are_said_and_nothing_is_written(tmp_path):
    src = saved(tmp_path / "src", LoraConfig(r=4, target_modules=TARGETS))
    residual = tmp_path / "residual.safetensors"
    with pytest.raises(ConfigError, match=r"residual is a \.safetensors file"):
        squeeze(src, tmp_path / "x", target_rank=2, keep_residual=tmp_path / "residual.bin")
    with pytest.raises(ConfigError, match="gauge 'balanced'"):
        squeeze(src, tmp_path / "x", target_rank=2, keep_residual=residual, gauge="keep")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    squeeze(src, tmp_path / "small", target_rank=2, keep_residual=residual)
    assert "is there already" in run(
        "squeeze", src, "-o", tmp_path / "x", "--target-rank", 2, "--keep-residual", residual, status=2
    )
    squeeze(src, tmp_path / "smaller", target_rank=1)
    with pytest.raises(AdapterError, match=r"ranks of .* do not add up"):
        expand(tmp_path / "smaller", residual, tmp_path / "x")
    other = saved(tmp_path / "other", LoraConfig(r=2, target_modules=["conv1"]))
    with pytest.raises(AdapterError, match="is in one of them only"):
        expand(other, residual, tmp_path / "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(AdapterError, match="is not a residual"):
        expand(tmp_path / "small", tmp_path / "no.safetensors", tmp_path / "x")
    with pytest.raises(AdapterError, match="share no module"):
        diff(src, other)
    with pytest.raises(ConfigError, match="is there already"):
        expand(tmp_path / "small", residual, src)
    assert not (tmp_path / "x").exists()
    run("expand", tmp_path / "small", residual, "-o", tmp_path / "whole")
    run("canonicalize", src, "-o", tmp_path / "sorted")
    assert same(files(tmp_path / "whole"), files(tmp_path / "sorted"))
