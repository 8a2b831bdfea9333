"""Single files as public trainers and repositories lay them out: told from the file, and written as they were."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from rankflow import AdapterError, ConfigError, inspect, squeeze
from rankflow.analysis.difference import diff
from rankflow.cli.app import app
from rankflow.formats.open import open_adapter
from rankflow.render.adapter_tables import squeeze_table, types_table
from rankflow.render.reports import inspection_page, squeeze_page

FLUX = ["double_blocks.{i}.img_attn.qkv", "double_blocks.{i}.txt_mod.lin", "single_blocks.{i}.linear1"]
QWEN = [
    "transformer_blocks.{i}.attn.to_q",
    "transformer_blocks.{i}.attn.add_k_proj",
    "transformer_blocks.{i}.img_mlp.net.0.proj",
]
WAN = ["blocks.{i}.self_attn.q", "blocks.{i}.cross_attn.k_img", "blocks.{i}.ffn.0"]
CLIP = ["text_model.encoder.layers.{i}.self_attn.q_proj"]

DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")


def drawn(*shape: int, seed: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed) % (1 << 31))) / 3


def pairs(names: list[str], prefix: str, ends: tuple[str, str], *, alpha: bool) -> dict[str, Tensor]:
    """Modules of two layers, of ranks 2 to 7 and, where there are alphas, different scales."""
    tensors = {}
    for i in range(2):
        for j, name in enumerate(names):
            stem, rank = prefix + name.format(i=i), 2 + 3 * i + j
            tensors[stem + ends[0]] = drawn(rank, 16, seed=f"{i}{j}a")
            tensors[stem + ends[1]] = drawn(24, rank, seed=f"{i}{j}b")
            if alpha:
                tensors[f"{stem}.alpha"] = torch.tensor(1.5 + j)
    return tensors


def control() -> dict[str, Tensor]:
    """BFL's control LoRA: biases of B, and the norms whole."""
    tensors = pairs([*FLUX, "img_in", "time_in.in_layer"], "", A_B, alpha=False)
    tensors |= {key.replace(".weight", ".bias"): drawn(24, seed=key) for key in list(tensors) if ".lora_B" in key}
    return tensors | {f"single_blocks.{i}.norm.key_norm.scale": torch.ones(8) for i in range(2)}


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks by an underscore and the rest by dots, as WanVideoWrapper writes."""
    return {re.sub(r"^blocks\.", "lora_unet_blocks_", key): t for key, t in tensors.items()}


LAYOUTS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "Qwen-Image-Lightning": ("diffusers", lambda: pairs(QWEN, "", DOWN_UP, alpha=True)),
    "bare, PEFT's spelling": ("diffusers", lambda: pairs(QWEN, "", A_B, alpha=False)),
    "BFL control": ("comfyui", control),
    "fal Kontext": ("comfyui", lambda: pairs(FLUX, "base_model.model.", A_B, alpha=False)),
    "bare FLUX": ("comfyui", lambda: pairs(FLUX, "", A_B, alpha=False)),
    "DiffSynth Wan": ("comfyui", lambda: pairs(WAN, "", DEFAULT, alpha=False)),
    "DiffSynth Qwen": ("diffusers", lambda: pairs(QWEN, "", DEFAULT, alpha=False)),
    "OneTrainer": (
        "comfyui",
        lambda: pairs(FLUX, "transformer.", DOWN_UP, alpha=True)
        | pairs(CLIP, "clip_l.", DOWN_UP, alpha=True)
        | pairs(["encoder.block.{i}.layer.0.SelfAttention.q"], "t5.", DOWN_UP, alpha=True),
    ),
    "model.diffusion_model": ("comfyui", lambda: pairs(FLUX, "model.diffusion_model.", DOWN_UP, alpha=True)),
    "WanVideoWrapper": ("kohya", lambda: flat(pairs(WAN, "", DOWN_UP, alpha=True))),
    "musubi": ("kohya", lambda: pairs([n.replace(".", "_") for n in WAN], "lora_unet_", DOWN_UP, alpha=True)),
    "Wan Fun": ("kohya", lambda: pairs([n.replace(".", "_") for n in WAN], "lora_unet__", DOWN_UP, alpha=True)),
    "Z-Image": ("comfyui", lambda: pairs(["layers.{i}.attention.to_q"], "", DEFAULT, alpha=False)),
    "diffusers' Z-Image": ("diffusers", lambda: pairs(["layers.{i}.attention.to_q"], "transformer.", A_B, alpha=True)),
    "unknown names with alphas": ("comfyui", lambda: pairs(["net.stage{i}.mixer"], "", DOWN_UP, alpha=True)),
    "XLabs": (
        "diffusers",
        lambda: pairs(["double_blocks.{i}.processor.qkv_lora1", "double_blocks.{i}.processor.proj_lora2"], "",
                      (".down.weight", ".up.weight"), alpha=False)
        | pairs(["single_blocks.{i}.processor.qkv_lora"], "", (".down.weight", ".up.weight"), alpha=False),
    ),
}  # fmt: skip


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key of a down factor -> alpha / r * up down, from the file alone."""
    out = {}
    for key, a in tensors.items():
        side = re.search(r"lora_down|lora_A|(?<=lora[\d.])\.?down|(?<=lora)\.down", key)
        if side is None or not key.endswith(".weight"):
            continue
        b = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")]
        alpha = tensors.get(f"{key[: side.start()].rstrip('.')}.alpha")
        out[key] = (1.0 if alpha is None else float(alpha) / len(a)) * b.double() @ a.double()
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_told_from_the_file_and_written_as_it_was(name: str, tmp_path: Path):
    kind, make = LAYOUTS[name]
    tensors = make()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    adapter = open_adapter(path)
    wanted = deltas(tensors)
    assert (adapter.kind, len(adapter.layout)) == (kind, len(wanted))
    for module, entry in adapter.entries.items():
        a, b = adapter.factors(module)
        torch.testing.assert_close(entry.slot.scaling * b.double() @ a.double(), wanted[entry.a_key], rtol=1e-6, atol=0)
    squeeze(path, tmp_path / "same.safetensors", target_rank=9)
    same = load_file(tmp_path / "same.safetensors")
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[key], tensors[key]) for key in tensors)
    squeeze(path, tmp_path / "small.safetensors", target_rank=2)
    small = load_file(tmp_path / "small.safetensors")
    assert small.keys() == tensors.keys()
    for key, found in deltas(small).items():
        assert len(small[key]) == 2
        sigma = torch.linalg.svdvals(wanted[key])
        lost = torch.linalg.matrix_norm(found - wanted[key])
        torch.testing.assert_close(lost, sigma[2:].norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [True, False])
