"""Inspections against numbers worked out from dense matrices, and pictures against what is in them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from rankflow import ConfigError, Signal, Statistics, calibrate, inspect, squeeze
from rankflow.analysis.inspection import Inspection
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.plans.names import arrange
from rankflow.render.figure import DARK, LIGHT, Paper, png
from rankflow.render.spectra_figure import spectra_figure
from tests.calibration.test_collect import llama, token_batches
from tests.cli.test_app import refused, run

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def make(folder: Path, names: list[str], rank: int = 8, *, seed: int = 0, width: int = 32) -> Path:
    """An adapter whose singular values decay, each module's at its own pace."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        a = torch.linalg.qr(torch.randn(width, rank, generator=g))[0].T
        b = torch.linalg.qr(torch.randn(width, rank, generator=g))[0]
        sigma = 0.05 + torch.exp(-torch.arange(rank) * (0.2 + torch.rand(1, generator=g)))
        tensors[f"base_model.model.{name}.lora_A.weight"] = (sigma[:, None] * a).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def layered(layers: int, types: list[str]) -> list[str]:
    return [f"model.layers.{i}.{t}" for i in range(layers) for t in types]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter and its statistics, for the loss."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = llama()
    model.save_pretrained(folder / "adapter")
    calibrate(model, token_batches()).save(folder / "stats.safetensors")
    return folder / "adapter", folder / "stats.safetensors"


def test_ranks_above_the_noise_are_those_that_squeeze_gives_by_itself(tmp_path: Path):
    src = make(tmp_path / "src", layered(3, LLAMA), rank=16, width=48)
    found = inspect(src)
    assert {m.name: m.rank_above_noise for m in found.modules} == squeeze(src, auto=True, dry_run=True).ranks
    assert len({m.rank_above_noise for m in found.modules}) > 2
    for m in found.modules:
        assert sum(s > m.noise_threshold for s in m.sigma) == m.rank_above_noise


def test_types_are_means_over_their_modules(tmp_path: Path):
    tensors = load_file(make(tmp_path / "src", layered(3, LLAMA)) / "adapter_model.safetensors")
    found = inspect(tmp_path / "src")
    assert [t.type for t in found.types] == sorted(LLAMA)
    squares, stable, energy = {}, {}, {}
    for key in tensors:
        if ".lora_A." in key:
            sigma = np.linalg.svd(2.0 * (tensors[key.replace("lora_A", "lora_B")] @ tensors[key]).double().numpy())[1]
            kind = key.split(".", 5)[-1].removesuffix(".lora_A.weight")
            squares.setdefault(kind, []).append((sigma**2).sum())
            stable.setdefault(kind, []).append((sigma**2).sum() / sigma[0] ** 2)
            energy.setdefault(kind, []).append((sigma[:2] ** 2).sum() / (sigma**2).sum())
    for kind in found.types:
        assert (kind.modules, kind.rank, kind.rank_min, kind.rank_max) == (3, 8.0, 8, 8)
        assert kind.rank_stable == pytest.approx(np.mean(stable[kind.type]), rel=1e-5)
        assert kind.energy[2] == pytest.approx(np.mean(energy[kind.type]), rel=1e-5)
        assert kind.energy_share == pytest.approx(sum(squares[kind.type]) / sum(map(sum, squares.values())), rel=1e-5)
    assert sum(t.energy_share for t in found.types) == pytest.approx(1)


def test_mixed_ranks_and_an_adapter_that_was_never_trained(tmp_path: Path):
    src = make(tmp_path / "src", layered(2, ["q", "up"]))
    squeeze(src, tmp_path / "mixed", max_params=4 * 32 * 2 * 3)
    for kind in inspect(tmp_path / "mixed").types:
        ranks = [m.rank for m in inspect(tmp_path / "mixed").modules if m.name.endswith(kind.type)]
        assert (kind.rank_min, kind.rank_max, kind.rank) == (min(ranks), max(ranks), sum(ranks) / 2)
    tensors = load_file(src / "adapter_model.safetensors")
    save_file({k: t * ("lora_A" in k) for k, t in tensors.items()}, src / "adapter_model.safetensors")
    found = inspect(src)
    assert {m.rank_above_noise for m in found.modules} == {0}
    assert {t.energy_share for t in found.types} == {0.0}
    json.dumps(found.to_json(), allow_nan=False)


def test_spectra_in_the_metrics_of_data(calibrated: tuple[Path, Path]):
    src, path = calibrated
    adapter, statistics = PeftAdapter(src), Statistics.load(path)
    found = inspect(src, calibration=path)
    assert found.metrics == ("outputs", "loss")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in token_batches())
    for m in found.modules:
        averages = statistics.measured[m.name]
        B, zz = 1.5 * adapter.factors(m.name)[1].double(), averages[Signal.MEAN_ZZ]
        squares = {
            "outputs": torch.linalg.eigvalsh(B @ zz @ B.T),
            "loss": torch.linalg.eigvals(zz @ averages[Signal.MEAN_DD]).real,
        }
        assert m.tokens == int(averages[Signal.MEASURED].min()) == tokens
        for metric, values in squares.items():
            sigma = values.clamp(min=0).sqrt().sort(descending=True).values[: m.rank]
            p = sigma / sigma.sum()
            shown = m.metrics[metric]
            torch.testing.assert_close(torch.tensor(shown.sigma, dtype=torch.float64), sigma, rtol=1e-4, atol=1e-9)
            assert shown.rank_effective == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-4)
            assert shown.rank_effective != pytest.approx(m.rank_effective, rel=1e-2)
        assert m.sigma == next(n.sigma for n in inspect(src).modules if n.name == m.name)


