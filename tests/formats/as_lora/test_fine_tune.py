"""Updates that come as full matrices: a fine-tune minus its base, and RandLoRA. What is lost is measured exactly."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import gpt2_base, inputs_of, llama_base
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from rankflow import AdapterError, ConfigError, inspect, squeeze
from rankflow.formats.peft.adapter import PeftAdapter

logging.disable_progress_bar()
BACKENDS = ("exact", "torch", "fbpca", "sklearn")


def base(kind=llama_base) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def tuned(
    folder: Path, kind=llama_base, *, rank: int = 0, only: tuple[str, ...] = ("q_proj", "up_proj"), **how
) -> None:
    """`folder`/base and /full, which differs in linear weights (by something of that rank, if given) and in norms."""
    model = base(kind)
    model.save_pretrained(folder / "base")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in only) and p.ndim == 2:
                change = torch.randn(p.shape, generator=g)
                if rank:
                    left, right = (torch.randn(n, rank, generator=g) for n in p.shape)
                    change = left @ right.mT
                p.add_(change * 0.1)
            elif "norm" in name or "ln_" in name:
                p.add_(0.1)
    model.save_pretrained(folder / "full", **how)


def deltas(folder: Path) -> dict[str, Tensor]:
    one, other = (model_tensors(folder / name) for name in ("full", "base"))
    return {
        key.removesuffix(".weight"): t.double() - other[key].double()
        for key, t in one.items()
        if t.ndim == 2 and not torch.equal(t, other[key])
    }


def model_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def written(folder: Path, name: str) -> Tensor:
    adapter = PeftAdapter(folder)
    a, b = (t.double() for t in adapter.factors(name))
    return adapter.layout[name].scaling * b @ a


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_lost_is_exactly_what_the_report_says(tmp_path: Path, backend: str):
    tuned(tmp_path, max_shard_size="10KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1
    report = squeeze(tmp_path / "full", tmp_path / "out", target_rank=4, base=tmp_path / "base", backend=backend)
    wanted = deltas(tmp_path)
    assert {m.name for m in report.modules} == set(wanted)
    assert report.backend == backend
    lost = total = 0.0
    for m in report.modules:
        left = float((wanted[m.name] - written(tmp_path / "out", m.name)).square().sum())
        whole = float(wanted[m.name].square().sum())
        assert m.rank_after == 4
        assert 1 - m.energy_kept == pytest.approx(left / whole, rel=1e-4)
        assert m.error == pytest.approx(math.sqrt(left), rel=1e-4)
        best = float(torch.linalg.svdvals(wanted[m.name])[4:].square().sum())
        assert best <= left * (1 + 1e-6)
        assert left <= best * (1.00001 if backend == "exact" else 1.05)
        lost, total = lost + left, total + whole
    assert 1 - report.energy_kept == pytest.approx(lost / total, rel=1e-4)
    assert any("layernorm" in note and "left as the base" in note for note in report.notes)


@pytest.mark.parametrize("kind", [llama_base, gpt2_base])
def test_a_low_rank_change_comes_back_whole_and_peft_loads_it(tmp_path: Path, kind):
    only = ("q_proj", "up_proj") if kind is llama_base else ("c_attn", "c_fc")
    tuned(tmp_path, kind, rank=2, only=only)
    report = squeeze(tmp_path / "full", tmp_path / "out", target_rank=4, base=tmp_path / "base")
    assert report.energy_kept == pytest.approx(1, abs=1e-9)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(kind), str(tmp_path / "out")).eval()
        fine = base(kind)
        fine.load_state_dict(model_tensors(tmp_path / "full"), strict=False)
        norms = {k: t for k, t in model_tensors(tmp_path / "full").items() if "norm" in k or "ln_" in k}
        model.base_model.model.load_state_dict(norms, strict=False)
        torch.testing.assert_close(
            model(inputs_of("linear")).logits, fine(inputs_of("linear")).logits, rtol=0, atol=1e-4
        )


def test_energy_counts_what_lies_outside_of_the_sketch(tmp_path: Path):
    tuned(tmp_path)
    source = tmp_path / "full"
    for across in (False, True):
        report = squeeze(source, energy=0.8, across=across, base=tmp_path / "base", dry_run=True, backend="exact")
        for name, delta in deltas(tmp_path).items() if not across else ():
            shares = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
            assert report.ranks[name] == int((shares < 0.8).sum()) + 1
        assert report.energy_kept >= 0.8
    some = squeeze(source, energy=0.5, max_rank=6, base=tmp_path / "base", dry_run=True, backend="exact")
    for name, delta in deltas(tmp_path).items():  # of all there is, and not of the six directions that were looked at
        shares = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert some.ranks[name] == int((shares < 0.5).sum()) + 1 < 6
    capped = squeeze(source, energy=0.8, max_rank=2, base=tmp_path / "base", dry_run=True)
    assert set(capped.ranks.values()) == {2}
    assert capped.energy_kept < 0.8
    with pytest.raises(ConfigError, match="auto looks at all singular values"):
        squeeze(source, auto=True, max_rank=2, base=tmp_path / "base", dry_run=True)
    found = inspect(source, base=tmp_path / "base").modules[0]
    shares = torch.linalg.svdvals(deltas(tmp_path)[found.name]).square().cumsum(0)
    assert found.energy[4] == pytest.approx(float(shares[3] / shares[-1]), rel=1e-4)


def test_names_may_begin_otherwise_and_what_only_one_has_is_said(tmp_path: Path):
    tuned(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file({k.removeprefix("model."): t for k, t in load_file(file).items() if "lm_head" not in k}, file)
    report = squeeze(tmp_path / "full", tmp_path / "out", target_rank=2, base=tmp_path / "base")
    assert all(name.startswith("model.layers") for name in report.ranks)
    assert any("are not in the base: lm_head.weight" in note for note in report.notes)


def change(folder: Path, key: str, value: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(key)
    save_file(tensors if value is None else {**tensors, key: value}, file)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: change(f / "full", Q, torch.ones(3, 16)), "q_proj.* these are different models"),
        (lambda f: change(f / "full", Q, torch.ones(16, 16, dtype=torch.int8)), "quantised"),
        (lambda f: change(f / "full", Q, torch.full((16, 16), torch.nan)), "q_proj has NaN"),
        (lambda f: save_file(load_file(f / "base/model.safetensors"), f / "full/model.safetensors"), "nothing to make"),
        (lambda f: save_file({"x": torch.ones(2)}, f / "base/model.safetensors"), "share no tensor"),
        (lambda f: (f / "full/model.safetensors").write_bytes(b"1234"), "truncated or corrupt"),
    ],
)
def test_what_makes_no_difference_of_models_is_refused(tmp_path: Path, harm, message: str):
    tuned(tmp_path)
    harm(tmp_path)
    with pytest.raises(AdapterError, match=message):
        squeeze(tmp_path / "full", tmp_path / "out", target_rank=2, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_shards_that_are_missing_or_elsewhere_are_refused(tmp_path: Path):
    tuned(tmp_path, max_shard_size="10KB")
    index = tmp_path / "full" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    with pytest.raises(ConfigError, match="no model"):
        squeeze(tmp_path / "full", target_rank=2, base=tmp_path / "nowhere")
    next((tmp_path / "full").glob("model-00001*")).unlink()
    with pytest.raises(AdapterError, match=r"model-00001.* no such file"):
        squeeze(tmp_path / "full", target_rank=2, base=tmp_path / "base")
    for bad in ({"weight_map": {"x": "../base/model.safetensors"}}, {"weight_map": 3}, [1]):
        index.write_text(json.dumps(bad))
        with pytest.raises(AdapterError, match="index"):
            squeeze(tmp_path / "full", target_rank=2, base=tmp_path / "base")
    index.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"a whole model and no adapter.*--base"):
        squeeze(tmp_path / "full", target_rank=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_randlora_is_looked_at_through_its_leading_directions(tmp_path: Path, backend: str):
    model = base()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(
            model, RandLoraConfig(r=5, randlora_alpha=7, target_modules=["q_proj", "down_proj", "up_proj"])
        )
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in live.named_parameters():
                if "randlora_lambda" in name:
                    p.copy_(torch.randn(p.shape, generator=g))
        live.save_pretrained(tmp_path / "src")
    report = squeeze(tmp_path / "src", tmp_path / "out", target_rank=3, base=tmp_path / "base", backend=backend)
    for m in report.modules:
        wanted = live.get_submodule(f"base_model.model.{m.name}").get_delta_weight("default").detach().double()
        left = float((wanted - written(tmp_path / "out", m.name)).square().sum())
        assert 1 - m.energy_kept == pytest.approx(left / float(wanted.square().sum()), rel=1e-3)
        best = float(torch.linalg.svdvals(wanted)[3:].square().sum())
        assert left <= best * 1.05
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == sorted(m.name for m in report.modules)