def test_bare_lokr_is_read_as_the_lora_it_equals(alpha: bool, tmp_path: Path):
    """`lokr_w1` of no prefix, as SimpleTuner and LyCORIS' wrapper leave them: DeltaW = scale * w1 (x) w2_a w2_b."""
    tensors, wanted = {}, {}
    for i in range(2):
        stem, rank = f"transformer_blocks.{i}.attn.to_q", 2 + i
        w1, a, b = drawn(2, 4, seed="w"), drawn(6, rank, seed=f"a{i}"), drawn(rank, 5, seed=f"b{i}")
        tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(3.0)
        wanted[stem] = (3.0 / rank if alpha else 1.0) * torch.kron(w1.double(), a.double() @ b.double())
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    adapter = open_adapter(path)
    assert adapter.layout.keys() == wanted.keys()
    for module, entry in adapter.entries.items():
        a, b = adapter.factors(module)
        torch.testing.assert_close(entry.slot.scaling * b.double() @ a.double(), wanted[module], rtol=1e-5, atol=1e-6)


UNKNOWN = {
    "numbered": {"double_blocks.0.q_lora_7.weight": (4, 16)},
    "upper case": {"double_blocks.0.img_attn.LoRA_new": (4, 16)},
    "down alone": {"double_blocks.0.img_attn.adapter.down.weight": (4, 16)},
    "sides": {"double_blocks.0.img_attn.x.A": (4, 16), "double_blocks.0.img_attn.x.B": (8, 4)},
    "shapes alone": {"double_blocks.0.img_attn.p.weight": (2, 16), "double_blocks.0.img_attn.q.weight": (24, 2)},
    "hada": {"double_blocks.0.img_attn.hada_w3": (4, 16)},
    "alpha of nothing": {"double_blocks.7.img_attn.alpha": (1,)},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_looks_like_a_factor_is_never_carried_along(case: str, tmp_path: Path):
    more = {key: torch.ones(shape) for key, shape in UNKNOWN[case].items()}
    save_file(pairs(FLUX, "", A_B, alpha=False) | more, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=re.escape(next(iter(more)))):
        open_adapter(tmp_path / "x.safetensors")


def test_what_is_no_factor_is_still_carried_along(tmp_path: Path):
    whole = {
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8),
        "double_blocks.0.img_mlp.fc1.weight": drawn(64, 16, seed="1"),  # a wide layer is no pair of thin factors
        "double_blocks.0.img_mlp.fc2.weight": drawn(16, 64, seed="2"),
        "double_blocks.0.img_attn.qkv.diff_b": torch.ones(24),
        "bundle_emb.soft_prompt.clip_l_out": drawn(3, 16, seed="3"),
        "up_proj.weight": drawn(3, 3, seed="4"),
    }
    save_file(pairs(FLUX, "", A_B, alpha=False) | whole, tmp_path / "x.safetensors")
    assert set(open_adapter(tmp_path / "x.safetensors").extra_tensors) == set(whole)


