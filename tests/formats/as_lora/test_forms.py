"""Adapters of other kinds read as plain LoRA: the same DeltaW as PEFT's own layers give, before and after a squeeze."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import base_of, gpt2_base, inputs_of, llama_base, wrap
from peft import (
    DeloraConfig,
    GraloraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    PveraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankflow import AdapterError, CheckpointError, ConfigError, inspect, restore, squeeze
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.serving.verdicts import check

T = ["q_proj", "k_proj", "down_proj"]
TRAINED = ("vera_lambda", "hada_", "lokr_", "vblora_", "unilora_theta", "delora_", "miss_block", "gralora_")


def saved(folder: Path, config: PeftConfig, base: nn.Module | None = None) -> PeftModel:
    """A live model with random factors, its adapter and base saved to `folder`/src and /base."""
    if base is None:
        torch.manual_seed(0)
        base = llama_base().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(base, "config"):
            base.save_pretrained(folder / "base")
        model = get_peft_model(base, config)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if any(part in name for part in TRAINED):
                    p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        model.save_pretrained(folder / "src")
    return model.eval()


def delta_of(adapter: PeftAdapter, name: str) -> Tensor:
    a, b = (t.double() for t in adapter.factors(name))
    return adapter.layout[name].scaling * b @ a


def peft_delta(layer: nn.Module) -> Tensor:
    """What merging adds to the layer's weight; MiSS has no other way to tell."""
    if not hasattr(layer, "miss_block"):
        return layer.get_delta_weight("default").detach().double()
    weight = layer.get_base_layer().weight.detach()
    with torch.no_grad():
        return layer.get_delta_weight_miss("default", torch.zeros_like(weight)).detach().double()