def test_statistics_that_do_not_serve(calibrated: tuple[Path, Path], tmp_path: Path):
    src, path = calibrated
    part = calibrate(llama(), token_batches(), metric="outputs")
    assert inspect(src, calibration=part).metrics == ("outputs",)
    few = calibrate(llama(), [{k: t[:1, :3] for k, t in token_batches()[0].items()}])
    found = inspect(src, calibration=few)
    assert {(m.tokens, *m.metrics) for m in found.modules} == {(3,)}
    assert "6 of 6 modules were measured over fewer tokens than they have directions" in found.notes[0]
    other = make(tmp_path / "other", [m.name for m in found.modules], rank=4, width=16)
    with pytest.raises(ConfigError, match="another adapter"):
        inspect(other, calibration=path)
    assert "another adapter" in refused("inspect", other, "--calibration", path)
    assert "is not a statistics file" in refused("inspect", other, "--calibration", other / "adapter_config.json")


def test_the_command_shows_types_and_metrics(calibrated: tuple[Path, Path]):
    src, path = calibrated
    shown = run("inspect", src, "--modules", "--calibration", path).stdout
    heading = shown[shown.rindex("module") :].split()
    assert {"tokens", "outputs", "loss"} <= set(heading)
    (line,) = [line.split() for line in shown.splitlines() if line.split()[:2] == ["mlp.down_proj", "2"]]
    assert line[2] == "4.0"
    data = json.loads(run("inspect", src, "--calibration", path, "--json").stdout)
    assert {tuple(m["metrics"]) for m in data["modules"]} == {("outputs", "loss")}
    assert [t["modules"] for t in data["types"]] == [2, 2, 2]


def test_names_of_kohya_are_layered_too():
    rows = arrange(["lora_unet_blocks_10_attn1_to_q", "lora_unet_blocks_2_attn1_to_q", "lora_unet_mid_to_q"])
    assert [(r.label, r.layer) for r in rows] == [
        ("blocks_*_attn1_to_q", "2"),
        ("blocks_*_attn1_to_q", "10"),
        ("mid_to_q", ""),
    ]


# -- pictures -------------------------------------------------------------------------------------------------------


def drawn(found: Inspection) -> dict[str, tuple[np.ndarray, list[str], list[np.ndarray]]]:
    """Of every panel: its values [rows, directions], its row labels, and the marks on it [rows]."""
    panels = {}
    for ax in spectra_figure(found).axes:
        if ax.get_visible() and ax.get_title(loc="left"):
            (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
            lines = [c for c in ax.collections if isinstance(c, LineCollection)]
            marks = [np.array([segment[0, 0] for segment in c.get_segments()]) for c in lines]
            labels = [t.get_text() for t in ax.get_yticklabels()]
            panels[ax.get_title(loc="left")] = (np.ma.filled(mesh.get_array(), np.nan), labels, marks)
    return panels


@pytest.mark.parametrize("layers", [1, 32])
def test_every_type_has_a_panel_with_a_row_for_every_layer(tmp_path: Path, layers: int):
    found = inspect(make(tmp_path / "src", layered(layers, LLAMA)))
    modules = {m.name: m for m in found.modules}
    panels = drawn(found)
    assert sorted(panels) == sorted(LLAMA)
    for kind, (values, labels, (noise, effective)) in panels.items():
        rows = [modules[f"model.layers.{i}.{kind}"] for i in range(layers)]
        np.testing.assert_allclose(values, np.array([m.sigma for m in rows]))
        np.testing.assert_allclose(effective, [m.rank_effective + 0.5 for m in rows])
        np.testing.assert_allclose(noise, [m.rank_above_noise + 0.5 for m in rows])
        assert labels == [str(i) for i in range(layers)][:: math.ceil(layers / 16)]


def test_directions_beyond_a_rank_are_left_blank(tmp_path: Path):
    src = make(tmp_path / "src", layered(2, ["q", "up"]))
    squeeze(src, tmp_path / "mixed", energy=0.9)
    found = inspect(tmp_path / "mixed")
    (values, _, _), ranks = drawn(found)["q"], [m.rank for m in found.modules if m.name.endswith("q")]
    assert (~np.isnan(values)).sum(1).tolist() == ranks
    assert values.shape[1] == max(m.rank for m in found.modules)


def test_modules_that_are_each_of_their_own_kind_share_a_panel(tmp_path: Path):
    names = [f"part.{chr(97 + i)}" for i in range(20)] + layered(2, ["q"])
    panels = drawn(inspect(make(tmp_path / "src", names)))
    assert {title: len(values) for title, (values, _, _) in panels.items()} == {
        "model.layers.*.q": 2,
        "one of a kind": 20,
    }
    assert panels["one of a kind"][1][0] == "part.a"


def test_pictures_come_on_light_and_on_dark_paper(tmp_path: Path):
    found = inspect(make(tmp_path / "src", layered(2, ["q"])))
    light, dark = (pixels(found, paper) for paper in (LIGHT, DARK))
    assert light.shape == dark.shape
    assert light[2, 2].mean() > 0.95 > 0.2 > dark[2, 2].mean()


def pixels(found: Inspection, paper: Paper) -> np.ndarray:
    return imread(io.BytesIO(png(spectra_figure(found, paper))), format="png")[..., :3]
