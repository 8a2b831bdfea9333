"""The same update in another format: every pair that can be, by each engine's own rule; the rest refused by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from rankflow import AdapterError, ConfigError, squeeze
from rankflow.cli.app import app
from rankflow.formats.open import open_adapter
from rankflow.formats.single_file import kohya as naming
from tests.formats.single_file.test_single_file import (
    TEXT,
    UNET,
    Factors,
    assert_cut,
    comfy,
    delta,
    diffusers_config,
    drawn,
    header,
    kohya,
    published_hashes,
    sd_scripts,
    styled,
)

PARTS = {"unet": ("unet.", "lora_unet_", UNET), "text_encoder": ("text_encoder.", "lora_te_", TEXT)}


class Tree(nn.Module):
    """A model with layers of these names and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, (n_in, n_out, *kernel) in shapes.items():
            *path, last = name.split(".")
            at: nn.Module = self
            for part in path:
                if part not in dict(at.named_children()):
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, nn.Conv2d(n_in, n_out, tuple(kernel)) if kernel else nn.Linear(n_in, n_out))


def write(kind: str, folder: Path, part: str, factors: Factors) -> Path:
    dotted, flat, shapes = PARTS[part]
    if kind == "kohya":
        save_file(kohya(factors, flat), folder / "x.safetensors", {"ss_network_dim": "6", "ss_base_model": "sd"})
        return folder / "x.safetensors"
    if kind == "diffusers":
        tensors = styled(factors, dotted, ".lora_A.weight", ".lora_B.weight", alpha=True)
        save_file(tensors, folder / "x.safetensors")
        return folder / "x.safetensors"
    model = get_peft_model(Tree(shapes), LoraConfig(r=6, lora_alpha=2, use_rslora=True, target_modules=list(shapes)))
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    for name, (down, up, scale) in factors.items():
        root = next(iter(model.base_model.model.get_submodule(name).scaling.values()))
        state[f"base_model.model.{name}.lora_A.default.weight"] = down
        state[f"base_model.model.{name}.lora_B.default.weight"] = up * (scale / root)
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder / "x")
    return folder / "x"


def read(kind: str, path: Path, part: str) -> dict[str, Tensor]:
    """Module -> DeltaW by the rule of what loads that format."""
    dotted, flat, shapes = PARTS[part]
    if kind == "peft":
        model = PeftModel.from_pretrained(Tree(shapes), str(path)).double()
        layers = ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if hasattr(m, "lora_A"))
        return {name: layer.get_delta_weight("default").detach().flatten(1) for name, layer in layers}
    tensors = load_file(path)
    if kind == "kohya":
        found = sd_scripts(tensors)
        assert all(torch.allclose(d, comfy(tensors, stem), rtol=1e-6) for stem, d in found.items())
        return {name: found[flat + name.replace(".", "_")] for name in shapes if flat + name.replace(".", "_") in found}
    scales = diffusers_config(path, dotted)
    return {
        n: s
        * tensors[f"{dotted}{n}.lora_B.weight"].double().flatten(1)
        @ tensors[f"{dotted}{n}.lora_A.weight"].double().flatten(1)
        for n, s in scales.items()
    }


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("source", "to"), list(itertools.product(("peft", "kohya", "diffusers"), repeat=2)))
def test_every_pair_keeps_the_update(tmp_path: Path, source: str, to: str, part: str):
    factors = drawn(PARTS[part][2], scale=0.7, seed=3)
    list(factors.values())[-1][1][:, 1:] *= 0.01
    path = write(source, tmp_path, part, factors)
    wanted = {name: delta(*f) for name, f in factors.items()}
    whole, cut = (tmp_path / (name if to == "peft" else f"{name}.safetensors") for name in ("whole", "cut"))
    squeeze(path, whole, target_rank=6, to_format=to)
    found = read(to, whole, part)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert open_adapter(whole).kind == to
    report = squeeze(path, cut, error=0.05, across=True, to_format=to)
    found, ranks = read(to, cut, part), list(report.ranks.values())
    assert len(set(ranks)) > 1
    for (name, delta_w), rank in zip(sorted(found.items()), _by_name(report.ranks, wanted), strict=True):
        assert_cut(wanted[name], delta_w, rank)


