"""`check` and what is written for an engine: one rule, over names, settings and tensors of every kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import ConfigError, RankFlowError, check, squeeze
from rankflow.formats.peft_fields import ACTS, HARMLESS, READ, unknown
from rankflow.serving.engine import Fate
from rankflow.serving.engines import engine_named, engines
from rankflow.serving.verdicts import Verdict
from tests.cli.test_app import run

LAYER = "base_model.model.model.layers.{}.self_attn.{}_proj"
KOHYA_UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def pair(name: str, ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"), rank: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(len(name))
    return {name + ends[0]: torch.randn(rank, 32, generator=g), name + ends[1]: torch.randn(32, rank, generator=g)}


def folder(
    path: Path,
    rename: Callable[[str], str] = lambda key: key,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT adapter of q, k and v in two layers of the model in `base`."""
    path.mkdir()
    tensors = {k: t for i in range(2) for m in "qkv" for k, t in pair(LAYER.format(i, m)).items()}
    save_file({rename(k): t for k, t in tensors.items()} | dict(more or {}), path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return path


def base(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "vocab_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


def single(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def kohya(*stems: str) -> dict[str, Tensor]:
    ends = (".lora_down.weight", ".lora_up.weight")
    return {k: t for s in stems for k, t in (pair(s, ends) | {f"{s}.alpha": torch.tensor(8.0)}).items()}


def diffusers(*names: str) -> dict[str, Tensor]:
    return {key: t for name in names for key, t in pair(name).items()}


LM_HEAD = pair("base_model.model.lm_head")
ROWS = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
SOURCES: dict[str, Callable[[Path], Path]] = {
    "plain": folder,
    "rsLoRA": lambda p: folder(p, use_rslora=True),
    "patterns": lambda p: folder(p, alpha_pattern={"q_proj": 2}),
    "an adapter's name": lambda p: folder(p, lambda k: k.replace(".weight", ".default.weight")),
    "another adapter's name": lambda p: folder(p, lambda k: k.replace(".weight", ".mine.weight")),
    "compiled": lambda p: folder(p, lambda k: "_orig_mod." + k),
    "FSDP": lambda p: folder(p, lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
    "DDP": lambda p: folder(p, lambda k: "module." + k),
    "bare": lambda p: folder(p, lambda k: k.removeprefix("base_model.model.")),
    "aLoRA": lambda p: folder(p, alora_invocation_tokens=[1, 2]),
    "replicated": lambda p: folder(p, layer_replication=[[0, 1], [0, 1]]),
    "tied": lambda p: folder(p, ensure_weight_tying=True),
    "megatron": lambda p: folder(p, megatron_config={"x": 1}),
    "rows": lambda p: folder(p, more=ROWS, trainable_token_indices=[1, 2]),
    "lm_head": lambda p: folder(p, more=LM_HEAD, target_modules=["q_proj", "k_proj", "v_proj", "lm_head"]),
    "unheard of": lambda p: folder(p, use_quantum=True),
    "kohya": lambda p: single(p, kohya(KOHYA_UNET, KOHYA_TEXT)),
    "kohya of transformers 5": lambda p: single(p, kohya(KOHYA_UNET, KOHYA_TEXT.replace("text_model_", ""))),
    "diffusers": lambda p: single(p, diffusers(UNET, TEXT)),
    "diffusers of transformers 5": lambda p: single(p, diffusers(UNET, TEXT.replace("text_model.", ""))),
    "dora_scale": lambda p: single(p, kohya(KOHYA_UNET) | {f"{KOHYA_UNET}.dora_scale": torch.ones(32, 1)}),
    "magnitudes": lambda p: single(p, diffusers(UNET) | {f"{UNET}.lora_magnitude_vector": torch.ones(32)}),
    "biases of FLUX": lambda p: single(p, kohya(FLUX) | {f"{FLUX}.diff_b": torch.ones(32)}),
    "norms": lambda p: single(p, kohya(FLUX) | {"lora_unet_double_blocks_0_img_attn_norm.diff": torch.ones(32)}),
    "FLUX by its own names": lambda p: single(p, kohya(FLUX)),
    "Wan by its own names": lambda p: single(p, diffusers("diffusion_model.blocks.0.self_attn.q")),
    "names in one word": lambda p: single(p, kohya("lora_unet_layers_0_feed_forward_w1")),
    "norms of a control": lambda p: single(
        p, diffusers("double_blocks.0.img_attn.qkv") | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(8)}
    ),
    "SD3 by its own names": lambda p: single(p, kohya("lora_unet_joint_blocks_0_x_block_attn_qkv")),
    "DiffSynth": lambda p: single(p, pair(UNET, (".lora_A.default.weight", ".lora_B.default.weight"))),
    "a name in a single file": lambda p: single(p, pair(UNET, (".lora_A.mine.weight", ".lora_B.mine.weight"))),
}


def lasting(found: Verdict) -> list[str]:
    """Problems that a squeeze is no remedy of, and of which it is known what comes of them."""
    return [p.does for p in found.problems if not p.remedy.startswith("rankflow") and p.fate is not Fate.UNKNOWN]


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("source", SOURCES)
def test_what_check_says_is_what_squeeze_does(tmp_path: Path, source: str, engine: str):
    src = SOURCES[source](tmp_path / "src")
    given = {"base": base(tmp_path / "base")} if engine == "llamacpp" else {}
    before = check(src, engine, **given)
    out = tmp_path / ("out.gguf" if engine == "llamacpp" else "out")
    if engine_named(engine).writes in ("", "diffusers"):
        out = out.with_suffix(".safetensors")
    try:
        squeeze(src, out, keep=True, engine=engine, **given)
    except RankFlowError:
        assert before.problems
        assert lasting(before) or any("--to-format peft" in p.remedy for p in before.problems)
        assert not out.exists()
        return
    assert not lasting(before), before
    if engine != "llamacpp":  # which is not read again
        after = check(out, engine)
        assert {p.fate for p in after.problems} <= {Fate.UNKNOWN}, after


UNKNOWN, SILENT, REFUSED = Fate.UNKNOWN, Fate.SILENT, Fate.REFUSED


@pytest.mark.parametrize(
    ("source", "fates"),
    [
        ("plain", {}),
        ("bare", {"peft": SILENT, "lorax": SILENT}),
        ("an adapter's name", {"vllm": REFUSED, "tensorrt-llm": REFUSED, "lorax": SILENT, "llamacpp": REFUSED}),
        ("another adapter's name", {"peft": SILENT, "vllm": REFUSED, "llamacpp": REFUSED}),
        ("compiled", {"peft": SILENT, "vllm": SILENT, "sglang": SILENT, "llamacpp": SILENT}),
        ("FSDP", dict.fromkeys(("peft", "vllm", "tensorrt-llm", "llamacpp"), SILENT)),
        ("aLoRA", {"vllm": SILENT, "sglang": SILENT, "lorax": SILENT, "tensorrt-llm": SILENT}),
        ("replicated", {"vllm": SILENT, "sglang": SILENT, "llamacpp": SILENT}),
        ("rows", {"vllm": REFUSED, "llamacpp": REFUSED, "lorax": SILENT}),
        ("tied", {"vllm": UNKNOWN, "llamacpp": SILENT}),
        ("unheard of", {"vllm": UNKNOWN, "peft": UNKNOWN, "llamacpp": UNKNOWN}),
        ("kohya of transformers 5", {"comfyui": SILENT, "diffusers": UNKNOWN}),
        ("diffusers of transformers 5", {"comfyui": SILENT, "diffusers": UNKNOWN}),
        ("dora_scale", {"diffusers": SILENT}),
        ("magnitudes", {"comfyui": SILENT}),
        ("biases of FLUX", {"diffusers": SILENT}),
        ("norms", {"diffusers": SILENT}),
        ("FLUX by its own names", {}),
        ("Wan by its own names", {}),
        ("names in one word", {}),
        ("norms of a control", {}),
        ("SD3 by its own names", {"diffusers": SILENT}),
        ("DiffSynth", {}),
        ("a name in a single file", {"diffusers": SILENT, "comfyui": SILENT}),
        ("kohya", {}),
        ("diffusers", {}),
    ],
)
def test_what_an_engine_makes_of_it(tmp_path: Path, source: str, fates: dict[str, Fate]):
    """For the engines that read the format; those that are not named load it."""
    src = SOURCES[source](tmp_path / "src")
    kinds = {"peft": ("peft", "vllm", "llamacpp"), "": ("diffusers", "comfyui")}
    for engine in {*kinds["peft" if src.is_dir() else ""], *fates}:
        found = check(src, engine).problems
        assert [p.fate for p in found] == ([fates[engine]] if engine in fates else []), engine


def test_tensors_lie_under_names_that_every_engine_of_peft_files_finds(tmp_path: Path):
    wanted = {LAYER.format(i, m) for i in range(2) for m in "qkv"}
    for n, source in enumerate(("compiled", "FSDP", "DDP", "bare", "an adapter's name", "another adapter's name")):
        src = SOURCES[source](tmp_path / f"src{n}")
        for engine in ("vllm", "peft"):
            squeeze(src, tmp_path / f"{engine}{n}", keep=True, engine=engine)
            keys = load_file(tmp_path / f"{engine}{n}" / "adapter_model.safetensors")
            assert set(keys) == {f"{name}.lora_{ab}.weight" for name in wanted for ab in "AB"}


def test_the_remedy_can_be_run_as_it_stands(tmp_path: Path):
    """With a base that was given for its names, which a squeeze does not need, or does."""
    for engine, out in (("vllm", "out"), ("llamacpp", "out.gguf")):
        src = SOURCES["an adapter's name"](tmp_path / engine)
        (problem,) = check(src, engine, base=base(tmp_path / "base")).problems
        run(*problem.remedy.split()[1:], "-o", tmp_path / out)


def test_what_is_said_to_be_an_adapter_is_read_as_one_though_a_whole_model_lies_beside_it(tmp_path: Path):
    src = tmp_path / "src"
    src.mkdir()
    save_file({"down_blocks.0.weight": torch.ones(4, 4)}, src / "diffusion_pytorch_model.safetensors")
    save_file(diffusers(UNET), src / "pytorch_lora_weights.safetensors")
    assert check(src, "diffusers", from_format="diffusers").problems == ()
    assert squeeze(src, tmp_path / "out.safetensors", target_rank=2, from_format="diffusers").ranks == {UNET: 2}
    assert "loads it as it is" in run("check", src, "--engine", "diffusers", "--from-format", "diffusers").stdout
    with pytest.raises(ConfigError, match="a whole model and no adapter"):
        check(src, "diffusers")


# -- settings -------------------------------------------------------------------------------------------------------


def test_every_field_of_pefts_config_has_its_place():
    known = [*READ, *HARMLESS, *ACTS]
    assert len(known) == len(set(known))
    for config in (LoraConfig, AdaLoraConfig):
        assert {f.name for f in dataclasses.fields(config)} <= set(known), "a PEFT of later: say what the field does"
        assert unknown(config(total_step=10).to_dict() if config is AdaLoraConfig else config().to_dict()) == []


@pytest.mark.parametrize("value", [True, 3, "yes", [1], {"a": 1}])
def test_a_field_that_nobody_knows_is_not_passed(tmp_path: Path, value: object):
    src = folder(tmp_path / "src", some_later_field=value, another=None, off=False, empty=[])
    for engine in ("vllm", "sglang", "lorax", "tensorrt-llm", "llamacpp", "peft"):
        (problem,) = check(src, engine).problems
        assert problem.modules == ("some_later_field",)
        assert problem.fate is Fate.UNKNOWN
    done = squeeze(src, tmp_path / "out", keep=True, engine="vllm")
    assert any("some_later_field" in note for note in done.notes)


def test_settings_that_only_say_how_it_was_trained_are_passed(tmp_path: Path):
    said = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "layers_to_transform": [0, 1], "peft_version": "9"}
    said |= {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "inference_mode": True}
    said |= {"megatron_core": "megatron.core", "qalora_group_size": 16}
    for engine in ("vllm", "sglang", "lorax", "tensorrt-llm", "llamacpp", "peft"):
        assert check(folder(tmp_path / engine, **said), engine).problems == ()


def test_the_tokens_from_which_on_an_alora_acts_are_in_gguf(tmp_path: Path):
    src = folder(tmp_path / "src", alora_invocation_tokens=[5, 70_000, 2])
    squeeze(src, tmp_path / "a.gguf", keep=True, engine="llamacpp", base=base(tmp_path / "base"))
    field = GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert [int(field.parts[i][0]) for i in field.data] == [5, 70_000, 2]
    assert [t.name for t in field.types] == ["ARRAY", "UINT32"]
    squeeze(folder(tmp_path / "plain"), tmp_path / "b.gguf", keep=True, engine="llamacpp", base=tmp_path / "base")
    assert "adapter.alora.invocation_tokens" not in GGUFReader(tmp_path / "b.gguf").fields
    bad = folder(tmp_path / "bad", alora_invocation_tokens=[-1])
    with pytest.raises(ConfigError, match="list of token numbers"):
        squeeze(bad, tmp_path / "c.gguf", keep=True, engine="llamacpp", base=tmp_path / "base")


@pytest.mark.parametrize("to", ["kohya", "diffusers", "gguf"])
def test_a_format_without_a_place_for_a_setting_is_not_written(tmp_path: Path, to: str):
    (tmp_path / "src").mkdir()
    tensors = pair("base_model.model.text_model.encoder.layers.0.self_attn.q_proj")
    save_file(tensors, tmp_path / "src" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for setting in ({"layer_replication": [[0, 1]]}, {"ensure_weight_tying": True}, {"megatron_config": {"a": 1}}):
        (tmp_path / "src" / "adapter_config.json").write_text(json.dumps(fields | setting))
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} is set"):
            squeeze(tmp_path / "src", tmp_path / f"x.{to}", keep=True, to_format=to, base=base(tmp_path / "base"))
    if to != "gguf":
        (tmp_path / "src" / "adapter_config.json").write_text(json.dumps(fields | {"some_later_field": 1}))
        done = squeeze(tmp_path / "src", tmp_path / "x.safetensors", keep=True, to_format=to)
        assert any("some_later_field" in note for note in done.notes)


def test_rslora_of_experts_is_not_heeded_by_vllm(tmp_path: Path):
    names = [f"base_model.model.model.layers.0.mlp.{m}.up_proj" for m in ("experts.0", "experts.1", "shared_expert")]
    (tmp_path / "src").mkdir()
    save_file(diffusers(*names), tmp_path / "src" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"], "use_rslora": True}
    (tmp_path / "src" / "adapter_config.json").write_text(json.dumps(fields))
    (problem,) = check(tmp_path / "src", "vllm").problems
    assert problem.what == "use_rslora"
    assert problem.fate is Fate.SILENT
    assert problem.modules == tuple(name.removeprefix("base_model.model.") for name in names[:2])
    squeeze(tmp_path / "src", tmp_path / "out", keep=True, engine="vllm")
    assert check(tmp_path / "out", "vllm").problems == ()


def test_pages_of_sglang(tmp_path: Path):
    assert "in pages of 8 ranks it takes 16" in engine_named("sglang").hint(12)
    assert "pages" not in engine_named("sglang").hint(16) + engine_named("vllm").hint(12)


# -- names that formats have and libraries change -------------------------------------------------------------------

CLIP = "encoder.layers.0.self_attn.out_proj"
T5 = "encoder.block.1.layer.0.SelfAttention.q"
FLAT = "text_model_encoder_layers_0_self_attn_out_proj"
FLUX_DIFFUSERS = "transformer.single_transformer_blocks.0.attn.to_q"
OUT = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out"


@pytest.mark.parametrize(
    "names",
    [
        {UNET: KOHYA_UNET, f"text_encoder.{CLIP}": f"lora_te_{FLAT}"},
        {f"text_encoder.{CLIP}": f"lora_te1_{FLAT}", f"text_encoder_2.text_model.{CLIP}": f"lora_te2_{FLAT}"},
        {
            FLUX_DIFFUSERS: f"lora_{FLUX_DIFFUSERS.replace('.', '_')}",
            f"text_encoder.{CLIP}": f"lora_te1_{FLAT}",
            f"text_encoder_2.{T5}": f"lora_te3_{T5.replace('.', '_')}",
        },
        {  # Stable Diffusion 3
            f"text_encoder_2.text_model.{CLIP}": f"lora_te2_{FLAT}",
            f"text_encoder_3.{T5}": f"lora_te3_{T5.replace('.', '_')}",
        },
        {OUT: f"lora_{OUT.replace('.', '_')}_0"},
    ],
)
def test_names_follow_the_format_whatever_wrote_the_source(tmp_path: Path, names: dict[str, str]):
    src = single(tmp_path / "src", diffusers(*names))
    squeeze(src, tmp_path / "k.safetensors", keep=True, to_format="kohya")
    written = {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")}
    assert written == set(names.values())
    # And back: the names that both libraries and ComfyUI have always had
    squeeze(tmp_path / "k.safetensors", tmp_path / "d.safetensors", keep=True, to_format="diffusers")
    back = {key.partition(".lora_")[0] for key in load_file(tmp_path / "d.safetensors")}
    told = {name.replace("text_encoder.encoder", "text_encoder.text_model.encoder") for name in names}
    assert back == {f"{name}.0" if name.endswith("to_out") else name for name in told}


def test_a_text_encoder_by_itself_as_transformers_5_has_it(tmp_path: Path):
    (tmp_path / "src").mkdir()
    save_file(pair(f"base_model.model.{CLIP}"), tmp_path / "src" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["out_proj"]}
    (tmp_path / "src" / "adapter_config.json").write_text(json.dumps(fields))
    squeeze(tmp_path / "src", tmp_path / "k.safetensors", keep=True, to_format="kohya")
    assert "lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha" in load_file(tmp_path / "k.safetensors")


def test_a_file_of_dead_names_is_read_and_written_with_those_that_live(tmp_path: Path):
    """Whatever is done with it: a squeeze without an engine, or for one; diffusers' own files keep what their library
    wrote, but for ComfyUI."""
    src = SOURCES["kohya of transformers 5"](tmp_path / "src")
    done = squeeze(src, tmp_path / "k.safetensors", target_rank=2)
    assert {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")} == {KOHYA_UNET, KOHYA_TEXT}
    assert any(KOHYA_TEXT in note for note in done.notes)
    src = SOURCES["diffusers of transformers 5"](tmp_path / "d")
    for engine, inner in (("comfyui", "text_model.encoder"), ("diffusers", "encoder")):
        squeeze(src, tmp_path / f"{engine}.safetensors", keep=True, engine=engine)
        names = {key.partition(".lora_")[0] for key in load_file(tmp_path / f"{engine}.safetensors")}
        assert names == {UNET, f"text_encoder.{inner}.layers.0.self_attn.q_proj"}