def agrees(model: PeftModel, adapter: PeftAdapter) -> None:
    """Every module's DeltaW is PEFT's own to rounding, and PEFT has no other modules."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(layers) == set(adapter.layout)
    for name, layer in layers.items():
        wanted = peft_delta(layer)
        found = delta_of(adapter, name)
        found = found.mT if getattr(layer, "fan_in_fan_out", False) else found
        assert wanted.norm() > 1e-5
        assert (found.reshape(wanted.shape) - wanted).norm() <= 3e-7 * wanted.norm(), name


FORMS: dict[str, tuple[PeftConfig, dict[str, int]]] = {
    "VeRA": (VeraConfig(r=5, target_modules=T), dict.fromkeys(T, 5)),
    "PVeRA": (PveraConfig(r=3, target_modules=T, sample_at_inference=False), dict.fromkeys(T, 3)),
    "LoHa": (LoHaConfig(r=2, alpha=5, target_modules=T), dict.fromkeys(T, 4)),
    "LoHa of full rank": (LoHaConfig(r=5, alpha=3, target_modules=T), {"q_proj": 16, "k_proj": 8, "down_proj": 16}),
    "LoHa of several ranks": (
        LoHaConfig(r=2, alpha=5, target_modules=T, rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.*k_proj": 7}),
        {"q_proj": 9, "k_proj": 4, "down_proj": 4},
    ),
    "LoKr": (LoKrConfig(r=1, alpha=5, target_modules=T), {"q_proj": 4, "k_proj": 2, "down_proj": 4}),
    "LoKr of whole factors": (
        LoKrConfig(r=4, alpha=3, target_modules=T, alpha_pattern={"k_proj": 9}),
        {"q_proj": 16, "k_proj": 8, "down_proj": 16},
    ),
    "LoKr of two pairs": (
        LoKrConfig(r=1, alpha=5, target_modules=T, decompose_both=True),
        {"q_proj": 1, "k_proj": 1, "down_proj": 1},
    ),
    "VB-LoRA": (
        VBLoRAConfig(r=3, topk=2, num_vectors=9, vector_length=4, target_modules=T),
        dict.fromkeys(T, 3),
    ),
    "VB-LoRA of weights": (
        VBLoRAConfig(r=3, topk=3, num_vectors=9, vector_length=4, target_modules=T, save_only_topk_weights=True),
        dict.fromkeys(T, 3),
    ),
    "Uni-LoRA": (UniLoraConfig(r=3, theta_d_length=50, target_modules=T, save_indices=True), dict.fromkeys(T, 3)),
    "DeLoRA": (DeloraConfig(r=3, target_modules=T), dict.fromkeys(T, 3)),
    "MiSS": (MissConfig(r=3, target_modules=T), dict.fromkeys(T, 3)),
    "MiSS of full rank": (MissConfig(r=12, target_modules=T), {"q_proj": 12, "k_proj": 8, "down_proj": 12}),
    "MiSS of parts": (MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=T), dict.fromkeys(T, 4)),
    "GraLoRA": (GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=T), dict.fromkeys(T, 8)),
    "GraLoRA with LoRA": (GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=3, target_modules=T), dict.fromkeys(T, 11)),
}


@pytest.mark.parametrize("form", FORMS)
def test_delta_and_logits_are_those_of_the_live_model(tmp_path: Path, form: str):
    config, ranks = FORMS[form]
    model = saved(tmp_path, config)
    adapter = PeftAdapter(tmp_path / "src", tmp_path / "base")
    assert {name.split(".")[-1]: slot.rank for name, slot in adapter.layout.items()} == ranks
    assert form.partition(" ")[0] in adapter.notes[0]
    agrees(model, adapter)
    report = squeeze(tmp_path / "src", tmp_path / "out", target_rank=64, base=tmp_path / "base")
    assert {m.energy_kept for m in report.modules} == {1.0}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(llama_base(), str(tmp_path / "out")).eval()
        torch.testing.assert_close(
            again(inputs_of("linear")).logits, model(inputs_of("linear")).logits, rtol=0, atol=1e-5
        )
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA"
    assert not said.keys() & {"projection_prng_key", "alpha", "d_initial", "decompose_both", "rank_dropout"}


@pytest.mark.parametrize("form", ["VeRA", "LoHa", "LoKr"])
def test_a_squeeze_is_the_truncated_svd_of_peft_s_own_delta(tmp_path: Path, form: str):
    model = saved(tmp_path, FORMS[form][0])
    report = squeeze(tmp_path / "src", tmp_path / "out", target_rank=1, base=tmp_path / "base")
    small = PeftAdapter(tmp_path / "out")
    for module in report.modules:
        delta = model.get_submodule(f"base_model.model.{module.name}").get_delta_weight("default").detach().double()
        U, S, Vh = torch.linalg.svd(delta)
        torch.testing.assert_close(delta_of(small, module.name), S[0] * torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-5)
        assert module.energy_kept == pytest.approx(float(S[0] ** 2 / S.square().sum()), abs=1e-5)
        assert module.error == pytest.approx(float(S[1:].norm()), rel=1e-4, abs=1e-6)


def test_vera_draws_what_was_not_saved_as_peft_does(tmp_path: Path):
    for kind in (VeraConfig, PveraConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT advises against it
            config = kind(r=5, target_modules=T, save_projection=False, projection_prng_key=7)
        (tmp_path / kind.__name__).mkdir()
        model = saved(tmp_path / kind.__name__, config)
        assert not any("vera_A" in key for key in load_file(tmp_path / kind.__name__ / "src/adapter_model.safetensors"))
        agrees(model, PeftAdapter(tmp_path / kind.__name__ / "src", tmp_path / kind.__name__ / "base"))


def test_vera_finds_its_base_by_itself_or_asks_for_it(tmp_path: Path):
    model = saved(tmp_path, VeraConfig(r=5, target_modules=T))
    with pytest.raises(ConfigError, match=r"VeRA does not say how wide .*--base"):
        inspect(tmp_path / "src")
    about = tmp_path / "src" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    agrees(model, PeftAdapter(tmp_path / "src"))
    inner = tmp_path / "inner"  # as AutoModel saves it: without the head, and without the name of what is inside it
    inner.mkdir()
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k.removeprefix("model."): t for k, t in tensors.items()}, inner / "model.safetensors")
    agrees(model, PeftAdapter(tmp_path / "src", inner))
    save_file({k: t for k, t in tensors.items() if "k_proj" not in k}, inner / "model.safetensors")
    with pytest.raises(AdapterError, match=r"no such linear layer as .*k_proj"):
        PeftAdapter(tmp_path / "src", inner)


def test_conv1d_of_transformers_stays_transposed(tmp_path: Path):
    torch.manual_seed(0)
    base = gpt2_base().eval()
    config = VeraConfig(r=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    model = saved(tmp_path, config, base)
    agrees(model, PeftAdapter(tmp_path / "src", tmp_path / "base"))
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=3, base=tmp_path / "base")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("config", "loads"),
    [
        (LoHaConfig(r=2, alpha=5, target_modules=["c1", "c2"], use_effective_conv2d=True), True),
        (LoKrConfig(r=1, alpha=5, target_modules=["c1", "c2"], use_effective_conv2d=True), True),
        (LoKrConfig(r=4, alpha=5, target_modules=["c1", "c2"]), True),
        (LoHaConfig(r=2, alpha=5, target_modules=["c1", "c2"]), False),
        (LoKrConfig(r=1, alpha=5, target_modules=["c1", "c2"]), False),
    ],
)
def test_convolutions(tmp_path: Path, config: PeftConfig, loads: bool):
    model = saved(tmp_path, config, base_of("conv", dtype=torch.float32))
    adapter = PeftAdapter(tmp_path / "src")
    agrees(model, adapter)
    assert {slot.kind for slot in adapter.layout.values()} == {"conv" if loads else "linear"}
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=64)
    if loads:
        x = inputs_of("conv", dtype=torch.float32)
        again = PeftModel.from_pretrained(base_of("conv", dtype=torch.float32), str(tmp_path / "out"))
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)


# -- a matrix between A and B -----------------------------------------------------------------------------------------

MIDDLES = {
    "as LoRA-XS saves it": ("_lora_latent_mapping.weight", "LoRA-XS"),
    "as newer PEFT saves it": (".default_lora_latent_mapping.weight", "LoRA-XS"),
    "NLoRA": (".lora_N.weight", "NLoRA"),
}


def with_middles(folder: Path, ending: str, dtype: torch.dtype = torch.float32, **options) -> dict[str, Tensor]:
    """A LoRA's files with an r x r matrix between its factors; module -> DeltaW."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=T, init_lora_weights=False, **options)
    wrap(llama_base().to(dtype), config, autocast_adapter_dtype=False).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    g = torch.Generator().manual_seed(3)
    for key in [key for key in tensors if "lora_A" in key]:
        module = key.removesuffix(".lora_A.weight")
        tensors[module + ending] = torch.randn(4, 4, generator=g).to(dtype)
        a, r, b = (tensors[module + part].double() for part in (".lora_A.weight", ending, ".lora_B.weight"))
        deltas[module.removeprefix("base_model.model.")] = 1.5 * b @ r @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("how", MIDDLES)