def _by_name(ranks: dict[str, int], names: dict[str, Tensor]) -> list[int]:
    """Ranks in the order of plain names, whatever the format calls its modules."""
    return [
        next(r for n, r in ranks.items() if n.replace(".", "_").endswith(name.replace(".", "_")))
        for name in sorted(names)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_to_rounding(tmp_path: Path, dtype: torch.dtype):
    factors = drawn(UNET, scale=0.7)
    save_file(kohya(factors, dtype=dtype), tmp_path / "x.safetensors")
    before = sd_scripts(load_file(tmp_path / "x.safetensors"))
    squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=6, to_format="diffusers")
    tensors = load_file(tmp_path / "out.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    for name, after in read("diffusers", tmp_path / "out.safetensors", "unet").items():
        was = before["lora_unet_" + name.replace(".", "_")]
        assert (after - was).norm() <= torch.finfo(dtype).eps * was.norm()


def test_a_scale_that_does_not_fit_is_an_error_and_no_output(tmp_path: Path):
    factors = drawn({"mid_block.attentions.0.proj_in": (8, 8)}, rank=2, scale=1e6)
    tensors = {k: t.half() if t.ndim else t for k, t in kohya(factors).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="do not fit"):
        squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=2, to_format="diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_headers_of_a_conversion(tmp_path: Path):
    path = write("kohya", tmp_path, "unet", drawn(UNET, scale=0.7))
    squeeze(path, tmp_path / "d.safetensors", target_rank=2, to_format="diffusers")
    assert header(tmp_path / "d.safetensors") == {"format": "pt", "ss_network_dim": "6", "ss_base_model": "sd"}
    squeeze(tmp_path / "d.safetensors", tmp_path / "k.safetensors", target_rank=1, to_format="kohya")
    new = header(tmp_path / "k.safetensors")
    assert (new["sshs_model_hash"], new["sshs_legacy_hash"]) == published_hashes(tmp_path / "k.safetensors")
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("1", "1.0")
    for to, size in (("kohya", 6000), ("diffusers", 7000), ("peft", 5000)):
        out = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        squeeze(path, out, size=size, to_format=to)
        assert (out / "adapter_model.safetensors" if to == "peft" else out).stat().st_size <= size


def test_default_names_of_conversions(tmp_path: Path):
    path = write("kohya", tmp_path, "unet", drawn(UNET))
    assert squeeze(path, target_rank=2, to_format="peft").out == str(tmp_path / "x-r2")
    again = write("peft", tmp_path, "unet", drawn(UNET))
    assert squeeze(again, energy=0.9, to_format="kohya").out == str(tmp_path / "x-e0.9.safetensors")
    config = json.loads((tmp_path / "x-r2" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert sorted(config["target_modules"]) == sorted(UNET)


def test_comfyui_names_become_kohyas_and_peft(tmp_path: Path):
    shapes = {"double_blocks.0.img_attn.qkv": (8, 24), "single_blocks.11.linear1": (8, 16)}
    factors = drawn(shapes, scale=0.7)
    save_file(
        styled(factors, "diffusion_model.", ".lora_down.weight", ".lora_up.weight", True), tmp_path / "x.safetensors"
    )
    squeeze(tmp_path / "x.safetensors", tmp_path / "k.safetensors", target_rank=6, to_format="kohya")
    found = sd_scripts(load_file(tmp_path / "k.safetensors"))
    for name, f in factors.items():
        torch.testing.assert_close(found["lora_unet_" + name.replace(".", "_")], delta(*f), rtol=1e-5, atol=1e-6)
    squeeze(tmp_path / "k.safetensors", tmp_path / "p", target_rank=6, to_format="peft")
    assert set(open_adapter(tmp_path / "p").layout) == set(shapes)
    for source in ("x", "k"):
        with pytest.raises(ConfigError, match="original checkpoint"):
            squeeze(
                tmp_path / f"{source}.safetensors", tmp_path / "d.safetensors", target_rank=2, to_format="diffusers"
            )


def test_two_text_encoders_are_numbered(tmp_path: Path):
    tensors = styled(drawn(TEXT), "text_encoder.", ".lora_A.weight", ".lora_B.weight")
    tensors |= styled(drawn(TEXT), "text_encoder_2.", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "x.safetensors")
    squeeze(tmp_path / "x.safetensors", tmp_path / "k.safetensors", target_rank=2, to_format="kohya")
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")}
    assert {stem.partition("_text_model")[0] for stem in stems} == {"lora_te1", "lora_te2"}
    squeeze(tmp_path / "k.safetensors", tmp_path / "d.safetensors", target_rank=2, to_format="diffusers")
    assert load_file(tmp_path / "d.safetensors").keys() == tensors.keys()
    with pytest.raises(ConfigError, match="a PEFT adapter is of one model"):
        squeeze(tmp_path / "k.safetensors", tmp_path / "p", target_rank=2, to_format="peft")


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "unet.mid_block.attentions.0.proj_in",
        "unet.up_blocks.3.resnets.2.time_emb_proj",
        "unet.down_blocks.2.downsamplers.0.conv",
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        "transformer.single_transformer_blocks.37.proj_mlp",
        "unet.time_embedding.linear_1",
        "transformer.transformer_blocks.0.ff_context.net.0.proj",
        "transformer.transformer_blocks.0.norm1_context.linear",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "diffusion_model.output_blocks.5.0.emb_layers.1",
        "diffusion_model.double_blocks.18.txt_mlp.0",
        "diffusion_model.single_blocks.3.modulation.lin",
    ],
)
def test_kohya_names_go_there_and_back(name: str):
    assert naming.from_kohya(naming.to_kohya(name, [name])) == name


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ("lora_unet_my_own_layer", "parts that are not known"),
        ("lora_unet_down_blocks_0_proj_in_secret", "parts that are not known"),
        ("lora_llama_layers_0_q_proj", "of what model"),
        ("lora_unet_", "parts that are not known"),
    ],
)
def test_kohya_names_that_cannot_be_read_are_refused(stem: str, message: str):
    with pytest.raises(ConfigError, match=message):
        naming.from_kohya(stem)


