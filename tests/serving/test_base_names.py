"""Which modules a base model has, against what PEFT finds on the live model, and against names written out here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, MixtralConfig

from rankflow import ConfigError, check
from tests.cli.test_app import run

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40)
CLIP = CLIPTextConfig(**SMALL, vocab_size=40, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "LlamaForCausalLM": LLAMA,
    "CLIPTextModel": CLIP,
    "LlavaForConditionalGeneration": LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=4, patch_size=2), text_config=LLAMA, image_token_index=3
    ),
    "MixtralForCausalLM": MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=40, num_local_experts=2),
}


def base_of(folder: Path, architecture: str) -> Path:
    """A folder with a config and no weights."""
    folder.mkdir(parents=True)
    config = CONFIGS[architecture].to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, names: Iterable[str], **config: object) -> Path:
    names = list(names)
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{n}.lora_{ab}.weight": torch.ones(2, 8).reshape((2, 8) if ab == "A" else (8, 2))
               for n in names for ab in "AB"}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted({n.split(".")[-1] for n in names})}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def kohya(path: Path, stems: Iterable[str]) -> Path:
    save_file(
        {
            f"{s}.{k}.weight": torch.ones((2, 8) if "down" in k else (8, 2))
            for s in stems
            for k in ("lora_down", "lora_up")
        }
        | {f"{s}.alpha": torch.tensor(2.0) for s in stems},
        path,
    )
    return path


def loaded_by_peft(folder: Path, architecture: str) -> int:
    """How many B came from the file: those are ones, and fresh ones zeros."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(getattr(transformers, architecture)(CONFIGS[architecture]), str(folder))
    return sum(bool(t.any()) for name, t in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("architecture", "name", "there"),
    [
        ("LlamaForCausalLM", "model.layers.1.self_attn.o_proj", True),
        ("LlamaForCausalLM", "transformer.h.0.attn.o_proj", False),
        ("LlamaForCausalLM", "model.layers.2.self_attn.o_proj", False),  # of a deeper model
        ("CLIPTextModel", "encoder.layers.0.self_attn.out_proj", True),
        ("CLIPTextModel", "text_model.encoder.layers.0.self_attn.out_proj", False),  # of transformers before 5.6
        ("LlavaForConditionalGeneration", "model.language_model.layers.0.self_attn.o_proj", True),
        ("LlavaForConditionalGeneration", "language_model.model.layers.0.self_attn.o_proj", True),  # renamed by PEFT
        ("LlavaForConditionalGeneration", "language_model.layers.7.self_attn.o_proj", False),
    ],
)
def test_a_base_has_what_peft_finds_in_it(tmp_path: Path, architecture: str, name: str, there: bool):
    src = adapter(tmp_path / "src", [name])
    if "layers.0" in name:
        assert bool(loaded_by_peft(src, architecture)) == there
    found = check(src, base=base_of(tmp_path / "base", architecture))
    assert found.missing == (() if there else (name,))
    assert bool(found.problems) != there


def test_experts_that_transformers_has_since_put_into_one_parameter(tmp_path: Path):
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w{i}" for e in range(2) for i in (1, 2, 3)]
    base = base_of(tmp_path / "base", "MixtralForCausalLM")
    assert check(adapter(tmp_path / "old", names), base=base).missing == ()
    assert check(adapter(tmp_path / "odd", ["model.layers.0.moe.experts.0.w1"]), base=base).missing


