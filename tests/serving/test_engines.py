"""Adapters for the engines that serve them: each engine's rule once more, applied to what was written for it.

`SERVED` are the engines' loaders in a few lines each, from a PEFT folder to DeltaW, refusing what they refuse.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import base_of, lora
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, RandLoraConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from whole_files import READERS, put

from rankflow import ConfigError, Target, check, pad, squeeze, squeeze_each
from rankflow.serving.engines import engine_named, engines
from rankflow.serving.export import Fitting
from rankflow.serving.features import FEATURES
from tests.cli.test_app import run
from tests.formats.as_lora.test_adalora import logits, saved
from tests.formats.as_lora.test_forms import saved as live
from tests.formats.single_file.test_single_file import (
    UNET,
    Factors,
    comfy,
    delta,
    diffusers_config,
    drawn,
    kohya,
    styled,
)

Deltas = dict[str, Tensor]  # module -> DeltaW [out, in]
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 4), "self_attn.v_proj": (8, 4), "mlp.up_proj": (8, 12)}
SHAPES |= {"mlp.gate_proj": (8, 12), "mlp.down_proj": (12, 8)}
LINEAR = [f"model.layers.{layer}.{name}" for layer in range(2) for name in SHAPES]
PEFT_ENGINES = ["vllm", "sglang", "lorax", "tensorrt-llm"]


# -- an adapter, and what it means -----------------------------------------------------------------------------------


def write(
    folder: Path,
    ranks: dict[str, int],
    alphas: dict[str, float],
    *,
    r: int | None = None,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    config: dict | None = None,
    seed: int = 0,
) -> Deltas:
    """A PEFT folder with these ranks and alphas as patterns; its DeltaW by PEFT's rule."""
    g = torch.Generator().manual_seed(seed)
    r = max(ranks.values()) if r is None else r
    tensors, found = {}, {}
    for name, rank in ranks.items():
        n_in, n_out = SHAPES[name.partition("layers.")[2].partition(".")[2]]
        a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((rank, n_in), (n_out, rank)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        found[name] = alphas[name] / (math.sqrt(rank) if rslora else rank) * b.double() @ a.double()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alphas[next(iter(ranks))],
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{n}": a for n, a in alphas.items() if n in ranks and a != alphas[next(iter(ranks))]},
        "use_rslora": rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | (config or {})))
    return found


def uniform(value: float) -> dict:
    return dict.fromkeys(LINEAR, value)


# -- the engines' rules, once more -----------------------------------------------------------------------------------


class Refused(Exception):
    pass


def opened(folder: Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor]]]:
    tensors = {
        k.removeprefix("base_model.model."): t.double()
        for k, t in load_file(folder / "adapter_model.safetensors").items()
    }
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in names}


def vllm(folder: Path) -> Deltas:
    """`PEFTHelper` and `set_lora`: one scale, buffers of the smallest max_lora_rank that lets r pass."""
    config, factors = opened(folder)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    room = next((rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= config["r"]), 0)
    if any(len(a) > room for a, _ in factors.values()):
        raise Refused
    return {name: scale * b @ a for name, (a, b) in factors.items()}


def sglang(folder: Path) -> Deltas:
    """`normalize_qkv_proj`, `normalize_gate_up_proj` and `load_lora_weight_to_buffer`: slices of r rows for each."""
    config, factors = opened(folder)
    if any(len(a) != config["r"] for a, _ in factors.values()):
        raise Refused
    served = {}
    for name, (a, b) in factors.items():
        owner, _, last = name.rpartition(".")
        if last == "q_proj" and f"{owner}.v_proj" not in factors:
            raise Refused
        if {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last) in (
            sibling.rpartition(".")[2] for sibling in factors if sibling.startswith(f"{owner}.")
        ):
            served[name] = config["lora_alpha"] / config["r"] * b @ a
    return served