def test_a_middle_matrix_is_folded(tmp_path: Path, how: str):
    ending, named = MIDDLES[how]
    deltas = with_middles(tmp_path / "src", ending)
    adapter = PeftAdapter(tmp_path / "src")
    assert named in adapter.notes[0]
    assert {slot.rank for slot in adapter.layout.values()} == {4}
    assert set(adapter.layout) == set(deltas)
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        live = PeftModel.from_pretrained(llama_base(), str(tmp_path / "out"))
    for name, wanted in deltas.items():
        torch.testing.assert_close(delta_of(adapter, name), wanted, rtol=0, atol=1e-5)
        found = live.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not any("latent" in key or "lora_N" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))


def test_a_middle_of_half_precision_is_not_rounded(tmp_path: Path):
    deltas = with_middles(tmp_path / "src", ".lora_N.weight", torch.bfloat16)
    adapter = PeftAdapter(tmp_path / "src")
    for name, wanted in deltas.items():
        assert (delta_of(adapter, name) - wanted).norm() <= 1e-6 * wanted.norm()


def test_nlora_s_own_init_is_not_asked_of_peft(tmp_path: Path):
    with_middles(tmp_path / "src", ".lora_N.weight")
    about = tmp_path / "src" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"init_lora_weights": "n_lora"}))
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=2)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_what_engines_make_of_it(tmp_path: Path):
    with_middles(tmp_path / "src", "_lora_latent_mapping.weight")
    for engine in ("peft", "vllm"):  # PEFT loads A and B and leaves R out
        (problem,) = check(tmp_path / "src", engine).problems
        assert "rankflow squeeze" in problem.remedy
    squeeze(tmp_path / "src", tmp_path / "out", engine="peft", keep=True)
    assert not check(tmp_path / "out", "peft").problems
    model = wrap(llama_base(), LoraConfig(r=4, target_modules=T))
    with pytest.raises(CheckpointError, match="is LoRA-XS"):
        restore(model, tmp_path / "src")


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "PROMPT_TUNING": "puts vectors before the input",
    "PREFIX_TUNING": "puts vectors before the input",
    "P_TUNING": "puts vectors before the input",
    "IA3": "multiplies the base weight",
    "LN_TUNING": "trains the norms",
    "OFT": "multiplies the base weight",
    "BOFT": "multiplies the base weight",
    "HRA": "multiplies the base weight",
    "XLORA": "mixes adapters by the input",
    "POLY": "by the task",
    "HIRA": "is made of the base weight",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_lora_equals_is_refused_by_name(tmp_path: Path, kind: str):
    saved(tmp_path, FORMS["LoHa"][0])
    about = tmp_path / "src" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"peft_type": kind}))
    with pytest.raises(AdapterError, match=f"is {kind}, wh(ich|ose) .*{REFUSED[kind]}"):
        squeeze(tmp_path / "src", target_rank=2)


