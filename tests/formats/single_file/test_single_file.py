"""Adapters in one file: kohya, LyCORIS LoCon, ComfyUI and diffusers read, squeezed and written by their own rules.

Files are made here by a few lines of each style, and read back by each engine's rule written out again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import AdapterError, ConfigError, inspect, squeeze
from rankflow.analysis.difference import diff
from rankflow.formats.open import open_adapter

Factors = dict[str, tuple[Tensor, Tensor, float]]  # dotted name -> down, up as a layer has them, scale

UNET = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (16, 12),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (12, 16),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (12, 40),
    "up_blocks.1.resnets.2.conv1": (6, 12, 3, 3),
    "up_blocks.1.resnets.2.time_emb_proj": (20, 12),
}
TEXT = {"text_model.encoder.layers.3.self_attn.q_proj": (12, 12), "text_model.encoder.layers.3.mlp.fc1": (12, 24)}


def drawn(shapes: dict[str, tuple[int, ...]], rank: int = 6, scale: float = 0.5, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, (n_in, n_out, *kernel) in shapes.items():
        down = torch.randn(rank, n_in, *kernel, generator=g)
        up = torch.randn(n_out, rank, *[1] * len(kernel), generator=g)
        out[name] = down, up * torch.logspace(0, -2, rank).reshape(1, -1, *[1] * len(kernel)), scale
    return out


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    return scale * up.double().flatten(1) @ down.double().flatten(1)


def kohya(factors: Factors, prefix: str = "lora_unet_", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, scale) in factors.items():
        stem = prefix + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down.to(dtype), up.to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(scale * down.shape[0], dtype=dtype)
    return tensors


def styled(factors: Factors, prefix: str, a: str, b: str, alpha: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, scale) in factors.items():
        tensors[prefix + name + a], tensors[prefix + name + b] = down, up
        if alpha:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(scale * down.shape[0])
    return tensors


# -- the engines' rules, once more -----------------------------------------------------------------------------------


def comfy(tensors: dict[str, Tensor], x: str) -> Tensor | None:
    """ComfyUI's `LoRAAdapter.load` and `calculate_weight` for the key x."""
    pairs = [
        (f"{x}.lora_up.weight", f"{x}.lora_down.weight"),
        (f"{x}_lora.up.weight", f"{x}_lora.down.weight"),
        (f"{x}.lora_B.weight", f"{x}.lora_A.weight"),
        (f"{x}.lora.up.weight", f"{x}.lora.down.weight"),
        (f"{x}.lora_B", f"{x}.lora_A"),
        (f"{x}.lora_linear_layer.up.weight", f"{x}.lora_linear_layer.down.weight"),
        (f"{x}.lora_B.default.weight", f"{x}.lora_A.default.weight"),
    ]
    found = next(((up, down) for up, down in pairs if up in tensors), None)
    if found is None:
        return None
    up, down = (tensors[key].double() for key in found)
    scale = tensors[f"{x}.alpha"].item() / down.shape[0] if f"{x}.alpha" in tensors else 1.0
    if (mid := tensors.get(f"{x}.lora_mid.weight")) is not None:
        return scale * torch.einsum("oi,ijkl,jc->ockl", up.flatten(1), mid.double(), down.flatten(1)).flatten(1)
    return scale * up.flatten(1) @ down.flatten(1)


def sd_scripts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """sd-scripts' `create_network_from_weights`: dim from down, alpha that of the file or else dim; 0 means dim."""
    out = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            dim = down.shape[0]
            alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(0.0))) or dim
            out[stem] = alpha / dim * tensors[f"{stem}.lora_up.weight"].double().flatten(1) @ down.double().flatten(1)
    return out


