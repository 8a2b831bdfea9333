"""Squeezing saved adapters: optimal by a dense SVD worked out here, loadable by PEFT itself, never half done."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import minilm_base
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from loops import tiny_llama, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankflow
from rankflow import AdapterError, ConfigError, inspect, squeeze, squeeze_model
from rankflow.compress import cutting
from rankflow.formats.io import atomic
from rankflow.formats.io.tensors import open_tensors
from rankflow.formats.io.writers import SafetensorsWriter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.lora.adapter import Adapter
from rankflow.plans.layout import Layout, Slot

TARGETS = r"layers\.\d\.(q|up)"  # a list would match vis.layers too, by the ends of names
LINEARS = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.up = nn.Linear(12, 20)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 16))


class Net(nn.Module):
    """One layer of every kind, under names that end alike."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.vis = nn.Module()
        self.vis.layers = nn.ModuleList([Block()])
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.conv3 = nn.Conv3d(3, 8, 2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.emb = nn.Embedding(30, 12)
        self.attn = nn.MultiheadAttention(12, 2)
        self.experts = Experts()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1].q(self.layers[0].q(self.emb(x))))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(config: LoraConfig, seed: int = 1) -> PeftModel:
    """A PEFT model whose every adapter tensor is random, as if trained."""
    model = get_peft_model(base(), config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=g) * torch.rand((), generator=g) + 0.05)
    return model


def saved(folder: Path, config: LoraConfig, seed: int = 1, **kwargs) -> Path:
    trained(config, seed).save_pretrained(folder, save_embedding_layers=False, **kwargs)
    return folder


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base(), str(folder))


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """Name in the base model -> DeltaW ``[experts, rows, columns]`` in float64, as PEFT itself would merge it."""
    out = {}
    for name, layer in model.double().named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            delta = layer.get_delta_weight("default").detach()
            name = name.removeprefix("base_model.model.")
            out[name] = delta if "experts" in name else delta.flatten(1)[None]
    return out


def ranks_of(model: PeftModel) -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.r
    }