def lorax(folder: Path) -> Deltas:
    """`LoraWeights.load` for one type after the other, which leaves the padded rank in the config."""
    config, factors = opened(folder)
    served = {}
    for kind in SHAPES:
        names = [f"model.layers.{layer}.{kind}" for layer in range(2)]
        if any(name not in factors for name in names):
            continue
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        rows = [8 if len(factors[n][0]) <= 8 else math.ceil(len(factors[n][0]) / 16) * 16 for n in names]
        if len(set(rows)) > 1:
            raise Refused
        config["r"] = rows[0]
        served |= {name: scale * factors[name][1] @ factors[name][0] for name in names}
    return served


def tensorrt_llm(folder: Path) -> Deltas:
    """`LoraManager.load_from_hf`: the rank of the tensor, the alpha of the config."""
    config, factors = opened(folder)
    root = math.sqrt if config["use_rslora"] else float
    return {name: config["lora_alpha"] / root(len(a)) * b @ a for name, (a, b) in factors.items()}


SERVED: dict[str, Callable[[Path], Deltas]] = {
    "vllm": vllm,
    "sglang": sglang,
    "lorax": lorax,
    "tensorrt-llm": tensorrt_llm,
}


def peft(folder: Path) -> Deltas:
    """PEFT itself, on a model with layers of these names."""

    class Tree(nn.Module):
        pass

    base = Tree()
    for name in LINEAR:
        *path, last = name.split(".")
        at: nn.Module = base
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, Tree())
            at = at.get_submodule(part)
        at.add_module(last, nn.Linear(*SHAPES[name.split(".", 3)[3]]))
    model = PeftModel.from_pretrained(base, str(folder)).double()
    layers = ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if hasattr(m, "lora_A"))
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers}


def same(found: Deltas, wanted: Deltas, rtol: float = 1e-6) -> bool:
    """Equal but for rounding; a module that is not there adds nothing."""
    return all(
        (found.get(name, torch.zeros_like(d)) - d).norm() <= rtol * d.norm() for name, d in wanted.items()
    ) and all(not found[name].any() for name in found.keys() - wanted.keys())


# -- what is written for an engine -----------------------------------------------------------------------------------

ranks_of = st.fixed_dictionaries({name: st.integers(1, 10) for name in LINEAR})
alphas_of = st.fixed_dictionaries({name: st.sampled_from([1, 3, 4.5, 16]) for name in LINEAR})


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(ranks_of, st.integers(1, 20).map(uniform)),
    st.one_of(alphas_of, st.just(uniform(7))),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_engine_gets_the_sources_update_and_check_tells_what_it_gets_otherwise(ranks, alphas, rslora, seed):
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "src"
        wanted = write(src, ranks, alphas, rslora=rslora, seed=seed)
        for name, serve in SERVED.items():
            out = Path(folder) / name
            squeeze_each(src, [Target(keep=True)], [out], fitting=Fitting(engine_named(name)))
            assert same(serve(out), wanted), name
            config, factors = opened(out)
            rows = {len(a) for a, _ in factors.values()}
            assert rows == {config["r"]} == {config["lora_alpha"]}
            assert not config["rank_pattern"]
            assert not config["alpha_pattern"]
            assert not engine_named(name).ranks or config["r"] in engine_named(name).ranks
            assert check(out, name).problems == ()
            try:
                right = same(serve(src), wanted)
            except Refused:
                right = False
            assert right == (not check(src, name).problems), (name, check(src, name))


def test_peft_reads_what_is_written_for_others(tmp_path: Path):
    ranks = {name: 1 + i % 5 for i, name in enumerate(LINEAR)}
    wanted = write(tmp_path / "src", ranks, uniform(6) | {LINEAR[3]: 9}, rslora=True)
    assert same(peft(tmp_path / "src"), wanted)
    for name in PEFT_ENGINES:
        squeeze(tmp_path / "src", tmp_path / name, keep=True, engine=name)
        assert same(peft(tmp_path / name), wanted)
    squeeze(tmp_path / "src", tmp_path / "peft", keep=True, engine="peft")
    assert same(peft(tmp_path / "peft"), wanted)
    assert {len(a) for a, _ in opened(tmp_path / "peft")[1].values()} == set(ranks.values())  # not padded