def diffusers_config(path: Path, component: str) -> dict[str, float]:
    """Module -> scale, by diffusers' `_create_lora_config` and PEFT's LoraConfig, for keys in PEFT's spelling."""
    with safe_open(path, "pt") as file:
        raw = (file.metadata() or {}).get("lora_adapter_metadata")
    tensors = load_file(path)
    inside = {k.removeprefix(component): t for k, t in tensors.items() if k.startswith(component)}
    ranks = {k.removesuffix(".lora_B.weight"): t.shape[1] for k, t in inside.items() if k.endswith(".lora_B.weight")}
    alphas = {k.removesuffix(".alpha"): float(t) for k, t in inside.items() if k.endswith(".alpha")}
    if raw is None:
        if not alphas:
            assert len(set(ranks.values())) == 1, "diffusers before 14409 would take one alpha for all"
        return {name: alphas.get(name, rank) / rank for name, rank in ranks.items()}
    assert not alphas, "diffusers refuses both"
    config = {k.removeprefix(component): v for k, v in json.loads(raw).items() if k.startswith(component)}

    def pattern(field: str, name: str, default: float) -> float:
        hits = [v for p, v in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({p})$", name)]
        return hits[0] if hits else default

    for name, rank in ranks.items():
        assert pattern("rank_pattern", name, config["r"]) == rank
    return {name: pattern("alpha_pattern", name, config["lora_alpha"]) / rank for name, rank in ranks.items()}


def published_hashes(path: Path) -> tuple[str, str]:
    """sd-scripts' `precalculate_safetensors_hashes` on a file's tensors and metadata."""
    with safe_open(path, "pt") as file:
        training = {k: v for k, v in file.metadata().items() if k.startswith("ss_")}
    whole = safetensors.torch.save(load_file(path), training)
    stream = io.BytesIO(whole)
    stream.seek(int.from_bytes(stream.read(8), "little") + 8)
    model = hashlib.sha256(stream.read()).hexdigest()
    stream.seek(0x100000)
    return model, hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def assert_cut(wanted: Tensor, found: Tensor, rank: int, rtol: float = 1e-5) -> None:
    """`found` is the best of its rank."""
    sigma = torch.linalg.svdvals(wanted)
    assert torch.linalg.matrix_norm(wanted - found) <= sigma[rank:].square().sum().sqrt() + rtol * sigma[0]
    assert torch.linalg.matrix_rank(found, rtol=1e-5) <= rank


# -- every style, read and written back ------------------------------------------------------------------------------

SPELLINGS = {
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", True),
    "kohya without alpha": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", False),
    "lycoris": ("lycoris_", ".lora_down.weight", ".lora_up.weight", True),
    "comfyui": ("diffusion_model.", ".lora_up.weight", ".lora_down.weight", True),
    "comfyui AB": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", True),
    "comfyui bare": ("diffusion_model.", ".lora_A", ".lora_B", False),
    "comfyui default": ("diffusion_model.", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "text encoders": ("text_encoders.clip_l.transformer.", ".lora_A.weight", ".lora_B.weight", True),
    "diffusers": ("unet.", ".lora_A.weight", ".lora_B.weight", False),
    "diffusers alpha": ("transformer.", ".lora_A.weight", ".lora_B.weight", True),
    "diffusers lora.down": ("unet.", ".lora.down.weight", ".lora.up.weight", True),
    "diffusers linear_layer": (
        "text_encoder.",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        False,
    ),
}


@pytest.mark.parametrize("style", SPELLINGS)
@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.99}, {"max_params": 400}], ids=str)
def test_every_spelling_keeps_its_convention_and_the_update(tmp_path: Path, style: str, target: dict):
    prefix, a, b, alpha = SPELLINGS[style]
    if style == "comfyui":
        a, b = b, a
    factors = drawn(UNET, scale=0.5 if alpha else 1.0)
    if "." not in prefix:
        factors = {name.replace(".", "_"): f for name, f in factors.items()}
    tensors = styled(factors, prefix, a, b, alpha)
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "modelspec.title": "mine ü"})
    before = (tmp_path / "x.safetensors").read_bytes()
    report = squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", **target)
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert open_adapter(tmp_path / "x.safetensors").kind == style.split()[0].replace("text", "comfyui").replace(
        "lycoris", "kohya"
    )
    new = load_file(tmp_path / "out.safetensors")
    assert new.keys() <= tensors.keys()
    assert header(tmp_path / "out.safetensors")["modelspec.title"] == "mine ü"
    for name, f in factors.items():
        rank = report.ranks[prefix + name]
        found = comfy(new, prefix + name)
        assert (found is None) == (rank == 0)
        if found is not None:
            assert new[prefix + name + a].shape == (rank, *f[0].shape[1:])
            assert new[prefix + name + b].shape == (f[1].shape[0], rank, *f[1].shape[2:])
            assert_cut(delta(*f), found, rank)
    assert inspect(tmp_path / "out.safetensors").params == report.params_after