def scalings_of(model: PeftModel) -> dict[str, float]:
    return {n: m.scaling["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.scaling}


def assert_optimal(before: dict[str, Tensor], after: dict[str, Tensor], ranks: dict[str, int]) -> None:
    """Each DeltaW is as near as the best of its rank, within 1e-5 of the largest singular value."""
    for name, delta in before.items():
        for expert, whole in enumerate(delta):
            sigma = torch.linalg.svdvals(whole)
            optimum = sigma[ranks[name] :].square().sum().sqrt()
            found = torch.linalg.matrix_norm(whole - after[name][expert])
            assert found <= optimum + 1e-5 * sigma[0], name
            assert torch.linalg.matrix_rank(after[name][expert], rtol=1e-6) <= ranks[name], name


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    """A saved rank-6 adapter on four linears; the test fails if its bytes change."""
    src = saved(tmp_path / "src", LoraConfig(r=6, lora_alpha=12, target_modules=TARGETS))
    before = digest(src)
    yield src
    assert digest(src) == before


# -- the result is right --------------------------------------------------------------------------------------------

KINDS = {
    "linear": LoraConfig(r=6, target_modules=TARGETS),
    "rslora": LoraConfig(r=6, lora_alpha=7, use_rslora=True, target_modules=TARGETS),
    "mixed": LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["q", "up"],
        rank_pattern={"layers.0.q": 3, "up": 8},
        alpha_pattern={"layers.1.q": 5, r"layers\.\d+\.up": 2.5},
    ),
    "conv": LoraConfig(r=6, target_modules=["conv1", "conv2", "conv3"]),
    "embedding": LoraConfig(r=6, target_modules=["emb", "layers.0.q"]),
    "attention": LoraConfig(r=6, target_modules=["attn", "layers.0.q"]),
    "experts": LoraConfig(r=6, target_modules=["layers.0.q"], target_parameters=["experts.gate_up_proj"]),
    "nested experts": LoraConfig(
        r=6, target_modules=["layers.0.q"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
}


# PEFT applies patterns to expert parameters and then warns that it did not.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.8}, {"max_params": 0.4}], ids=str)
def test_every_layer_kind_is_squeezed_to_the_optimum_and_loads_in_peft(tmp_path: Path, kind: str, target: dict):
    src = saved(tmp_path / "src", KINDS[kind])
    before, bytes_before = loaded(src), digest(src)
    if "max_params" in target:
        target = {"max_params": int(target["max_params"] * PeftAdapter(src).layout.params)}
    report = squeeze(src, tmp_path / "out", **target)
    after = loaded(tmp_path / "out")
    ranks = ranks_of(after)
    wanted = deltas(before)
    found = {name: torch.zeros_like(delta) for name, delta in wanted.items()} | deltas(after)
    assert_optimal(wanted, found, {name: ranks.get(name, 0) for name in wanted})
    assert scalings_of(after) == {n: pytest.approx(scalings_of(before)[n], rel=1e-15) for n in scalings_of(after)}
    assert sorted(ranks.values()) == sorted(r for r in report.ranks.values() if r)
    assert digest(src) == bytes_before
    change = math.sqrt(sum(float((wanted[n] - found[n]).square().sum()) for n in wanted))
    assert report.error == pytest.approx(change, rel=1e-5)
    total = sum(float(d.square().sum()) for d in wanted.values())
    assert report.energy_kept == pytest.approx(1 - change**2 / total, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_expert_parameters_of_different_rank_are_told_apart_by_it(tmp_path: Path):
    config = LoraConfig(
        r=6,
        target_modules=["layers.0.q"],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={"experts.down_proj": 4},
    )
    src = saved(tmp_path / "src", config)
    layout = PeftAdapter(src).layout
    assert {n: (s.rank, s.in_features, s.experts) for n, s in layout.items() if s.kind == "experts"} == {
        "experts.down_proj": (4, 16, 3),
        "experts.gate_up_proj": (6, 10, 3),
    }
    squeeze(src, tmp_path / "out", max_params=layout.params * 2 // 3)
    before, after = deltas(loaded(src)), deltas(loaded(tmp_path / "out"))
    assert_optimal(before, after, ranks_of(loaded(tmp_path / "out")))


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_mixed_ranks_and_alphas_under_any_scaling_rule(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("mixed")
    names = [*LINEARS, "vis.layers.0.q", "vis.layers.0.up"]
    number = st.integers(1, 11)
    config = LoraConfig(
        r=data.draw(number),
        lora_alpha=data.draw(number),
        use_rslora=data.draw(st.booleans()),
        target_modules=r"(vis\.)?layers\.\d\.(q|up)",
        rank_pattern={f"^{n}": data.draw(number) for n in names if data.draw(st.booleans())},
        alpha_pattern={f"^{n}": data.draw(number) for n in names if data.draw(st.booleans())},
    )
    target = data.draw(number)
    src = saved(folder / "src", config, seed=data.draw(st.integers(0, 99)))
    squeeze(src, folder / "out", target_rank=target)
    before, after = loaded(src), loaded(folder / "out")
    assert ranks_of(after) == {name: min(r, target) for name, r in ranks_of(before).items()}
    assert scalings_of(after) == pytest.approx(scalings_of(before), rel=1e-15)
    assert_optimal(deltas(before), deltas(after), ranks_of(after))


def test_factors_are_balanced_or_keep_their_ratio(plain: Path, tmp_path: Path):
    squeeze(plain, tmp_path / "balanced", target_rank=3)
    squeeze(plain, tmp_path / "kept", target_rank=3, gauge="keep")
    source = PeftAdapter(plain)
    for name in source.layout:
        a, b = (t.double() for t in PeftAdapter(tmp_path / "balanced").factors(name))
        torch.testing.assert_close(a @ a.mT, b.mT @ b, rtol=1e-5, atol=1e-5)
        was, now = source.factors(name), PeftAdapter(tmp_path / "kept").factors(name)
        assert float(now[0].norm() / now[1].norm()) == pytest.approx(float(was[0].norm() / was[1].norm()), rel=1e-4)


@pytest.mark.parametrize("backend", ["torch", "fbpca", "sklearn"])
def test_randomised_backends_agree_with_the_exact_one(plain: Path, tmp_path: Path, backend):
    report = squeeze(plain, tmp_path / "out", target_rank=3, backend=backend)
    assert report.backend == backend
    assert_optimal(deltas(loaded(plain)), deltas(loaded(tmp_path / "out")), ranks_of(loaded(tmp_path / "out")))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", ["mixed", "experts", "embedding"])
@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.7, "across": True}], ids=str)
def test_modules_of_one_shape_are_factorised_at_once_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: dict
):
    src, sizes, seen = saved(tmp_path / "src", KINDS[kind]), [], []
    alone = squeeze(src, tmp_path / "alone", **target)
    monkeypatch.setattr(cutting, "pays_on", lambda device: True)
    at_once = cutting.spectra
    monkeypatch.setattr(cutting, "spectra", lambda pairs, s: sizes.append(len(pairs)) or at_once(pairs, s))
    together = squeeze(src, tmp_path / "together", **target, progress=lambda *at: seen.append(at))
    assert max(sizes) > 1
    assert seen[-1][0] == seen[-1][1] == 2 * len(together.modules)
    assert together.ranks == alone.ranks
    for name, delta in deltas(loaded(tmp_path / "alone")).items():
        torch.testing.assert_close(deltas(loaded(tmp_path / "together"))[name], delta, rtol=1e-5, atol=1e-6)


def test_a_batch_holds_no_more_than_memory_allows(monkeypatch: pytest.MonkeyPatch):
    layout = Layout({f"m{i}": Slot(4, 10, 20 if i % 2 else 30, 1.0) for i in range(10)})
    monkeypatch.setattr(cutting, "_BYTES", 3 * 8 * 4 * 30)
    groups = cutting.by_shape(layout, layout, dict.fromkeys(layout, torch.float32))
    assert groups == [("m0", "m2"), ("m4", "m6"), ("m8",), ("m1", "m3", "m5"), ("m7", "m9")]
    assert len(cutting.by_shape(layout, layout, {n: n for n in layout})) == 10, "dtypes are not mixed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.7, "across": True}], ids=str)
def test_a_gpu_comes_to_the_same_as_the_cpu(tmp_path: Path, dtype: str, target: dict):
    src = saved(tmp_path / "src", KINDS["mixed"])
    squeeze(src, tmp_path / "cpu", dtype=dtype, **target)
    squeeze(src, tmp_path / "cuda", dtype=dtype, device="cuda", **target)
    there = deltas(loaded(tmp_path / "cuda"))
    for name, delta in deltas(loaded(tmp_path / "cpu")).items():
        torch.testing.assert_close(there[name], delta, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-4)


def test_energy_takes_the_smallest_rank_that_keeps_it(plain: Path, tmp_path: Path):
    report = squeeze(plain, tmp_path / "out", energy=0.7)
    for name, delta in deltas(loaded(plain)).items():
        power = torch.linalg.svdvals(delta[0]).square()
        share = power.cumsum(0) / power.sum()
        assert report.ranks[name] == int((share < 0.7).sum()) + 1


def test_max_params_spends_the_budget_where_singular_values_are_largest(plain: Path, tmp_path: Path):
    report = squeeze(plain, tmp_path / "out", max_params=400)
    assert report.params_after <= 400
    sigma = {name: torch.linalg.svdvals(delta[0]).square() for name, delta in deltas(loaded(plain)).items()}
    cost = {m.name: m.params_before // m.rank_before for m in report.modules}
    left = 400 - report.params_after
    worth = {n: float(s[report.ranks[n]]) / cost[n] for n, s in sigma.items() if cost[n] <= left}
    kept = {n: float(sigma[n][r - 1]) / cost[n] for n, r in report.ranks.items() if r}
    assert not worth or max(worth.values()) <= min(kept.values())
    assert sum(report.ranks.values()) < 24


def test_a_module_that_is_zero_leaves_and_comes_back_as_nothing(tmp_path: Path):
    model = trained(LoraConfig(r=4, target_modules=r"(vis\.)?layers\.\d\.(q|up)"))
    model.base_model.model.layers[0].q.lora_B["default"].weight.data.zero_()
    model.save_pretrained(tmp_path / "src")
    report = squeeze(tmp_path / "src", tmp_path / "out", energy=1.0)
    assert report.ranks["layers.0.q"] == 0
    assert any("layers.0.q" in note for note in report.notes)
    after = loaded(tmp_path / "out")
    assert "layers.0.q" not in ranks_of(after)  # and vis.layers.0.q, whose name ends alike, is still there
    assert ranks_of(after)["vis.layers.0.q"] == 4
    x = torch.arange(6)
    torch.testing.assert_close(after(x), loaded(tmp_path / "src")(x))


def test_energy_one_drops_only_directions_that_are_rounding(tmp_path: Path):
    model = trained(LoraConfig(r=6, target_modules=TARGETS))
    for block in model.base_model.model.layers:
        block.q.lora_A["default"].weight.data[3:] = block.q.lora_A["default"].weight.data[:3]
    model.save_pretrained(tmp_path / "src")
    report = squeeze(tmp_path / "src", tmp_path / "out", energy=1.0)
    assert report.ranks == {"layers.0.q": 3, "layers.0.up": 6, "layers.1.q": 3, "layers.1.up": 6}
    assert report.error < 1e-5


def test_a_fresh_adapter_still_learns_after_a_uniform_squeeze(tmp_path: Path):
    get_peft_model(base(), LoraConfig(r=6, target_modules=TARGETS)).save_pretrained(tmp_path / "src")
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=2)
    model = PeftModel.from_pretrained(base(), str(tmp_path / "out"), is_trainable=True)
    x = torch.arange(6)
    torch.testing.assert_close(model(x), base()(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = None
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if first is None else first
    assert model(x).square().mean().item() < first
    rank = torch.linalg.matrix_rank(model.base_model.model.layers[0].q.lora_A["default"].weight)
    assert int(rank) == 2


def test_a_fresh_adapter_has_no_energy_to_go_by(tmp_path: Path):
    get_peft_model(base(), LoraConfig(r=6, target_modules=TARGETS)).save_pretrained(tmp_path / "src")
    for target in ({"energy": 0.9}, {"max_params": 200}):
        with pytest.raises(ConfigError, match=r"zero.*target_rank"):
            squeeze(tmp_path / "src", tmp_path / "out", **target)
    assert not (tmp_path / "out").exists()


def test_modules_at_or_below_the_target_are_bit_identical(tmp_path: Path):
    src = saved(tmp_path / "src", LoraConfig(r=6, target_modules=TARGETS, rank_pattern={"up": 2}))
    squeeze(src, tmp_path / "out", target_rank=4)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (src, tmp_path / "out"))
    same = [key for key in old if old[key].shape == new[key].shape and torch.equal(old[key], new[key])]
    assert sorted({key.split(".")[-3] for key in same}) == ["up"]


def test_nothing_to_do_is_said(plain: Path, tmp_path: Path):
    report = squeeze(plain, tmp_path / "out", target_rank=6)
    assert any("as it was" in note for note in report.notes)
    assert digest(plain)["adapter_model.safetensors"] == digest(tmp_path / "out")["adapter_model.safetensors"]
    assert (report.error, report.energy_kept) == (0, 1)


# -- what surrounds the factors -------------------------------------------------------------------------------------


def test_magnitudes_biases_and_saved_modules_pass_through(tmp_path: Path):
    config = LoraConfig(r=6, target_modules=["q", "conv2"], use_dora=True, bias="lora_only", modules_to_save=["head"])
    src = saved(tmp_path / "src", config)
    report = squeeze(src, tmp_path / "out", target_rank=2)
    assert any("DoRA" in note and "estimate" in note for note in report.notes)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (src, tmp_path / "out"))
    assert old.keys() == new.keys()
    others = [key for key in old if not re.search(r"lora_[AB]\.weight", key)]
    assert len(others) == 10
    assert all(torch.equal(old[key], new[key]) for key in others)
    loaded(tmp_path / "out")


def test_a_module_with_a_bias_is_kept_even_when_its_factors_are_zero(tmp_path: Path):
    model = trained(LoraConfig(r=4, target_modules=TARGETS, lora_bias=True))
    model.base_model.model.layers[0].q.lora_B["default"].weight.data.zero_()
    with pytest.warns(UserWarning, match="1-D"):  # PEFT takes its own biases for sharded weights
        model.save_pretrained(tmp_path / "src")
    report = squeeze(tmp_path / "src", tmp_path / "out", energy=0.9)
    assert report.ranks["layers.0.q"] == 1
    x = torch.arange(6)
    bias = loaded(tmp_path / "out").base_model.model.layers[0].q.lora_B["default"].bias
    assert torch.equal(bias, model.base_model.model.layers[0].q.lora_B["default"].bias)
    loaded(tmp_path / "out")(x)


def test_the_config_keeps_everything_but_ranks(tmp_path: Path):
    src = saved(tmp_path / "src", LoraConfig(r=6, lora_alpha=12, target_modules=["q", "up"], rank_pattern={"up": 4}))
    config = json.loads((src / "adapter_config.json").read_text()) | {"from_the_future": {"x": 1}}
    (src / "adapter_config.json").write_text(json.dumps(config))
    squeeze(src, tmp_path / "uniform", target_rank=2)
    new = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    changed = {key for key in config if config[key] != new[key]}
    assert changed == {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    ups = {rf"^{re.escape(f'{p}layers.{i}.up')}" for p, i in (("", 0), ("", 1), ("vis.", 0))}
    assert (new["r"], new["lora_alpha"], new["rank_pattern"]) == (2, 4, {})
    assert new["alpha_pattern"] == dict.fromkeys(ups, 6)
    squeeze(src, tmp_path / "mixed", target_rank=5)
    new = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert (new["r"], new["lora_alpha"]) == (5, 10)
    assert new["rank_pattern"] == dict.fromkeys(ups, 4)
    assert new["alpha_pattern"] == dict.fromkeys(ups, 12)


def test_companions_are_copied_and_training_state_is_not(plain: Path, tmp_path: Path):
    shutil.copytree(plain, tmp_path / "ckpt")
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "ckpt" / name).write_text(name)
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth"):
        (tmp_path / "ckpt" / name).write_text(name)
    report = squeeze(tmp_path / "ckpt", tmp_path / "out", target_rank=2)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", *report.copied}
    assert set(report.copied) == {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


def test_bin_files_and_keys_with_the_adapter_name(plain: Path, tmp_path: Path):
    squeeze(plain, tmp_path / "reference", target_rank=2)
    tensors = load_file(plain / "adapter_model.safetensors")
    for folder, rename in (("bin", lambda k: k), ("named", lambda k: k.replace(".weight", ".default.weight"))):
        (tmp_path / folder).mkdir()
        shutil.copy(plain / "adapter_config.json", tmp_path / folder)
        torch.save({rename(k): t for k, t in tensors.items()}, tmp_path / folder / "adapter_model.bin")
        report = squeeze(tmp_path / folder, target_rank=2)
        assert report.out == str(tmp_path / f"{folder}-r2")
        assert (tmp_path / f"{folder}-r2" / "adapter_model.bin").is_file()
        for name, delta in deltas(loaded(tmp_path / "reference")).items():
            assert torch.equal(deltas(loaded(tmp_path / f"{folder}-r2"))[name], delta)


def test_an_old_torch_file_that_cannot_be_mapped_is_read_too(plain: Path, tmp_path: Path):
    (tmp_path / "old").mkdir()
    shutil.copy(plain / "adapter_config.json", tmp_path / "old")
    tensors = load_file(plain / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "old" / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert squeeze(tmp_path / "old", tmp_path / "out", target_rank=2).ranks == dict.fromkeys(LINEARS, 2)


def test_a_file_of_any_name_with_its_config_beside_it(plain: Path, tmp_path: Path):
    shutil.copytree(plain, tmp_path / "hub")
    (tmp_path / "hub" / "adapter_model.safetensors").rename(tmp_path / "hub" / "mine.safetensors")
    report = squeeze(tmp_path / "hub" / "mine.safetensors", target_rank=2)
    assert report.out == str(tmp_path / "hub" / "mine-r2")
    assert ranks_of(loaded(tmp_path / "hub" / "mine-r2")) == dict.fromkeys(LINEARS, 2)
    assert squeeze(plain / "adapter_model.safetensors", energy=0.5).out == str(tmp_path / "src-e0.5")


def test_the_written_file_is_what_safetensors_itself_would_read_and_write(plain: Path, tmp_path: Path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(7, dtype=torch.int8),
    }
    specs = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    writer = SafetensorsWriter(tmp_path / "x.safetensors", specs, {"format": "pt"})
    for key in reversed(tensors):
        writer.put(key, tensors[key])
    writer.close()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for key, t in tensors.items():
        torch.testing.assert_close(found[key], t, rtol=0, atol=0)
    assert open_tensors(tmp_path / "x.safetensors")[1] == {"format": "pt"}


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("float16", 2), (torch.float32, 4)])
def test_dtype(plain: Path, tmp_path: Path, dtype, itemsize: int):
    report = squeeze(plain, tmp_path / "out", target_rank=2, dtype=dtype)
    assert {t.element_size() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {itemsize}
    assert report.bytes_after == itemsize * report.params_after
    loaded(tmp_path / "out")


def test_half_precision_that_overflows_is_refused(tmp_path: Path):
    model = trained(LoraConfig(r=4, target_modules=TARGETS))
    model.base_model.model.layers[0].q.lora_A["default"].weight.data.mul_(1e12)
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(ConfigError, match=r"layers\.0\.q.*float16.*bfloat16"):
        squeeze(tmp_path / "src", tmp_path / "out", target_rank=2, dtype="fp16")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_bfloat16_sources_are_computed_in_more_digits_than_they_have(tmp_path: Path):
    trained(LoraConfig(r=6, target_modules=TARGETS)).bfloat16().save_pretrained(tmp_path / "src")
    squeeze(tmp_path / "src", tmp_path / "out", target_rank=3, dtype="float32")
    before, after = deltas(loaded(tmp_path / "src")), deltas(loaded(tmp_path / "out"))
    assert_optimal(before, after, dict.fromkeys(LINEARS, 3))


# -- in memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_name_and_measure_modules_as_live_models_do(tmp_path: Path, kind: str):
    src = saved(tmp_path / "src", KINDS[kind])
    live, filed = Adapter(loaded(src)).layout(), PeftAdapter(src).layout
    assert set(live) == set(filed)
    for name, slot in live.items():
        for field in (
            "rank",
            "in_features",
            "out_features",
            "scaling",
            "kind",
            "experts",
            "itemsize",
            "min_rank",
            "max_rank",
        ):
            assert getattr(filed[name], field) == getattr(slot, field), (name, field)


@pytest.mark.parametrize("target", [{"target_rank": 3}, {"energy": 0.7}, {"max_params": 500}], ids=str)
@pytest.mark.parametrize("gauge", ["keep", "balanced"])
def test_a_model_in_memory_and_its_file_are_squeezed_alike(tmp_path: Path, target: dict, gauge):
    src = saved(tmp_path / "src", KINDS["mixed"])
    model = loaded(src)
    report = squeeze_model(model, gauge=gauge, **target)
    filed = squeeze(src, tmp_path / "file", gauge=gauge, **target)
    assert report.ranks == filed.ranks
    model.save_pretrained(tmp_path / "model")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("model", "file"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert ranks_of(loaded(tmp_path / "model")) == ranks_of(loaded(tmp_path / "file"))


@pytest.mark.parametrize("which", ["llama", "minilm"])
def test_a_squeeze_is_the_same_live_and_from_the_file(tmp_path: Path, which: str):
    """A trained adapter (rsLoRA, mixed alphas, dropout, a second adapter beside it): one plan has the same bits both
    ways, and the plan that the policy makes while training has the same DeltaW."""
    model = tiny_llama(r=6) if which == "llama" else encoder()
    train(model, 4)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    before = updates(model)
    live, trained = copy.deepcopy(model), copy.deepcopy(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = squeeze(tmp_path, tmp_path / "file", target_rank=2, gauge="keep")
        assert squeeze_model(live, target_rank=2).ranks == report.ranks
    finally:
        torch.set_num_threads(threads)
    live.save_pretrained(tmp_path / "live", selected_adapters=["default"])
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("live", "file"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], weight_decay=0.0)
    policy = {"policy": "squeeze", "budget": {"mean_rank": 2}, "when": {"start": 1, "every": 1}}
    with rankflow.attach(trained, optimizer, policy | {"params": {"allocate": "uniform"}}, total_steps=1) as flow:
        flow.before_step()
        optimizer.step()  # without gradients: the weights stay
        flow.after_step()
        assert set(flow.layout.ranks.values()) == {2}
    wanted = updates(live)
    for name, found in updates(trained).items():
        size = torch.linalg.matrix_norm(before[name])
        assert torch.linalg.matrix_norm(found - wanted[name]) <= 1e-6 * size, name
        assert 1e-3 * size < torch.linalg.matrix_norm(wanted[name] - before[name]) < size, name


def encoder() -> PeftModel:
    """The real MiniLM with two adapters, the first to be trained."""
    targets = ["query", "value", "intermediate.dense"]
    options = {"use_rslora": True, "lora_alpha": 8, "lora_dropout": 0.1, "alpha_pattern": {"query": 5, "value": 3.5}}
    model = get_peft_model(minilm_base(), LoraConfig(r=6, target_modules=targets, **options))
    model.add_adapter("other", LoraConfig(r=3, target_modules=targets[:2]))
    return model


def train(model: PeftModel, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    torch.manual_seed(0)
    for batch in token_batches(steps):
        out = model(input_ids=batch["input_ids"])
        (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def updates(model: PeftModel) -> dict[str, Tensor]:
    """Name -> scaling B A ``[out, in]`` in float64, the model left as it is."""
    return {n: s.scaling * s.b().detach().double() @ s.a().detach().double() for n, s in Adapter(model).sites.items()}


def test_squeezing_a_fresh_model_leaves_one_that_learns():
    model = get_peft_model(base(), LoraConfig(r=6, target_modules=TARGETS))
    squeeze_model(model, target_rank=2)
    assert set(ranks_of(model).values()) == {2}
    model(torch.arange(6)).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n and ".q." in n]
    assert all(bool((g != 0).all(0).any()) for g in grads)


def test_a_model_is_as_it_was_after_a_bad_option():
    model = trained(LoraConfig(r=6, target_modules=TARGETS))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for options in ({}, {"target_rank": 2, "metric": "loss"}, {"max_params": 1}, {"target_rank": 2, "gauge": "x"}):
        with pytest.raises(ConfigError):
            squeeze_model(model, **options)
    with pytest.raises(AdapterError, match="nobody"):
        squeeze_model(model, target_rank=2, adapter_name="nobody")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- bad input ------------------------------------------------------------------------------------------------------


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder: Path, **fields) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


Q = "base_model.model.layers.0.q.lora_"
WEIGHTS = "adapter_model.safetensors"
DAMAGE = {
    "A without B": (lambda f: spoil(f, lambda t: t.pop(Q + "B.weight")), r"layers\.0\.q has lora_A but no lora_B"),
    "B without A": (lambda f: spoil(f, lambda t: t.pop(Q + "A.weight")), r"layers\.0\.q has lora_B but no lora_A"),
    "NaN": (lambda f: spoil(f, lambda t: t[Q + "A.weight"].view(-1)[3].fill_(torch.nan)), r"layers\.0\.q.*NaN"),
    "infinity": (lambda f: spoil(f, lambda t: t[Q + "B.weight"].view(-1)[3].fill_(-torch.inf)), r"layers\.0\.q.*infin"),
    "ranks differ": (lambda f: spoil(f, lambda t: t.update({Q + "B.weight": torch.ones(12, 5)})), "do not agree"),
    "sharded": (lambda f: spoil(f, lambda t: t.update({Q + "A.weight": torch.ones(0)})), "is empty"),
    "integers": (lambda f: spoil(f, lambda t: t.update({Q + "A.weight": torch.ones(6, 12).int()})), "floating"),
    "no LoRA": (lambda f: spoil(f, lambda t: [t.pop(k) for k in list(t) if "lora_" in k]), "no lora_A"),
    "strange state": (
        lambda f: spoil(f, lambda t: t.update({Q + "diag": torch.ones(6)})),
        "lora_diag is not a tensor of plain LoRA",
    ),
    "two adapters": (
        lambda f: spoil(f, lambda t: t.update({Q + f"{p}.other.weight": t[Q + f"{p}.weight"].clone() for p in "AB"})),
        "several adapters",
    ),
    "rank of another": (lambda f: configure(f, r=5), r"has rank 6 .*adapter_config.json says 5"),
    "pattern of another": (lambda f: configure(f, rank_pattern={"layers.1.up": 4}), r"layers\.1\.up has rank 6"),
    "truncated": (lambda f: truncate(f / WEIGHTS, 0.6), "truncated or corrupt"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "truncated or corrupt"),
    "corrupt": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 4096), "truncated or corrupt"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "not saved whole"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
    "config cut": (lambda f: truncate(f / "adapter_config.json", 0.5), "not JSON"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "not a JSON object"),
    "AdaLoRA": (lambda f: configure(f, peft_type="ADALORA"), "init_r is None"),
    "unknown type": (lambda f: configure(f, peft_type="GIZMO"), "GIZMO.*convert_to_lora"),
    "no type": (lambda f: configure(f, peft_type=None), "None.*not the config of a PEFT adapter"),
    "zero rank": (lambda f: configure(f, r=0), "r .*is 0"),
    "alpha a word": (lambda f: configure(f, lora_alpha="many"), "lora_alpha .*'many'"),
    "pattern a list": (lambda f: configure(f, rank_pattern=[3]), "rank_pattern is not a mapping"),
    "KaSA": (lambda f: configure(f, kasa_config={"beta": 1}), "kasa_config makes this KaSA"),
    "PiSSA": (lambda f: configure(f, init_lora_weights="pissa_niter_4"), "pissa.*path_initial_model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_one_clear_error_and_nothing_is_written(plain: Path, tmp_path: Path, damage: str):
    harm, message = DAMAGE[damage]
    shutil.copytree(plain, tmp_path / "bad")
    harm(tmp_path / "bad")
    before = digest(tmp_path / "bad")
    for attempt in (
        lambda: squeeze(tmp_path / "bad", tmp_path / "out", target_rank=2),
        lambda: inspect(tmp_path / "bad"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            attempt()
        assert str(tmp_path / "bad") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert digest(tmp_path / "bad") == before
    assert {p.name for p in tmp_path.iterdir()} == {"src", "bad"}


def test_a_bin_that_would_run_code_is_refused_and_does_not_run(plain: Path, tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (plain / "adapter_model.safetensors").rename(tmp_path / "kept")
    torch.save({"x": Bomb()}, plain / "adapter_model.bin")
    with pytest.raises(AdapterError, match="only tensors are ever loaded"):
        squeeze(plain, tmp_path / "out", target_rank=2)
    assert not (tmp_path / "ran").exists()
    (plain / "adapter_model.bin").write_bytes(b"not a file")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        squeeze(plain, tmp_path / "out", target_rank=2)
    torch.save([1, 2], plain / "adapter_model.bin")
    with pytest.raises(AdapterError, match="dict of tensors"):
        squeeze(plain, tmp_path / "out", target_rank=2)
    (plain / "adapter_model.bin").unlink()
    (tmp_path / "kept").rename(plain / "adapter_model.safetensors")


def test_folders_that_are_something_else(plain: Path, tmp_path: Path):
    with pytest.raises(AdapterError, match="no such file or folder"):
        squeeze(tmp_path / "nowhere", target_rank=2)
    (tmp_path / "model").mkdir()
    with pytest.raises(AdapterError, match="no adapter"):
        squeeze(tmp_path / "model", target_rank=2)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"whole model.*merged"):
        squeeze(tmp_path / "model", target_rank=2)
    with pytest.raises(AdapterError, match="holds src; name one"):
        squeeze(tmp_path, target_rank=2)
    with pytest.raises(AdapterError, match="not an adapter"):
        squeeze(plain / "adapter_config.json", target_rank=2)


def test_a_saved_attention_is_one_module_of_two_parts(tmp_path: Path):
    saved(tmp_path / "src", LoraConfig(r=4, target_modules=["attn", "head"]))
    layout = PeftAdapter(tmp_path / "src").layout
    assert {name: (slot.kind, slot.tie) for name, slot in layout.items()} == {
        "attn": ("attention", "attn"),
        "attn.out_proj": ("attention", "attn"),
        "head": ("linear", None),
    }


def test_a_folder_of_adapters_asks_which(tmp_path: Path):
    for name in ("second", "first"):
        saved(tmp_path / name, LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(AdapterError, match="holds first, second; name one of them"):
        squeeze(tmp_path, tmp_path / "out", target_rank=1)


def test_grouped_convolutions_are_refused_by_name(tmp_path: Path):
    with pytest.warns(UserWarning, match="groups > 1"):
        model = get_peft_model(base(), LoraConfig(r=4, target_modules=["grouped", "conv2"]))
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(AdapterError, match="grouped is a convolution of 2 groups"):
        squeeze(tmp_path / "src", target_rank=2)


def test_expert_parameters_of_different_alpha_on_one_module_are_refused(tmp_path: Path):
    src = saved(tmp_path / "src", KINDS["nested experts"])
    configure(src, alpha_pattern={"experts.down_proj": 3})
    with pytest.raises(AdapterError, match=r"experts has .* adapted at different alphas"):
        squeeze(src, target_rank=2)


OPTIONS = {
    "none": ({}, "no target.*target_rank, energy, error.*max_params"),
    "two": ({"target_rank": 2, "energy": 0.5}, "target_rank and energy are 2 targets"),
    "three": ({"target_rank": 2, "energy": 0.5, "max_params": 9}, "3 targets"),
    "rank 0": ({"target_rank": 0}, "target_rank is 0"),
    "rank not whole": ({"target_rank": 2.5}, "target_rank is 2.5"),
    "energy 0": ({"energy": 0.0}, "energy is 0"),
    "energy in percent": ({"energy": 90}, "energy is 90; it is the share"),
    "energy NaN": ({"energy": math.nan}, "energy is nan"),
    "too few parameters": ({"max_params": 3}, "does not buy a single direction"),
    "metric": ({"target_rank": 2, "metric": "outputs"}, "metric 'outputs' needs statistics.*'weights'"),
    "backend": ({"target_rank": 2, "backend": "magic"}, "backend.*magic"),
    "dtype": ({"target_rank": 2, "dtype": "int8"}, "dtype 'int8' is not one of"),
    "device": ({"target_rank": 2, "device": "abacus"}, "device 'abacus' cannot be used"),
    "no device": ({"target_rank": 2, "device": "meta"}, "device 'meta' cannot be used"),
    "gauge": ({"target_rank": 2, "gauge": "free"}, "gauge.*free"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_impossible_options(plain: Path, tmp_path: Path, case: str):
    options, message = OPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        squeeze(plain, tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_destinations(plain: Path, tmp_path: Path):
    for out in (plain, tmp_path, plain / "..", tmp_path / "x" / ".." / "src"):
        with pytest.raises(ConfigError, match="replace its own source"):
            squeeze(plain, out, target_rank=2, force=True)
    squeeze(plain, tmp_path / "out", target_rank=2)
    with pytest.raises(ConfigError, match=r"is there already.*--force"):
        squeeze(plain, tmp_path / "out", target_rank=3)
    squeeze(plain, tmp_path / "out", target_rank=3, force=True)
    assert set(ranks_of(loaded(tmp_path / "out")).values()) == {3}
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="not an adapter folder"):
        squeeze(plain, tmp_path / "papers", target_rank=3, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", "papers"}


def test_a_dry_run_says_the_same_and_writes_nothing(plain: Path, tmp_path: Path):
    for target in ({"target_rank": 3}, {"energy": 0.8}, {"max_params": 300}):
        dry = squeeze(plain, tmp_path / "out", dry_run=True, **target)
        assert dry.out is None
        assert {p.name for p in tmp_path.iterdir()} == {"src"}
        wet = squeeze(plain, tmp_path / "out", **target)
        assert dry.modules == wet.modules
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_a_failing_write_leaves_nothing_behind(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
):
    if there:
        squeeze(plain, tmp_path / "out", target_rank=4)
    before = {p.name: digest(p) for p in tmp_path.iterdir()}
    put, calls = SafetensorsWriter.put, []

    def full_disk(self, key, tensor):
        calls.append(key)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        put(self, key, tensor)

    monkeypatch.setattr(SafetensorsWriter, "put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        squeeze(plain, tmp_path / "out", target_rank=2, force=True)
    assert {p.name: digest(p) for p in tmp_path.iterdir()} == before


def test_a_failing_rename_puts_the_old_output_back(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    squeeze(plain, tmp_path / "out", target_rank=4)
    before = {p.name: digest(p) for p in tmp_path.iterdir()}
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # where it takes two renames
    with pytest.raises(OSError, match="Input/output"):
        squeeze(plain, tmp_path / "out", target_rank=2, force=True)
    assert {p.name: digest(p) for p in tmp_path.iterdir()} == before


def test_torch_keeps_its_threads_and_random_state(plain: Path, tmp_path: Path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seen = []
    squeeze(
        plain, tmp_path / "out", energy=0.9, backend="torch", progress=lambda done, total: seen.append((done, total))
    )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(i, 8) for i in range(1, 9)]


# -- looking in -----------------------------------------------------------------------------------------------------


def test_inspect_gives_the_spectrum_of_the_dense_update(tmp_path: Path):
    src = saved(tmp_path / "src", KINDS["mixed"])
    found = {m.name: m for m in inspect(src).modules}
    for name, delta in deltas(loaded(src)).items():
        m = found[name]
        sigma = torch.linalg.svdvals(delta[0])[: m.rank]
        p = sigma / sigma.sum()
        torch.testing.assert_close(torch.tensor(m.sigma, dtype=torch.float64), sigma, rtol=1e-5, atol=1e-6)
        assert m.rank_effective == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-5)
        assert m.rank_stable == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-5)
        for k, share in m.energy.items():
            assert share == pytest.approx(float(sigma[:k].square().sum() / sigma.square().sum()), rel=1e-6)
    json.dumps(inspect(src).to_json(), allow_nan=False)


def test_inspect_of_a_fresh_adapter_is_all_zero_and_finite(tmp_path: Path):
    get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "src")
    for m in inspect(tmp_path / "src").modules:
        assert (m.rank_true, m.rank_effective, m.rank_stable, sum(m.sigma)) == (0, 0, 0, 0)
    json.dumps(inspect(tmp_path / "src").to_json(), allow_nan=False)
