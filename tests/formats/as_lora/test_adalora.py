"""PEFT's AdaLoRA read as plain LoRA: the same logits as the live model's after a load."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import inputs_of, llama_base
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import AdapterError, CheckpointError, restore, squeeze
from rankflow.formats.peft.adapter import PeftAdapter


def base(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return llama_base().to(dtype).eval()


def saved(folder: Path, masked: bool, dtype: torch.dtype = torch.float32) -> Path:
    """An AdaLoRA adapter with random factors; `masked` by PEFT's own allocator, which drops whole modules too."""
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=9, total_step=10, tinit=1, tfinal=2, target_modules=["q_proj", "down_proj"]
    )
    model = get_peft_model(base(dtype), config, autocast_adapter_dtype=False)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * (1e-4 if "layers.1.self_attn" in name else 0.3))
    if masked:
        allocator = model.base_model.rankallocator
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.grad = p.detach().clone()
        allocator.update_ipt(model.base_model.model)
        config = model.peft_config["default"]
        config.rank_pattern = allocator.mask_to_budget(model.base_model.model, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape")  # PEFT takes modules without a direction for shards
        model.save_pretrained(folder)
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on AdaLoRA's unused r
        model = PeftModel.from_pretrained(base(dtype), str(folder), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        return model(inputs_of("linear")).logits


@pytest.mark.parametrize("masked", [False, True])
def test_plain_lora_gives_the_logits_of_the_live_model(tmp_path: Path, masked: bool):
    src = saved(tmp_path / "src", masked)
    before = logits(src)
    report = squeeze(src, tmp_path / "out", target_rank=6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config.keys() & {"init_r", "target_r", "total_step", "tinit", "orth_reg_weight"}
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("lora_E" in key for key in keys)
    assert all(key.endswith(".weight") for key in keys)
    after = logits(tmp_path / "out")
    assert (before - logits_of_base()).abs().max() > 0.02
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    if masked:
        assert sum(report.ranks.values()) == 8
        assert not any("layers.1.self_attn" in name for name in report.ranks)  # it has nothing left
        assert any("not masked" in note and "layers.1.self_attn" in note for note in report.notes)
        assert "model.layers.1.self_attn.q_proj" in config["exclude_modules"]


def logits_of_base() -> Tensor:
    with torch.no_grad():
        return base()(inputs_of("linear")).logits


def test_the_scale_is_that_of_the_initial_rank(tmp_path: Path):
    src = saved(tmp_path / "src", True)
    layout = PeftAdapter(src).layout
    wanted = float(torch.tensor(9.0) / (torch.tensor([6.0]) + 1e-5))
    assert {slot.scaling for slot in layout.values()} == {wanted}
    tensors = load_file(src / "adapter_model.safetensors")
    for name in layout:
        a, e, b = (tensors[f"base_model.model.{name}.lora_{part}"].double() for part in "AEB")
        ours_a, ours_b = (t.double() for t in PeftAdapter(src).factors(name))
        torch.testing.assert_close(wanted * ours_b @ ours_a, b @ torch.diag(e[:, 0]) @ a * wanted, rtol=1e-6, atol=1e-7)


def test_masked_directions_that_the_file_still_has_are_left_out(tmp_path: Path):
    src = saved(tmp_path / "src", False)
    tensors = load_file(src / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_E"
    tensors[key][[1, 4]] = 0
    tensors["base_model.model.model.layers.0.self_attn.q_proj.ranknum"] = torch.full((1,), 3.0)  # PEFT loads it
    save_file(tensors, src / "adapter_model.safetensors")
    assert PeftAdapter(src).layout["model.layers.0.self_attn.q_proj"].rank == 4
    before = logits(src)
    squeeze(src, tmp_path / "out", target_rank=6)
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=2e-6)


def test_half_precision_is_folded_without_rounding(tmp_path: Path):
    src = saved(tmp_path / "src", False, torch.bfloat16)
    tensors = load_file(src / "adapter_model.safetensors")
    adapter = PeftAdapter(src)
    for name in adapter.layout:
        a, e = (tensors[f"base_model.model.{name}.lora_{part}"] for part in "AE")
        assert a.dtype == torch.bfloat16
        assert torch.equal(adapter.factors(name)[0].double(), a.double() * e.double())
    for size in (5000, 8000):
        squeeze(src, tmp_path / str(size), size=size)
        assert (tmp_path / str(size) / "adapter_model.safetensors").stat().st_size <= size


def test_residuals_and_further_squeezes_work_on_it(tmp_path: Path):
    from rankflow import expand

    src = saved(tmp_path / "src", True)
    squeeze(src, tmp_path / "small", target_rank=1, keep_residual=tmp_path / "residual.safetensors")
    expand(tmp_path / "small", tmp_path / "residual.safetensors", tmp_path / "whole")
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(src), rtol=0, atol=2e-6)


def test_a_live_lora_does_not_take_it_for_one_of_its_own(tmp_path: Path):
    src = saved(tmp_path / "src", False)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match="AdaLoRA"):
        restore(model, src)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def damage(folder: Path, key: str | None = None, value: Tensor | None = None, **config: object) -> None:
    weights, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    if key is not None:
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{key}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, weights)
    about.write_text(json.dumps(json.loads(about.read_text()) | config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"key": "lora_E"}, "no lora_E"),
        ({"key": "lora_B"}, "no lora_B"),
        ({"key": "lora_E", "value": torch.ones(5, 1)}, "no factors of AdaLoRA"),
        ({"key": "lora_E", "value": torch.ones(6)}, "no factors of AdaLoRA"),
        ({"key": "lora_E", "value": torch.full((6, 1), float("nan"))}, "NaN"),
        ({"key": "lora_A", "value": torch.ones(6, 16).int()}, "not floating"),
        ({"key": "lora_A.default", "value": torch.ones(6, 16)}, "there twice"),
        ({"key": "ranknum", "value": torch.zeros(1)}, "ranknum"),
        ({"key": "ranknum", "value": torch.ones(2)}, "ranknum"),
        ({"init_r": 0}, "init_r"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 5}}, "keeps another number"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 6}}, "keeps another number"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, how: dict, message: str):
    src = saved(tmp_path / "src", False)
    damage(src, **how)
    with pytest.raises(AdapterError, match=message):
        squeeze(src, tmp_path / "out", target_rank=2)
    assert not (tmp_path / "out").exists()


def test_one_that_never_trained_has_nothing(tmp_path: Path):
    config = AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["q_proj"])
    get_peft_model(base(), config).save_pretrained(tmp_path / "src")
    with pytest.raises(AdapterError, match="never trained"):
        squeeze(tmp_path / "src", target_rank=2)