def test_the_oldest_diffusers_spelling_is_called_as_todays_are(tmp_path: Path):
    q, out = (drawn({"x": (8, 8)}, rank=4, scale=1.0, seed=i)["x"] for i in range(2))
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    for prefix in ("", "unet."):
        tensors = {
            f"{prefix}{attention}.to_q_lora.down.weight": q[0],
            f"{prefix}{attention}.to_q_lora.up.weight": q[1],
            f"{prefix}{attention}.to_out_lora.down.weight": out[0],
            f"{prefix}{attention}.to_out_lora.up.weight": out[1],
        }
        path = tmp_path / f"old{len(prefix)}.safetensors"
        save_file(tensors, path)
        layer = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        assert set(open_adapter(path).layout) == {f"{layer}.to_q", f"{layer}.to_out.0"}
        squeeze(path, tmp_path / "old-r2.safetensors", target_rank=2, force=True)
        assert load_file(tmp_path / "old-r2.safetensors").keys() == tensors.keys()
    save_file(
        {
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": q[0],
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": q[1],
        },
        tmp_path / "te.safetensors",
    )
    assert list(open_adapter(tmp_path / "te.safetensors").layout) == [
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    ]


def test_locon_tucker_folds_into_plain_factors(tmp_path: Path):
    g = torch.Generator().manual_seed(1)
    stem = "lora_unet_up_blocks_1_resnets_2_conv1"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(4, 6, 1, 1, generator=g),
        f"{stem}.lora_mid.weight": torch.randn(4, 4, 3, 2, generator=g),
        f"{stem}.lora_up.weight": torch.randn(10, 4, 1, 1, generator=g),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = comfy(tensors, stem)
    # As the three layers compute it, one after the other
    x = torch.randn(2, 6, 7, 7, generator=g)
    conv = torch.nn.functional.conv2d
    down, mid, up = (tensors[f"{stem}.lora_{part}.weight"] for part in ("down", "mid", "up"))
    chained = conv(conv(conv(x, down), mid), up) * 0.5
    for rank in (2, 4):
        squeeze(tmp_path / "x.safetensors", tmp_path / f"{rank}.safetensors", target_rank=rank)
        new = load_file(tmp_path / f"{rank}.safetensors")
        assert f"{stem}.lora_mid.weight" not in new
        assert new[f"{stem}.lora_down.weight"].shape == (rank, 6, 3, 2)
        assert_cut(wanted, comfy(new, stem), rank)
    plain = conv(conv(x, new[f"{stem}.lora_down.weight"]), new[f"{stem}.lora_up.weight"]) * 0.5
    torch.testing.assert_close(plain, chained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0, 0.7])
def test_alpha_keeps_the_scale_exactly_where_a_number_can(tmp_path: Path, dtype: torch.dtype, alpha: float):
    factors = drawn(UNET, rank=6, scale=alpha / 6)
    tensors = kohya(factors, dtype=dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    for rank in (1, 2, 5):
        squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=rank, force=True)
        new = load_file(tmp_path / "out.safetensors")
        for key in (k for k in new if k.endswith(".alpha")):
            was = float(tensors[key]) / 6
            assert float(new[key]) / rank == pytest.approx(was, rel=2**-24)
            if float(torch.tensor(was * rank, dtype=dtype)) == was * rank:
                assert new[key].dtype == dtype
                assert float(new[key]) / rank == pytest.approx(was, rel=1e-15)


def test_sd_scripts_reads_the_same_update(tmp_path: Path):
    factors = drawn(UNET, scale=0.75)
    save_file(kohya(factors), tmp_path / "x.safetensors")
    report = squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", energy=0.95)
    found = sd_scripts(load_file(tmp_path / "out.safetensors"))
    assert len(set(report.ranks.values())) > 1
    for name, f in factors.items():
        stem = "lora_unet_" + name.replace(".", "_")
        assert_cut(delta(*f), found[stem], report.ranks[stem])