@pytest.mark.parametrize("name", PEFT_ENGINES)
def test_modules_without_a_rank(tmp_path: Path, name: str):
    wanted = write(tmp_path / "src", uniform(3), uniform(6))
    gone = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.gate_proj"]
    squeeze(tmp_path / "src", tmp_path / "out", ranks=uniform(3) | dict.fromkeys(gone, 0), engine=name)
    left = {n: torch.zeros_like(d) if n in gone else d for n, d in wanted.items()}
    assert same(SERVED[name](tmp_path / "out"), left)
    assert set(opened(tmp_path / "out")[1]) == (set(LINEAR) - set(gone) if name == "vllm" else set(LINEAR))
    assert same(peft(tmp_path / "out"), {n: d for n, d in left.items() if n not in gone})
    assert check(tmp_path / "out", name).problems == ()


def test_squeezing_and_fitting_at_once(tmp_path: Path):
    wanted = write(tmp_path / "src", uniform(8), uniform(20), rslora=True)
    report = squeeze(tmp_path / "src", tmp_path / "out", energy=0.6, across=True, engine="vllm")
    assert len(set(report.ranks.values())) > 1
    for name, found in vllm(tmp_path / "out").items():
        u, s, v = torch.linalg.svd(wanted[name], full_matrices=False)
        k = report.ranks[name]
        torch.testing.assert_close(found, u[:, :k] * s[:k] @ v[:k], rtol=1e-5, atol=1e-5)
    assert any("--max-lora-rank 8" in note for note in report.notes)
    assert any("written with rank 8" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_only_in_b(tmp_path: Path, dtype: torch.dtype):
    write(tmp_path / "src", uniform(3), uniform(5), dtype=dtype)
    pad(tmp_path / "src", tmp_path / "out", rank=4)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("src", "out"))
    for key, t in before.items():
        kept = after[key][:3] if "lora_A" in key else after[key][:, :3]
        assert kept.dtype == dtype
        assert torch.equal(kept, t if "lora_A" in key else (t.double() * (5 / 3)).to(dtype))
        assert not (after[key][3:] if "lora_A" in key else after[key][:, 3:]).any()


def test_a_power_of_two_is_folded_without_rounding(tmp_path: Path):
    wanted = write(tmp_path / "src", uniform(4), uniform(8), dtype=torch.bfloat16)
    pad(tmp_path / "src", tmp_path / "out", rank=16)
    assert all(torch.equal(d, wanted[name]) for name, d in vllm(tmp_path / "out").items())


def test_kinds_that_are_not_linear_are_padded_too(tmp_path: Path):
    for kind in ("embedding", "conv", "attention", "experts"):
        model = lora(kind, dtype=torch.float32, use_rslora=kind == "conv")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / kind)
            pad(tmp_path / kind, tmp_path / f"{kind}-out", rank=7)
            again = PeftModel.from_pretrained(base_of(kind, dtype=torch.float32), str(tmp_path / f"{kind}-out"))
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                before = layer.get_delta_weight("default")
                torch.testing.assert_close(again.get_submodule(name).get_delta_weight("default"), before)
                assert again.get_submodule(name).scaling["default"] == 1


def test_the_bias_of_b_is_scaled_with_it(tmp_path: Path):
    model = lora("linear", lora_bias=True, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "src")
    pad(tmp_path / "src", tmp_path / "out", rank=6)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("src", "out"))
    biases = [key for key in before if key.endswith(".bias")]
    assert biases
    for key in biases:
        torch.testing.assert_close(after[key], before[key] * 1.5)
    assert before[biases[0]].any()