def test_every_kind_that_peft_has_is_read_or_refused_with_a_reason():
    from peft import PeftType

    from rankflow.formats.as_lora.registry import known_types

    assert {kind.value for kind in PeftType} <= {*known_types()}


def damage(folder: Path, change, **config) -> None:
    weights, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, weights)
    about.write_text(json.dumps(json.loads(about.read_text()) | config))


Q = "base_model.model.model.layers.0.self_attn.q_proj."
DAMAGE = {
    "VeRA, no d": ("VeRA", lambda t: t.pop(Q + "vera_lambda_d"), {}, "q_proj has no vera_lambda_d"),
    "VeRA, d of another rank": (
        "VeRA",
        lambda t: t.update({Q + "vera_lambda_d": torch.ones(4)}),
        {},
        "make no VeRA",
    ),
    "VeRA, narrow A": (
        "VeRA",
        lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"][:, :20]}),
        {},
        "too small",
    ),
    "VeRA, NaN": ("VeRA", lambda t: t[Q + "vera_lambda_b"].fill_(torch.nan), {}, "NaN"),
    "VeRA, no rank": ("VeRA", lambda t: None, {"r": "many"}, "r is 'many'"),
    "VeRA, others": ("VeRA", lambda t: [t.pop(k) for k in [*t] if "lambda" in k], {}, "share and no module"),
    "LoHa, no half": ("LoHa", lambda t: t.pop(Q + "hada_w2_b"), {}, "no hada_w2_b"),
    "LoHa, shapes": ("LoHa", lambda t: t.update({Q + "hada_w2_b": torch.ones(2, 9)}), {}, "make no LoHa"),
    "LoHa, whole numbers": ("LoHa", lambda t: t.update({Q + "hada_w2_b": torch.ones(2, 16).int()}), {}, "int32"),
    "LoHa, twice": ("LoHa", lambda t: t.update({Q + "hada_w2_b.other": torch.ones(2, 16)}), {}, "twice"),
    "LoHa, alpha": ("LoHa", lambda t: None, {"alpha": 0}, "alpha is 0"),
    "LoKr, no half": ("LoKr", lambda t: t.pop(Q + "lokr_w2_b"), {}, "no lokr_w2_b"),
    "LoKr, shapes": ("LoKr", lambda t: t.update({Q + "lokr_w2_b": torch.ones(3, 4)}), {}, "make no LoKr"),
    "PVeRA, sampled": ("PVeRA", lambda t: None, {"sample_at_inference": True}, "anew for every input"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_refused(tmp_path: Path, name: str):
    form, change, config, message = DAMAGE[name]
    saved(tmp_path, FORMS[form][0])
    damage(tmp_path / "src", change, **config)
    with pytest.raises(AdapterError, match=message):
        squeeze(tmp_path / "src", tmp_path / "out", target_rank=2, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "lora_A.weight"), "no lora_A"),
        (lambda t: t.pop(Q + "lora_N.weight"), "no matrix between A and B while others do"),
        (lambda t: t.update({Q + "lora_N.weight": torch.ones(3, 4)}), "do not fit"),
    ],
)
def test_a_damaged_middle_is_refused(tmp_path: Path, change, message: str):
    with_middles(tmp_path / "src", ".lora_N.weight")
    damage(tmp_path / "src", change)
    with pytest.raises(AdapterError, match=message):
        squeeze(tmp_path / "src", target_rank=2)


@pytest.mark.parametrize("form", ["LoHa of several ranks", "VeRA"])
def test_a_size_is_kept(tmp_path: Path, form: str):
    saved(tmp_path, FORMS[form][0])
    for size in (3500, 5000):
        squeeze(tmp_path / "src", tmp_path / f"{size}", size=size, base=tmp_path / "base")
        assert 0.7 * size < (tmp_path / f"{size}" / "adapter_model.safetensors").stat().st_size <= size