# -- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_kohya_hashes_follow_the_published_rule(tmp_path: Path, big: bool):
    width = 200_000 if big else 16  # the second hash looks 1 MiB into the file
    tensors = kohya(drawn({"mid_block.attentions.0.proj_in": (width, 24), "b": (8, width)}, rank=8))
    tensors["lora_unet_b.alpha"] = torch.tensor(4, dtype=torch.int64)
    tensors["lora_unet_b.diff_b"] = torch.ones(width, dtype=torch.float16)
    tensors["a.diff_b"] = torch.ones(width, dtype=torch.bfloat16)
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_training_comment": "für \u3042",
        "x": 'y\n"\\\x01',
    }
    save_file(tensors, tmp_path / "x.safetensors", {**metadata, "sshs_model_hash": "old", "sshs_legacy_hash": "old"})
    squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=2)
    new = header(tmp_path / "out.safetensors")
    assert (new["sshs_model_hash"], new["sshs_legacy_hash"]) == published_hashes(tmp_path / "out.safetensors")
    empty = hashlib.sha256(b"").hexdigest()[:8]
    assert (new["sshs_legacy_hash"] == empty) == (not big)
    assert new["ss_network_dim"] == "2"
    assert new["ss_network_alpha"] == "1.0"
    assert new["ss_training_comment"] == "dimension is resized from 8 to 2; für \u3042"
    assert new["x"] == metadata["x"]


def test_the_file_is_laid_out_as_the_reference_writer_does(tmp_path: Path):
    tensors = kohya(drawn(UNET))
    tensors["z"], tensors["a"] = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)
    tensors["m"], tensors["i"] = torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int32)
    tensors["b"], tensors["u"] = torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.uint8)
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=6)
    ours, theirs = (p.read_bytes() for p in (tmp_path / "out.safetensors", tmp_path / "x.safetensors"))
    body = [raw[8 + int.from_bytes(raw[:8], "little") :] for raw in (ours, theirs)]
    assert body[0] == body[1]