def test_an_expression_for_target_modules_becomes_a_list(tmp_path: Path):
    wanted = write(tmp_path / "src", uniform(8), uniform(8), config={"target_modules": r".*_proj"})
    assert [p.where for p in check(tmp_path / "src", "sglang").problems] == ["target_modules"]
    squeeze(tmp_path / "src", tmp_path / "out", keep=True, engine="sglang")
    assert sorted(opened(tmp_path / "out")[0]["target_modules"]) == sorted(LINEAR)
    assert same(peft(tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    ("style", "vllm_does", "llamacpp_does"),
    [
        # r = lora_alpha = the largest, equal patterns: mergekit's extraction
        ({"r": 8, "alpha": 8, "equal": True}, [], ["scales by 4 and not by 1: 4 times as strong"]),
        # r = lora_alpha = 1, equal patterns: PEFT's conversion to a share of the energy
        (
            {"r": 1, "alpha": 1, "equal": True},
            ["goes by r = 1 for the room it needs, and model.layers.0.mlp.down_proj has 8"],
            ["scales by 0.125 and not by 1: 0.125 times", "scales by 0.5 and not by 1: 0.5 times as strong"],
        ),
        # one alpha
        ({"r": 8, "alpha": 8}, ["scales by 1 and not by 4: 0.25 times as strong"], []),
        # rsLoRA on top
        (
            {"r": 8, "alpha": 8, "rslora": True},
            ["scales by 2.828 and not by 5.657: 0.5 times as strong"],
            ["scales by 1 and not by 2.828: 0.354 times", "scales by 4 and not by 5.657: 0.707 times"],
        ),
    ],
)
def test_what_becomes_of_mixed_ranks(tmp_path: Path, style: dict, vllm_does: list[str], llamacpp_does: list[str]):
    """The ways in which tools write adapters of mixed ranks, and what is known to come of them."""
    ranks = uniform(8) | {LINEAR[0]: 2}
    alphas = dict(ranks) if style.get("equal") else uniform(style["alpha"])
    config = {"lora_alpha": style["alpha"]} if style.get("equal") else {}
    if style.get("equal"):
        config["alpha_pattern"] = {f"^{name}": a for name, a in alphas.items() if a != style["alpha"]}
    write(tmp_path / "src", ranks, alphas, r=style["r"], rslora=style.get("rslora", False), config=config)
    for engine, says in (("vllm", vllm_does), ("llamacpp", llamacpp_does)):
        found = sorted(p.does for p in check(tmp_path / "src", engine).problems)
        assert len(found) == len(says)
        assert all(does.startswith(said) for does, said in zip(found, sorted(says), strict=True))
        squeeze(tmp_path / "src", tmp_path / "out", keep=True, engine="vllm", force=True)
        assert check(tmp_path / "out", engine).problems == ()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lorax", "tensorrt-llm", "llamacpp"])
def test_engines_that_do_not_heed_rslora_are_told_from_those_that_do(tmp_path: Path, engine: str):
    write(tmp_path / "src", uniform(16), uniform(16), rslora=True)
    found = {p.does.split(":")[0] for p in check(tmp_path / "src", engine).problems}
    assert found == ({"scales by 1 and not by 4"} if engine in ("sglang", "llamacpp") else set())


@pytest.mark.parametrize(("most", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_room_that_vllm_makes_for_a_rank(most: int, room: int | None):
    assert engine_named("vllm").room(most) == room
    assert engine_named("sglang").room(most) == most  # takes any


def test_ranks_that_differ_are_refused_where_all_are_to_be_r_even_at_the_right_scale(tmp_path: Path):
    ranks = uniform(8) | {LINEAR[0]: 2}
    write(
        tmp_path / "src",
        ranks,
        uniform(8) | {LINEAR[0]: 2},
        config={"lora_alpha": 8, "alpha_pattern": {f"^{LINEAR[0]}": 2}},
    )
    (problem,) = check(tmp_path / "src", "sglang").problems
    assert problem.fate.value == "refused"
    assert "goes by r = 8" in problem.does
    assert check(tmp_path / "src", "vllm").problems == ()


# -- what cannot be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "change", "feature"),
    [
        ("vllm", {"use_dora": True}, "DoRA"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("vllm", {"lora_bias": True}, "bias"),
        ("sglang", {"use_dora": True}, "DoRA"),
        ("sglang", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("lorax", {"use_dora": True}, "DoRA"),
        ("tensorrt-llm", {"lora_bias": True}, "bias"),
        ("llamacpp", {"use_dora": True}, "DoRA"),
        ("llamacpp", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_an_engine_does_not_load_is_said_and_not_written(tmp_path: Path, engine: str, change: dict, feature: str):
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora("linear", dtype=torch.float32, target_modules=targets, **change).save_pretrained(tmp_path / "src")
    assert any(feature in p.does for p in check(tmp_path / "src", engine).problems)
    with pytest.raises(ConfigError, match=f"{feature}; serve it with another engine"):
        squeeze(tmp_path / "src", tmp_path / "out", target_rank=2, engine=engine)
    assert not (tmp_path / "out").exists()


def test_every_fate_is_of_a_feature_that_is_looked_for():
    assert {feature for engine in engines().values() for feature in engine.fates} <= set(FEATURES)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("vllm", "conv"), ("sglang", "attention"), ("lorax", "embedding"), ("llamacpp", "experts")],
)
def test_kinds_of_layers_that_an_engine_has_none_of(tmp_path: Path, engine: str, kind: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(kind, dtype=torch.float32).save_pretrained(tmp_path / "src")
    assert check(tmp_path / "src", engine).problems
    with pytest.raises(ConfigError, match="serve it with another engine"):
        squeeze(tmp_path / "src", tmp_path / "out", keep=True, engine=engine)


def test_what_is_not_known_is_said_and_written(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora("experts", dtype=torch.float32).save_pretrained(tmp_path / "src")
    assert [p.fate.value for p in check(tmp_path / "src", "vllm").problems] == ["not known"]
    report = squeeze(tmp_path / "src", tmp_path / "out", keep=True, engine="vllm")
    assert any("vllm may or may not load experts" in note for note in report.notes)


@pytest.mark.parametrize(
    ("engine", "fates"),
    [
        ("vllm", ("refused", "refused", "refused")),
        ("lorax", ("silent", "silent", "silent")),
        ("llamacpp", ("refused", "silent", "refused")),
    ],
)
def test_tensors_that_are_no_factors(tmp_path: Path, engine: str, fates: tuple[str, ...]):
    write(tmp_path / "src", uniform(8), uniform(8))
    file = tmp_path / "src" / "adapter_model.safetensors"
    more = ("lm_head.weight", "model.norm.weight", "model.layers.0.odd")
    save_file(load_file(file) | {f"base_model.model.{key}": torch.ones(4, 4) for key in more}, file)
    found = {p.where.removeprefix("base_model.model."): p.fate.value for p in check(tmp_path / "src", engine).problems}
    assert found == dict(zip(more, fates, strict=True))
    copies = {"base_model.model.lm_head.base_layer.weight": torch.ones(4, 4)}
    save_file({k: t for k, t in load_file(file).items() if "lora_" in k} | copies, file)
    assert check(tmp_path / "src", engine).problems == ()


def test_joined_layers_that_are_not_all_there(tmp_path: Path):
    """q and v alone, as PEFT's defaults have them; k alone; up without gate; a type that a layer lacks."""

    def served(engine: str, *left: str) -> list[tuple[str, str]]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "src"
        write(folder, {n: 8 for n in LINEAR if n.split(".", 3)[3].rpartition(".")[2] in left}, uniform(8))
        return [(p.where, p.fate.value) for p in check(folder, engine).problems]

    assert served("sglang", "q_proj", "v_proj") == []
    assert served("sglang", "q_proj") == [("without: model.layers.0.self_attn.v_proj and 1 more", "refused")]
    assert served("sglang", "k_proj", "v_proj") == [("without: model.layers.0.self_attn.q_proj and 1 more", "silent")]
    assert served("sglang", "up_proj") == [("without: model.layers.0.mlp.gate_proj and 1 more", "silent")]
    assert served("tensorrt-llm", "q_proj", "v_proj") == [
        ("without: model.layers.0.self_attn.k_proj and 1 more", "not known")
    ]
    assert served("vllm", "q_proj") == []
    write(tmp_path / "src", {n: 8 for n in LINEAR if n != "model.layers.1.mlp.down_proj"}, uniform(8))
    assert [(p.where, p.fate.value) for p in check(tmp_path / "src", "lorax").problems] == [
        ("mlp.down_proj in 1 of 2 layers", "silent")
    ]
    with pytest.raises(ConfigError, match="leaves a type out of all layers"):
        pad(tmp_path / "src", tmp_path / "out", engine="lorax")


def test_latent_attention_has_a_q_of_its_own(tmp_path: Path):
    owner = "base_model.model.model.layers.0.self_attn"
    tensors = {f"{owner}.{n}.lora_{ab}.weight": torch.ones(8, 8) for n in ("q_proj", "kv_b_proj") for ab in "AB"}
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "adapter_model.safetensors")
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "kv_b_proj"])
    config.save_pretrained(tmp_path / "src")
    assert check(tmp_path / "src", "sglang").problems == ()


def test_ranks_that_an_engine_cannot_be_set_to(tmp_path: Path):
    write(tmp_path / "src", uniform(8) | {LINEAR[0]: 200}, uniform(8))
    assert any(p.where == "rank 200" for p in check(tmp_path / "src", "lorax").problems)
    with pytest.raises(ConfigError, match=r"ranks up to 128, and the adapter has 200; squeeze it, with --max-rank 128"):
        pad(tmp_path / "src", tmp_path / "out", engine="lorax")
    with pytest.raises(ConfigError, match="rank 24 is none of those vllm can be set to"):
        pad(tmp_path / "src", tmp_path / "out", engine="vllm", rank=24)
    with pytest.raises(ConfigError, match=r"q_proj has rank 200, above the 64 to pad to"):
        pad(tmp_path / "src", tmp_path / "out", engine="vllm", rank=64)
    with pytest.raises(ConfigError, match="rank 0 cannot be padded to"):
        pad(tmp_path / "src", tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match="a rank or an engine"):
        pad(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = squeeze(tmp_path / "src", tmp_path / "out", keep=True, max_rank=60, engine="lorax")
    assert max(report.ranks.values()) == 60
    assert opened(tmp_path / "out")[0]["r"] == 64


def test_what_does_not_go_together(tmp_path: Path):
    write(tmp_path / "src", uniform(2), uniform(2))
    with pytest.raises(ConfigError, match="no engine is called 'vlm'"):
        squeeze(tmp_path / "src", target_rank=1, engine="vlm")
    with pytest.raises(ConfigError, match="vllm is written peft; leave out the format kohya"):
        squeeze(tmp_path / "src", target_rank=1, engine="vllm", to_format="kohya")
    with pytest.raises(ConfigError, match="zeros fill all up to the largest"):
        squeeze(tmp_path / "src", size=5000, engine="vllm")
    with pytest.raises(ConfigError, match="a residual belongs to an adapter that is not made for an engine"):
        squeeze(tmp_path / "src", target_rank=1, engine="vllm", keep_residual=tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match="target_rank and keep are 2 targets"):
        squeeze(tmp_path / "src", target_rank=1, keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_adalora_is_not_loaded_as_it_is_and_served_once_written(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        src = saved(tmp_path / "src", masked=True)
    for name in ("vllm", "tensorrt-llm", "llamacpp"):
        found = [(p.where, p.fate.value) for p in check(src, name).problems]
        assert found[0] == ("AdaLoRA", "refused")
        assert [fate for _, fate in found[1:]] == (["not known"] if name == "tensorrt-llm" else [])  # layers it joins
    before = logits(src)
    squeeze(src, tmp_path / "out", keep=True, engine="vllm")
    config, factors = opened(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 8
    assert {len(a) for a, _ in factors.values()} == {8}
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=2e-6)


FORMS = {  # reader, engine -> fate; refused where nothing is said
    "vera": {},
    "drawn vera": {},
    "pvera": {},
    "miss": {},
    "loha": {},
    "randlora": {},
    "adalora": {"lorax": "silent"},
    "middles": {"sglang": "not known", "lorax": "silent", "peft": "silent"},
    "full": {"peft": "refused"},
}


@pytest.mark.parametrize("reader", FORMS)
def test_what_engines_make_of_what_is_no_plain_lora(tmp_path: Path, reader: str):
    put(tmp_path / "x", READERS[reader]())
    src = tmp_path / "x" / "full" if reader == "full" else tmp_path / "x"
    base = tmp_path / "x" / "base" if (tmp_path / "x" / "base").is_dir() else None
    for engine in (*PEFT_ENGINES, "llamacpp", "peft"):
        found = check(src, engine, base=base).problems
        fate = FORMS[reader].get(engine, "" if engine == "peft" else "refused")
        # What is to be written anew may be incomplete besides, which no writing mends
        assert [p.fate.value for p in found if "leaves a type out" not in p.does] == ([fate] if fate else []), engine
        if not found:
            continue
        problem, *_ = found
        said = {"full": "is a whole model and no adapter", "middles": "what stands between A and B"}
        said |= {"adalora": "AdaLoRA's factors"}
        assert said.get(reader, "adapters of a PEFT type other than LORA") in problem.does
        if engine in ("vllm", "sglang", "tensorrt-llm"):  # what is advised is done, and was right
            run(*problem.remedy.split()[1:], "-o", tmp_path / engine)
            assert check(tmp_path / engine, engine).problems == ()


@pytest.mark.parametrize(
    ("config", "out"),
    [
        (VeraConfig(r=3, target_modules=["q_proj"]), "out.gguf"),
        (RandLoraConfig(r=4, randlora_alpha=8, target_modules=["q_proj"]), "out"),  # of PEFT's alone GGUF is made
    ],
)
def test_the_way_to_llamacpp_of_what_is_no_plain_lora(tmp_path: Path, config: PeftConfig, out: str):
    live(tmp_path, config)
    words = ("--engine", "llamacpp", "--base", tmp_path / "base")
    data = json.loads(run("check", tmp_path / "src", *words, "--json", status=1).stdout)
    (problem,) = data["problems"]
    assert problem["remedy"].endswith(f"--base {tmp_path / 'base'}")
    run(*problem["remedy"].split()[1:], "-o", tmp_path / out)
    if out == "out":
        run("check", tmp_path / out, *words)
        run("squeeze", tmp_path / out, *words, "-o", tmp_path / "out.gguf")


# -- image models ----------------------------------------------------------------------------------------------------


def header_scaled(folder: Path, factors: Factors, scale: float) -> Path:
    """A diffusers file whose scale is in the header alone."""
    rank = next(iter(factors.values()))[0].shape[0]
    config = {"unet.r": rank, "unet.lora_alpha": scale * rank, "unet.target_modules": list(factors)}
    tensors = styled(factors, "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, folder / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    return folder / "x.safetensors"


def test_comfyui_does_not_read_headers(tmp_path: Path):
    factors = drawn(UNET, scale=3.0)
    path = header_scaled(tmp_path, factors, 3.0)
    (problem,) = check(path, "comfyui").problems
    assert problem.fate.value == "silent"
    assert "scales by 1 and not by 3: 0.333 times as strong" in problem.does
    assert check(path, "diffusers").problems == ()
    report = squeeze(path, error=0.05, across=True, engine="comfyui")
    assert len(set(report.ranks.values())) > 1
    squeeze(path, tmp_path / "kept.safetensors", keep=True, engine="comfyui")
    tensors = load_file(tmp_path / "kept.safetensors")
    for name, f in factors.items():
        torch.testing.assert_close(comfy(tensors, f"unet.{name}"), delta(*f), rtol=1e-5, atol=1e-6)
    assert check(tmp_path / "kept.safetensors", "comfyui").problems == ()
    assert check(str(report.out), "comfyui").problems == ()


def test_diffusers_before_14409_needs_alphas_where_ranks_differ(tmp_path: Path):
    names = list(UNET)
    factors = drawn({n: UNET[n] for n in names[:2]}, scale=1.0) | drawn({names[2]: UNET[names[2]]}, rank=2, scale=1.0)
    path = tmp_path / "x.safetensors"
    save_file(styled(factors, "unet.", ".lora_A.weight", ".lora_B.weight"), path)
    assert [p.fate.value for p in check(path, "diffusers").problems] == ["silent"]
    squeeze(path, tmp_path / "out.safetensors", keep=True, engine="diffusers")
    assert set(diffusers_config(tmp_path / "out.safetensors", "unet.").values()) == {1.0}
    assert check(tmp_path / "out.safetensors", "diffusers").problems == ()


@pytest.mark.parametrize("engine", ["diffusers", "comfyui"])
def test_image_engines_do_not_load_peft_folders(tmp_path: Path, engine: str):
    factors = drawn(UNET, scale=0.7)
    save_file(kohya(factors), tmp_path / "k.safetensors")
    squeeze(tmp_path / "k.safetensors", tmp_path / "p", keep=True, to_format="peft")
    assert [p.where for p in check(tmp_path / "p", engine).problems] == ["format"]
    squeeze(tmp_path / "p", tmp_path / "out.safetensors", keep=True, engine=engine)
    tensors = load_file(tmp_path / "out.safetensors")
    for name, f in factors.items():
        torch.testing.assert_close(comfy(tensors, f"unet.{name}"), delta(*f), rtol=1e-5, atol=1e-6)
    assert check(tmp_path / "k.safetensors", engine).problems == ()


def test_a_single_file_is_padded_and_keeps_its_scale(tmp_path: Path):
    factors = drawn(UNET, scale=0.7)
    save_file(kohya(factors), tmp_path / "k.safetensors")
    pad(tmp_path / "k.safetensors", tmp_path / "out.safetensors", rank=10)
    tensors = load_file(tmp_path / "out.safetensors")
    for name, f in factors.items():
        stem = "lora_unet_" + name.replace(".", "_")
        assert tensors[f"{stem}.lora_down.weight"].shape[0] == 10
        torch.testing.assert_close(comfy(tensors, stem), delta(*f), rtol=1e-5, atol=1e-6)
    pad(tmp_path / "k.safetensors", tmp_path / "p", rank=10, to_format="peft")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (10, 10, {})


# -- the command line ------------------------------------------------------------------------------------------------


def test_on_the_command_line(tmp_path: Path):
    src = tmp_path / "src"
    wanted = write(src, {n: 2 + i for i, n in enumerate(LINEAR)}, uniform(4), rslora=True)
    done = run("check", src, "--engine", "vllm", status=1)
    for word in ("rank_pattern", "times as strong", "silent", "--engine vllm"):
        assert word in " ".join(done.stdout.split())
    data = json.loads(run("check", src, "--engine", "llamacpp", "--json", status=1).stdout)
    assert {p["fate"] for p in data["problems"]} == {"silent"}
    assert sorted(name for p in data["problems"] for name in p["modules"]) == sorted(LINEAR)
    assert "loads it as it is" in run("check", src, "--engine", "peft").stdout
    assert "say what is to serve it with --engine" in run("check", src, status=2).stderr
    assert "no engine is called" in run("check", src, "--engine", "vlm", status=2).stderr
    run("squeeze", src, "--engine", "vllm")
    assert same(vllm(tmp_path / "src-vllm"), wanted)
    assert "loads it as it is. start vllm with --max-lora-rank 16 or more" in run(
        "check", tmp_path / "src-vllm", "--engine", "vllm"
    ).stdout.replace("\n", " ")
    run("squeeze", src, "--engine", "vllm", "--max-rank", "3", "-o", tmp_path / "three")
    assert opened(tmp_path / "three")[0]["r"] == 8
    run("pad", src, "--rank", "16", "-o", tmp_path / "sixteen")
    assert opened(tmp_path / "sixteen")[0]["r"] == 16
    assert same(peft(tmp_path / "sixteen"), wanted)
    run("pad", src, "--rank", "16")
    assert (tmp_path / "src-pad16").is_dir()
    assert "no target" in run("squeeze", src, status=2).stderr