def test_a_model_of_files_alone(tmp_path: Path):
    """Of shards, by their headers; `lm_head` is one with the embeddings, and in none of them."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(4, 8)}, base / "model-1.safetensors")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)}, base / "model-2.safetensors")
    index = {"model.embed_tokens.weight": "model-1.safetensors", "model.layers.0.q.weight": "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    src = adapter(tmp_path / "src", ["model.layers.0.self_attn.q_proj", "lm_head", "model.layers.1.self_attn.q_proj"])
    assert check(src, base=base).missing == ("model.layers.1.self_attn.q_proj",)


def test_modules_of_an_image_model_by_the_names_of_every_format(tmp_path: Path):
    """A pipeline of diffusers: a U-Net of files, a text encoder of which transformers has the class."""
    base = tmp_path / "pipe"
    base_of(base / "text_encoder", "CLIPTextModel")
    (base / "unet").mkdir()
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    tensors = {f"{unet}.{last}.weight": torch.zeros(8, 8) for last in ("to_q", "to_out.0")}
    save_file(tensors, base / "unet" / "diffusion_pytorch_model.safetensors")
    flat, te = f"lora_unet_{unet.replace('.', '_')}", "lora_te_text_model_encoder_layers_1_mlp_fc1"
    good = [f"{flat}_to_q", f"{flat}_to_out_0", te]
    bad = [
        "lora_te_text_model_encoder_layers_9_mlp_fc1",
        f"{flat}_to_x",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    ]
    found = check(kohya(tmp_path / "k.safetensors", good + bad), base=base)
    assert set(found.missing) == set(bad)
    assert check(kohya(tmp_path / "k.safetensors", good), base=base).problems == ()
    # Diffusers' names, as transformers before and from 5.6 on has them
    for inner in ("text_model.encoder", "encoder"):
        names = [
            f"unet.{unet}.to_q",
            f"text_encoder.{inner}.layers.0.mlp.fc2",
            f"text_encoder.{inner}.layers.5.mlp.fc2",
        ]
        tensors = {f"{n}.lora_{ab}.weight": torch.ones((2, 8) if ab == "A" else (8, 2)) for n in names for ab in "AB"}
        save_file(tensors, tmp_path / "d.safetensors")
        assert check(tmp_path / "d.safetensors", base=base).missing == (names[2],)
    # Names of the model's own checkpoint are others, of which nothing can be told
    src = kohya(tmp_path / "o.safetensors", ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"])
    found = check(src, base=base)
    assert found.problems == ()
    assert "cannot be looked for" in found.hint


def test_a_checkpoint_of_one_file(tmp_path: Path):
    inner = "double_blocks.0.img_attn.qkv"
    save_file({f"model.diffusion_model.{inner}.weight": torch.zeros(8, 8)}, tmp_path / "flux.safetensors")
    src = kohya(
        tmp_path / "k.safetensors", ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_7_img_attn_qkv"]
    )
    assert check(src, base=tmp_path / "flux.safetensors").missing == ("lora_unet_double_blocks_7_img_attn_qkv",)
    tensors = {f"diffusion_model.{inner}.lora_{ab}.weight": torch.ones((2, 8) if ab == "A" else (8, 2)) for ab in "AB"}
    save_file(tensors, tmp_path / "c.safetensors")
    assert check(tmp_path / "c.safetensors", base=tmp_path / "flux.safetensors").problems == ()


def test_on_the_command_line(tmp_path: Path):
    base = base_of(tmp_path / "base", "LlamaForCausalLM")
    good = adapter(tmp_path / "good", ["model.layers.0.self_attn.o_proj"])
    bad = adapter(tmp_path / "bad", ["model.layers.0.self_attn.o_proj", "gpt.layers.0.attn.o_proj"])
    assert "has all its modules" in run("check", good, "--base", base).stdout
    assert "gpt.layers.0.attn.o_proj" in "".join(run("check", bad, "--base", base, status=1).stdout.split())
    data = json.loads(run("check", bad, "--base", base, "--json", status=1).stdout)
    assert data["missing"] == ["gpt.layers.0.attn.o_proj"]
    assert [p["modules"] for p in data["problems"]] == [["gpt.layers.0.attn.o_proj"]]
    served = json.loads(run("check", bad, "--engine", "vllm", "--base", base, "--json", status=1).stdout)
    assert served["missing"] == data["missing"]
    run("check", good, "--base", tmp_path / "none", status=2)


def test_what_is_no_base(tmp_path: Path):
    src = adapter(tmp_path / "src", ["model.layers.0.self_attn.o_proj"])
    with pytest.raises(ConfigError, match="--base"):
        check(src)
    with pytest.raises(ConfigError):
        check(src, base=tmp_path / "none")
    # With an engine it is said that nothing was looked for
    assert "not looked for" in check(src, "vllm", base=tmp_path / "none").hint


def test_a_strangers_base_runs_nothing(tmp_path: Path):
    base = base_of(tmp_path / "base", "LlamaForCausalLM")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    src = adapter(tmp_path / "src", ["model.layers.0.self_attn.o_proj"])
    with pytest.raises(ConfigError):
        check(src, base=base)
    (base / "config.json").write_text(json.dumps(CONFIGS["LlamaForCausalLM"].to_dict() | {"num_hidden_layers": 10**9}))
    with pytest.raises(ConfigError, match="no model has more"):
        check(src, base=base)
    assert not (tmp_path / "ran").exists()