def test_mixed_ranks_are_called_dynamic_and_convolutions_do_not_count(tmp_path: Path):
    meta = {"ss_network_dim": "6", "ss_network_alpha": "3.0", "ss_network_module": "networks.lora"}
    save_file(kohya(drawn(UNET)), tmp_path / "x.safetensors", meta)
    squeeze(tmp_path / "x.safetensors", tmp_path / "mixed.safetensors", energy=0.95)
    new = header(tmp_path / "mixed.safetensors")
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert new["ss_training_comment"].startswith("dimension is resized from 6 to Dynamic; ")
    small = kohya(drawn({"up_blocks.1.resnets.2.conv1": (6, 12, 3, 3)}, rank=1) | drawn(TEXT, rank=6))
    save_file(small, tmp_path / "conv.safetensors", meta)
    squeeze(tmp_path / "conv.safetensors", tmp_path / "out.safetensors", target_rank=2)
    assert header(tmp_path / "out.safetensors")["ss_network_dim"] == "2"
    squeeze(tmp_path / "x.safetensors", tmp_path / "same.safetensors", target_rank=6)
    same = header(tmp_path / "same.safetensors")
    assert {k: v for k, v in same.items() if k.startswith("ss_")} == meta
    save_file(kohya(drawn(UNET)), tmp_path / "bare.safetensors")
    squeeze(tmp_path / "bare.safetensors", tmp_path / "out2.safetensors", target_rank=2)
    assert set(header(tmp_path / "out2.safetensors")) == {"sshs_model_hash", "sshs_legacy_hash"}


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_header_config_says_ranks_and_scales(tmp_path: Path, rslora: bool):
    unet, text = drawn(UNET), drawn(TEXT, seed=1)
    config = {
        "unet.r": 6, "unet.lora_alpha": 9, "unet.use_rslora": rslora, "unet.rank_pattern": None,
        "unet.alpha_pattern": {"time_emb_proj": 3}, "text_encoder.r": 6, "text_encoder.lora_alpha": 6,
        "unet.target_modules": sorted(UNET), "unet.future": [1],
    }  # fmt: skip
    tensors = styled(unet, "unet.", ".lora_A.weight", ".lora_B.weight")
    tensors |= styled(text, "text_encoder.", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    root = math.sqrt(6) if rslora else 6
    scales = {name: (3 if "time_emb" in name else 9) / root for name in UNET} | dict.fromkeys(TEXT, 1.0)
    report = squeeze(tmp_path, tmp_path / "out.safetensors", energy=0.9)
    new, packed = (
        load_file(tmp_path / "out.safetensors"),
        json.loads(header(tmp_path / "out.safetensors")["lora_adapter_metadata"]),
    )
    assert packed["unet.future"] == [1]
    found = diffusers_config(tmp_path / "out.safetensors", "text_encoder.")
    assert found == dict.fromkeys(TEXT, 1.0)
    assert packed["unet.use_rslora"] is rslora
    if not rslora:
        found = diffusers_config(tmp_path / "out.safetensors", "unet.")
        assert found == {n: pytest.approx(scales[n], rel=1e-12) for n in UNET}
    again = open_adapter(tmp_path / "out.safetensors")
    for name, (down, up, _) in (unet | text).items():
        full = ("unet." if name in UNET else "text_encoder.") + name
        assert again.layout[full].scaling == pytest.approx(scales[name], rel=1e-12)
        b, a = new[f"{full}.lora_B.weight"], new[f"{full}.lora_A.weight"]
        assert_cut(delta(down, up, scales[name]), delta(a, b, scales[name]), report.ranks[full])


def test_every_component_is_told_of_once_one_is(tmp_path: Path):
    tensors = styled(drawn(UNET), "unet.", ".lora_A.weight", ".lora_B.weight")
    tensors |= styled(drawn(TEXT), "text_encoder.", ".lora_A.weight", ".lora_B.weight")
    config = {"unet.r": 6, "unet.lora_alpha": 9, "unet.target_modules": sorted(UNET)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=2)
    assert diffusers_config(tmp_path / "out.safetensors", "text_encoder.") == dict.fromkeys(TEXT, 1.0)
    assert diffusers_config(tmp_path / "out.safetensors", "unet.") == dict.fromkeys(UNET, 1.5)


def test_diffusers_ranks_that_come_to_differ_are_written_into_the_header(tmp_path: Path):
    factors = drawn(UNET, scale=1.0)
    save_file(styled(factors, "unet.", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    squeeze(tmp_path / "x.safetensors", tmp_path / "even.safetensors", target_rank=2)
    assert "lora_adapter_metadata" not in header(tmp_path / "even.safetensors")
    factors["up_blocks.1.resnets.2.conv1"][1].zero_()
    save_file(styled(factors, "unet.", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    report = squeeze(tmp_path / "x.safetensors", tmp_path / "mixed.safetensors", max_params=330)
    assert len(set(report.ranks.values()) | {0}) > 2
    assert 0 in report.ranks.values()
    scales = diffusers_config(tmp_path / "mixed.safetensors", "unet.")
    assert scales == dict.fromkeys(scales, 1.0)
    assert set(scales) == {n.removeprefix("unet.") for n, r in report.ranks.items() if r}
    assert diff(tmp_path / "x.safetensors", tmp_path / "mixed.safetensors").distance == pytest.approx(
        report.error, 1e-5
    )


def test_a_file_in_bytes_is_never_larger_than_asked_for(tmp_path: Path):
    save_file(kohya(drawn(UNET | {f"layers.{i}": (24, 40) for i in range(20)}, rank=8)), tmp_path / "k.safetensors")
    d = styled(drawn(UNET, scale=1.0), "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(d, tmp_path / "d.safetensors")
    for name, least in (("k", 12000), ("d", 14000)):
        for size in range(least, (tmp_path / f"{name}.safetensors").stat().st_size, 1777):
            squeeze(tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors", size=size, force=True)
            assert (tmp_path / "out.safetensors").stat().st_size <= size


def test_unknown_tensors_stay_and_hold_their_module(tmp_path: Path):
    tensors = kohya(drawn(UNET))
    stem = "lora_unet_up_blocks_1_resnets_2_time_emb_proj"
    tensors |= {f"{stem}.dora_scale": torch.rand(12, 1), "lora_unet_norm.w_norm": torch.rand(5), "odd": torch.arange(3)}
    tensors[f"{stem}.lora_up.weight"].zero_()
    save_file(tensors, tmp_path / "x.safetensors")
    report = squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", energy=0.9)
    assert report.ranks[stem] == 1
    assert any("DoRA" in note for note in report.notes)
    new = load_file(tmp_path / "out.safetensors")
    for key in (f"{stem}.dora_scale", "lora_unet_norm.w_norm", "odd"):
        assert torch.equal(new[key], tensors[key])


def test_names_of_outputs(tmp_path: Path):
    save_file(kohya(drawn(UNET)), tmp_path / "x.v1.safetensors")
    assert squeeze(tmp_path / "x.v1.safetensors", target_rank=2).out == str(tmp_path / "x.v1-r2.safetensors")
    torch.save(kohya(drawn(UNET)), tmp_path / "old.ckpt")
    assert squeeze(tmp_path / "old.ckpt", target_rank=2).out == str(tmp_path / "old-r2.ckpt")
    assert open_adapter(tmp_path / "old-r2.ckpt").layout.total_rank == 10
    source = tmp_path / "x.v1.safetensors"
    for out, message in ((source, "its own source"), (tmp_path / "folder", "one file"), (tmp_path, "one file")):
        with pytest.raises(ConfigError, match=message):
            squeeze(source, out, target_rank=2)
    with pytest.raises(ConfigError, match="already"):
        squeeze(source, target_rank=2)
    squeeze(source, target_rank=2, force=True)
    save_file({"model.weight": torch.ones(2)}, tmp_path / "base.safetensors")
    (tmp_path / "notes.pt").write_text("mine")
    for name in ("base.safetensors", "notes.pt"):
        with pytest.raises(ConfigError, match="is not an adapter"):
            squeeze(source, tmp_path / name, target_rank=2, force=True)
    with pytest.raises(ConfigError, match="residuals"):
        squeeze(source, tmp_path / "y.safetensors", target_rank=2, keep_residual=tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match="no adapter format 'flux'"):
        squeeze(source, tmp_path / "y.safetensors", target_rank=2, from_format="flux")


# -- what is refused -------------------------------------------------------------------------------------------------

Q = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"


def change(tensors: dict[str, Tensor], **new: Tensor | None) -> dict[str, Tensor]:
    out = tensors | {f"{Q}.{key.replace('__', '.')}": t for key, t in new.items() if t is not None}
    return {
        k: t for k, t in out.items() if k not in {f"{Q}.{key.replace('__', '.')}" for key in new if new[key] is None}
    }


HOSTILE = {
    "no up": ({"lora_up__weight": None}, "no up"),
    "no down": ({"lora_down__weight": None}, "no down"),
    "no alpha": ({"alpha": None}, "no alpha while"),
    "alpha 0": ({"alpha": torch.tensor(0.0)}, "alpha is 0"),
    "alpha negative": ({"alpha": torch.tensor(-4.0)}, "alpha is -4"),
    "alpha NaN": ({"alpha": torch.tensor(math.nan)}, "alpha is nan"),
    "alpha of two": ({"alpha": torch.ones(2)}, "not a number"),
    "rank 0": ({"lora_down__weight": torch.ones(0, 16), "lora_up__weight": torch.ones(12, 0)}, "is empty"),
    "ranks apart": ({"lora_down__weight": torch.ones(5, 16)}, "ranks do not agree"),
    "a vector": ({"lora_down__weight": torch.ones(6)}, "no LoRA factors"),
    "up with a kernel": ({"lora_up__weight": torch.ones(12, 6, 3, 3)}, "no LoRA factors"),
    "two types": ({"lora_up__weight": torch.ones(12, 6).half()}, "one type"),
    "integers": (
        {"lora_up__weight": torch.ones(12, 6).int(), "lora_down__weight": torch.ones(6, 16).int()},
        "one type",
    ),
    "NaN": ({"lora_up__weight": torch.full((12, 6), math.nan)}, "NaN"),
    "infinite": ({"lora_down__weight": torch.full((6, 16), math.inf)}, "infinite"),
    "two spellings": ({"lora_A__weight": torch.ones(6, 16), "lora_B__weight": torch.ones(12, 6)}, "there twice"),
    "mid of another rank": ({"lora_mid__weight": torch.ones(5, 5)}, "ranks do not agree"),
    "LoHa": ({"hada_w1_a": torch.ones(3, 2)}, "no hada_w1_b"),
    "LoKr": ({"lokr_w1": torch.ones(3, 2), "lokr_w2": torch.ones(4, 8)}, "there twice, as LoKr"),
    "OFT": ({"oft_blocks": torch.ones(3, 2, 2)}, "OFT"),
    "IA3": ({"on_input": torch.ones(1)}, "IA3"),
    "GLoRA": ({"a1__weight": torch.ones(1)}, "GLoRA"),
    "a scalar": ({"scalar": torch.ones(1)}, "scalar"),
    "AdaLoRA": ({"lora_E": torch.ones(6, 1)}, "AdaLoRA"),
    "a router": ({"lora_route__weight": torch.ones(6, 1)}, "by the input"),
    "something new": ({"lora_new__weight": torch.ones(6, 1)}, "a spelling that is not known"),
    "complex": ({"thing": torch.ones(1, dtype=torch.complex64)}, "of type"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_foreign_file_is_one_clear_error_and_no_output(tmp_path: Path, case: str):
    new, message = HOSTILE[case]
    tensors = change(kohya(drawn(UNET)), **new)
    path = tmp_path / ("x.pt" if case == "complex" else "x.safetensors")
    (torch.save if case == "complex" else save_file)(tensors, path)
    with pytest.raises(AdapterError, match=message) as error:
        squeeze(path, tmp_path / "out.safetensors", target_rank=2)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_damaged_bytes_give_an_adapter_or_one_error(tmp_path: Path, style: str):
    rng, path, out = random.Random(style), tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    if style == "kohya":
        save_file(kohya(drawn(UNET)), path, {"ss_network_dim": "6"})
    else:
        meta = {"lora_adapter_metadata": json.dumps({"unet.r": 6, "unet.lora_alpha": 3})}
        save_file(styled(drawn(UNET), "unet.", ".lora_A.weight", ".lora_B.weight"), path, meta)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for i in range(60):
        raw = bytearray(whole)
        if i % 3 == 0:
            raw = raw[: rng.randrange(len(raw))]
        elif i % 3 == 1:
            raw[rng.randrange(end)] = rng.randrange(256)
        else:
            raw[rng.randrange(8, end)] = rng.choice(b'0129AB.,"[]{}_')
        path.write_bytes(raw)
        said = ""
        try:
            squeeze(path, out, target_rank=2)
        except (AdapterError, ConfigError) as e:
            said = str(e)
        assert "\n" not in said
        assert out.exists() == (not said)
        out.unlink(missing_ok=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_with_paths_in_them_touch_nothing(tmp_path: Path):
    tensors = kohya(drawn({"../../evil": (8, 8), "/abs": (8, 8)}), prefix="lora_unet_")
    save_file(tensors, tmp_path / "x.safetensors")
    squeeze(tmp_path / "x.safetensors", tmp_path / "out.safetensors", target_rank=2)
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "out.safetensors"}
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.weight": torch.ones(2, 2)}, "no LoRA factors"),
        ({"layers.0.q.lora_A.weight": torch.ones(2, 2), "layers.0.q.lora_B.weight": torch.ones(2, 2)}, "--from-format"),
        ({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, "adapter_config.json"),
        ({"diffusion_model.q.hada_w1_a": torch.ones(2, 2)}, "no hada_w1_b"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_remedy(tmp_path: Path, tensors: dict[str, Tensor], message: str):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=message):
        open_adapter(tmp_path / "x.safetensors")


def test_from_overrides_what_the_names_suggest(tmp_path: Path):
    factors = drawn({"layers.0.q": (8, 8)}, scale=1.0)
    save_file(styled(factors, "", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    assert open_adapter(tmp_path / "x.safetensors", "comfyui").kind == "comfyui"
    assert squeeze(tmp_path / "x.safetensors", target_rank=2, from_format="diffusers").ranks == {"layers.0.q": 2}


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (json.dumps({"unet.r": 0, "unet.lora_alpha": 1}), "positive number"),
        (json.dumps({"unet.r": 5, "unet.lora_alpha": 1}), "says another"),
        (json.dumps({"unet.r": 6, "unet.lora_alpha": 1, "unet.peft_type": "LOHA"}), "LOHA"),
        (json.dumps({"vae.r": 6, "vae.lora_alpha": 1}), "'vae'"),
        (json.dumps({"r": 6, "lora_alpha": 1}), "names no component"),
    ],
)
def test_a_diffusers_header_that_is_wrong(tmp_path: Path, packed: str, message: str):
    tensors = styled(drawn(UNET), "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": packed})
    with pytest.raises(AdapterError, match=message):
        open_adapter(tmp_path / "x.safetensors")


def test_alphas_and_a_header_config_contradict(tmp_path: Path):
    tensors = styled(drawn(UNET), "unet.", ".lora_A.weight", ".lora_B.weight", alpha=True)
    meta = {"lora_adapter_metadata": json.dumps({"unet.r": 6, "unet.lora_alpha": 3})}
    save_file(tensors, tmp_path / "x.safetensors", meta)
    with pytest.raises(AdapterError, match="refuses both"):
        open_adapter(tmp_path / "x.safetensors")


def lycoris(prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file of LoHa and LoKr as LyCORIS names them; module -> DeltaW, each worked out as LyCORIS states it."""
    g = torch.Generator().manual_seed(4)
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    a1, b1, a2, b2 = random(12, 2), random(2, 10), random(12, 3), random(3, 10)
    w1, wa, wb = random(3, 2), random(4, 2), random(2, 8)
    whole1, whole2 = random(3, 4), random(4, 3)
    core, ca, cb = random(2, 2, 3, 3), random(2, 4), random(2, 5)
    files = {
        "q": {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)},
        "k": {"lokr_w1": w1, "lokr_w2_a": wa, "lokr_w2_b": wb, "alpha": torch.tensor(5.0)},
        "v": {"lokr_w1": whole1, "lokr_w2": whole2, "alpha": torch.tensor(5.0)},
        "c": {"lokr_w1": w1.clone(), "lokr_t2": core, "lokr_w2_a": ca, "lokr_w2_b": cb, "alpha": torch.tensor(1.0)},
    }
    kernel = torch.einsum("ijxy,ip,jn->pnxy", core, ca, cb)
    deltas = {
        "q": 3 / 2 * (a1 @ b1) * (a2 @ b2),
        "k": 5 / 2 * torch.kron(w1, wa @ wb),
        "v": torch.kron(whole1, whole2),  # without a pair of factors alpha is the rank, whatever it says
        "c": 1 / 2 * torch.kron(w1[..., None, None], kernel.contiguous()),
    }
    return {f"{prefix}{n}.{part}": t for n, parts in files.items() for part, t in parts.items()}, deltas


def test_loha_and_lokr_files_are_the_lora_that_they_equal(tmp_path: Path):
    for prefix, kind in (("lora_unet_block_", "kohya"), ("diffusion_model.block.", "comfyui")):
        tensors, deltas = lycoris(prefix)
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        adapter = open_adapter(tmp_path / f"{kind}.safetensors")
        assert adapter.kind == kind
        assert [note.split(",")[0] for note in adapter.notes] == ["LoHa", "LoKr"]
        squeeze(tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-out.safetensors", target_rank=64)
        out = load_file(tmp_path / f"{kind}-out.safetensors")
        assert not any("hada" in key or "lokr" in key for key in out)
        for name, wanted in deltas.items():
            down, up, alpha = (
                out[f"{prefix}{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            found = delta(down, up, float(alpha) / len(down))
            assert down.ndim == wanted.ndim
            assert (found.reshape(wanted.shape) - wanted).norm() <= 1e-6 * wanted.norm(), name
        save_file(tensors | {f"{prefix}q.alpha": torch.tensor(-1.0)}, tmp_path / "bad.safetensors")
        with pytest.raises(AdapterError, match=r"q\.alpha is -1"):
            open_adapter(tmp_path / "bad.safetensors")