def test_a_name_that_reads_in_two_ways_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(naming, "_TOKENS", naming._TOKENS | {("mid",), ("block",)})
    with pytest.raises(ConfigError, match="more than one way"):
        naming.from_kohya("lora_unet_mid_block_proj_in")


def test_what_another_format_cannot_hold_is_refused(tmp_path: Path):
    source = write("kohya", tmp_path, "unet", drawn(UNET))
    tensors = load_file(source)
    save_file(tensors | {"lora_unet_x.diff_b": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ConfigError, match="would lose"):
        squeeze(tmp_path / "more.safetensors", tmp_path / "d.safetensors", target_rank=2, to_format="diffusers")
    with pytest.raises(ConfigError, match="'onnx' cannot be written"):
        squeeze(source, tmp_path / "d.safetensors", target_rank=2, to_format="onnx")
    for targets, message in ((["emb"], "embedding"), (["q"], "do not tell what part")):
        folder = tmp_path / targets[0]
        model = nn.Module()
        model.emb, model.q = nn.Embedding(9, 8), nn.Linear(8, 8)
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(
            folder, save_embedding_layers=False
        )
        with pytest.raises(ConfigError, match=message):
            squeeze(folder, tmp_path / "d.safetensors", target_rank=1, to_format="kohya")
    tensors = styled(drawn({"a.b": (8, 8), "a_b": (8, 8)}, scale=1.0), "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "clash.safetensors")
    with pytest.raises(ConfigError, match="two modules would both be called"):
        squeeze(tmp_path / "clash.safetensors", tmp_path / "d.safetensors", target_rank=2, to_format="kohya")
    assert not (tmp_path / "d.safetensors").exists()


def test_on_the_command_line(tmp_path: Path):
    write("kohya", tmp_path, "unet", drawn(UNET))
    command = ["squeeze", str(tmp_path / "x.safetensors"), "--ranks", "1,2", "-o", str(tmp_path / "y.safetensors")]
    done = CliRunner().invoke(app, [*command, "--from-format", "kohya", "--to-format", "diffusers"])
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "y-r1.safetensors", "y-r2.safetensors"}
    done = CliRunner().invoke(app, [*command, "--from-format", "peft"])
    assert done.exit_code == 2
    assert "adapter_config.json" in done.stderr
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match="GGUF"):
        open_adapter(tmp_path / "x.gguf")