def test_names_of_language_models_ask_for_their_config(tmp_path: Path):
    for stem in (
        "base_model.model.model.layers.0.q_proj",
        "transformer.h.0.attn.c_attn",
        "transformer.blocks.0.attn.Wqkv",
        "blocks.0.att.key",
    ):
        save_file(pairs([stem], "", A_B, alpha=False), tmp_path / "x.safetensors")
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            open_adapter(tmp_path / "x.safetensors")


def test_differences_alone_are_called_that(tmp_path: Path):
    save_file({"lora_unet_x.diff": torch.ones(4, 4), "lora_unet_x.diff_b": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="plain differences"):
        open_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("ends", [DEFAULT, DOWN_UP])
def test_no_header_is_written_that_diffusers_looks_for_elsewhere(ends: tuple[str, str], tmp_path: Path):
    """diffusers names these `transformer.` and asks the header for that; what it then finds there is not theirs."""
    save_file(pairs(QWEN, "", ends, alpha=False), tmp_path / "x.safetensors", {"format": "pt"})
    squeeze(tmp_path / "x.safetensors", tmp_path / "y.safetensors", target_rank=4)
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_xlabs_names_are_those_of_the_checkpoint_in_other_formats(tmp_path: Path):
    spelt = (".down.weight", ".up.weight")
    double = pairs(["double_blocks.{i}.processor.qkv_lora1"], "", spelt, alpha=False)
    save_file(double, tmp_path / "x.safetensors")
    squeeze(tmp_path / "x.safetensors", tmp_path / "y.safetensors", target_rank=2, to_format="kohya")
    assert "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight" in load_file(tmp_path / "y.safetensors")
    single = pairs(["single_blocks.{i}.processor.qkv_lora"], "", spelt, alpha=False)
    save_file(double | single, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="some rows"):
        squeeze(tmp_path / "x.safetensors", tmp_path / "z.safetensors", target_rank=2, to_format="kohya")


def test_what_is_carried_along_is_in_every_report_and_counts_by_size(tmp_path: Path):
    whole = {"double_blocks.0.img_attn.qkv.diff_b": torch.ones(24), "final_layer.linear.diff": drawn(300, 40, seed="d")}
    save_file(pairs(FLUX, "", A_B, alpha=False) | whole, tmp_path / "x.safetensors")
    wanted = {key: t.nbytes for key, t in whole.items()}
    found = inspect(tmp_path / "x.safetensors")
    size = 48_000 + 5_000
    report = squeeze(tmp_path / "x.safetensors", tmp_path / "y.safetensors", size=size)
    assert found.carried == report.carried == wanted
    assert report.to_json()["carried"] == found.to_json()["carried"] == wanted
    assert (tmp_path / "y.safetensors").stat().st_size <= size
    assert sum(report.ranks.values()) < sum(m.rank for m in found.modules)
    for page in (inspection_page(found), squeeze_page(report)):
        table = page.sections[-1].table
        assert table is not None
        assert [(row[0].text, row[1].value) for row in table.rows] == list(wanted.items())
    for table in (types_table(found), squeeze_table(report)):
        assert "final_layer.linear.diff (48.0 kB)" in str(table.caption)
        assert "2 tensors" in str(table.caption)


ASKING = {
    "squeeze": ["FILE", "--target-rank", 2, "--dry-run"],
    "plan": ["FILE", "--target-rank", 2, "-o", "plan.yaml"],
    "inspect": ["FILE"],
    "check": ["FILE", "--engine", "comfyui"],
    "canonicalize": ["FILE", "-o", "sorted.safetensors"],
    "pad": ["FILE", "--rank", 8, "-o", "padded.safetensors"],
    "diff": ["FILE", "FILE"],
}


@pytest.mark.parametrize("command", ASKING)
def test_every_command_that_asks_for_the_format_takes_it(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    save_file(pairs(["stage{i}.mixer"], "", A_B, alpha=False), path, {"format": "pt"})
    words = [command, *(str(path) if word == "FILE" else str(word) for word in ASKING[command])]
    asked = CliRunner().invoke(app, words)
    assert asked.exit_code == 2
    assert "--from-format" in asked.stderr
    done = CliRunner().invoke(app, [*words, "--from-format", "comfyui"])
    assert (done.exit_code, done.stderr) == (0, "")


def test_two_adapters_may_be_of_two_formats(tmp_path: Path):
    tensors = pairs(["stage{i}.mixer"], "", A_B, alpha=False)
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert diff(*[tmp_path / "x.safetensors"] * 2, from_format=("comfyui", "diffusers")).relative < 1e-12
    with pytest.raises(ConfigError, match="formats for two"):
        diff(*[tmp_path / "x.safetensors"] * 2, from_format=["comfyui"])
