"""Tables say what they are given; pictures show every module and leave matplotlib's global state alone."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from rankflow.analysis.inspection import InspectedModule, Inspection
from rankflow.compress.report import SqueezedModule, SqueezeReport
from rankflow.errors import CheckpointError, ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.names import arrange, shortened
from rankflow.plans.ops import Drop, Grow
from rankflow.plans.plan import RankPlan
from rankflow.render.adapter_tables import inspection_table, squeeze_table
from rankflow.render.run_figure import ledger_figure, plot_ledger, plot_spectra
from rankflow.render.run_tables import events_table, gates_table, ranks_table
from rankflow.render.spectra_figure import spectra_figure
from rankflow.render.table import Table
from rankflow.training.ledger import Ledger

TYPES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]


def text(table: Table, width: int = 200) -> str:
    console = Console(width=width, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


def names(layers: int) -> list[str]:
    return [f"model.layers.{i}.{t}" for i in range(layers) for t in TYPES]


def run(layers: int) -> Ledger:
    layout = Layout({name: Slot(2, 16, 16, 2.0) for name in names(layers)})
    ledger, rng = Ledger(), random.Random(0)
    ledger.append("attach", 0, layout=layout.to_json(), total_steps=100)
    ledger.append("phase", 0, policy="increlora", end=60)
    for step in (10, 20, 30):
        plan = RankPlan({name: [Grow(rng.randint(1, 3))] for name in rng.sample(list(layout), layers)}, "grew")
        layout = plan.apply_to(layout)
        ledger.append("resize", step, plan, policy="increlora", reason="grew", ranks={"x": 1}, total_rank=7, params=8)
    ledger.append("phase", 60, policy="squeeze", end=101)
    plan = RankPlan({names(layers)[0]: [Drop()]}, "dropped")
    ledger.append("resize", 70, plan, policy="squeeze", reason="dropped", ranks={names(layers)[0]: 0})
    ledger.append("skip", 80, policy="squeeze", reason="loss is not finite")
    ledger.append("finish", 100)
    return ledger


def inspected(layers: int, rank: int = 4, *, zero: bool = False) -> Inspection:
    sigma = tuple(0.0 if zero else 2.0**-i for i in range(rank))
    energy = {1: 0.75, 2: 0.9, 4: 1.0, 8: 1.0, 16: 1.0}
    modules = tuple(
        InspectedModule(n, "linear", rank, 8, 8, 2.0, 64, sigma, rank, 2.5, 1.3, energy) for n in names(layers)
    )
    return Inspection("some/adapter", modules, 1000, 4000, 5000)


def squeezed(layers: int) -> SqueezeReport:
    modules = tuple(
        SqueezedModule(n, 8, 3 + (i % 2), 0.9, 0.5, 80, 30, "weights", 0.3, 0.3) for i, n in enumerate(names(layers))
    )
    return SqueezeReport(
        "a", "b", {"energy": 0.9}, "weights", "exact", "balanced", None, False, modules, 0.91, 2.0, 0.3, 0.3, 0.0,
        4000, 1500, notes=("DoRA: an estimate",),
    )  # fmt: skip


def test_rows_are_grouped_by_type_and_ordered_by_layer():
    rows = arrange(["m.layers.10.q", "m.layers.2.q", "m.layers.2.up", "m.layers.10.up", "m.head"])
    assert [(r.type, r.layer) for r in rows] == [
        ("layers.*.q", "2"),
        ("layers.*.q", "10"),
        ("layers.*.up", "2"),
        ("layers.*.up", "10"),
        ("head", ""),
    ]
    assert [r.type for r in arrange(["x.1.q", "x.0.q"])] == ["q", "q"]
    assert [(r.type, r.layer) for r in arrange(["lin"])] == [("lin", "")]


def test_squeeze_table_lists_modules_or_sums_them_up_by_type():
    few, many = text(squeeze_table(squeezed(2))), text(squeeze_table(squeezed(40)))
    assert all(row.short in few for row in arrange(names(2)))
    assert "DoRA: an estimate" in few
    assert "self_attn.q_proj (40)" in many
    assert "3 to 4" in many
    assert "q_proj 7" not in many
    assert "91.00%" in many


def test_inspection_table_has_a_row_a_module():
    shown = text(inspection_table(inspected(3)))
    assert all(row.short in shown for row in arrange(names(3)))
    assert "75%" in shown
    assert "█▇" in shown
    assert "zero" in text(inspection_table(inspected(1, zero=True)))


@pytest.mark.parametrize("width", [200, 100, 80])
def test_names_stand_in_a_narrow_terminal_and_what_has_no_room_is_named(width: int):
    found = inspected(30, 16)
    lines = text(inspection_table(found), width).splitlines()
    assert max(map(len, lines)) <= width
    for row in arrange(names(30)):
        (line,) = [line for line in lines if line.startswith(f" {row.short} ")]
        assert "16" in line
    head = next(line for line in lines if line.startswith(" module ")).split()
    spared = [name for name in ("E1", "E2", "E4", "E8", "E16") if name not in head]
    assert spared == (["E2", "E4", "E8", "E16"] if width == 80 else [])
    assert all(name in lines[-1] for name in spared)


def test_ledger_tables():
    ledger = run(3)
    events = text(events_table(ledger.events))
    assert "loss is not finite" in events
    assert "resize squeeze" in " ".join(events.split())
    ranks = text(ranks_table(ledger.history()))
    assert all(row.short in ranks for row in arrange(names(3)))
    assert ranks.split("all ")[1].split() == [
        str(sum(ranks.values())) for _, ranks in ledger.history()[:: len(ledger.history()) - 1]
    ]


def test_gates_table_fits_a_terminal_and_sums_up():
    numbers = {"rank": 2, "bits_a": 16, "bits_b": 8, "bops": 1234567.0, "relative_bops_with_frozen": 0.0123}
    fold = {
        "event": "fold", "step": 90, "policy": "bayesian_lora", "gates": dict.fromkeys(names(3), numbers),
        "total": {"rank": 24, "bops": 3703701.0, "relative_bops_with_frozen": 0.01},
    }  # fmt: skip
    shown = text(gates_table(fold))
    assert all(row.short in shown for row in arrange(names(3)))
    assert "1.23e+06" in shown
    last = shown.strip().splitlines()[-1].split()
    assert last == ["all", "24", "3.7e+06", "0.01"]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("layers", [1, 3, 24])
def test_pictures_are_drawn_without_touching_pyplot(tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # other packages import it
    for path in (
        plot_ledger(run(layers), tmp_path / "ranks.png"),
        plot_spectra(inspected(layers), tmp_path / "deep" / "spectra.png"),
        plot_spectra(inspected(layers, rank=1), tmp_path / "one.png"),
        plot_spectra(inspected(layers, zero=True), tmp_path / "zero.png"),
    ):
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) >= 300
        assert len(np.unique((pixels[::4, ::4] * 16).astype(int) @ [1, 17, 289])) > 8
    assert "matplotlib.pyplot" not in sys.modules
    assert {p.name for p in tmp_path.iterdir()} == {"ranks.png", "deep", "one.png", "zero.png"}


def test_a_ledger_of_nothing_but_its_beginning_can_be_drawn(tmp_path: Path):
    ledger = Ledger()
    ledger.append("attach", 0, layout=Layout({"q": Slot(2, 8, 8, 1.0)}).to_json())
    assert plot_ledger(ledger, tmp_path / "x.png").is_file()
    assert "2" in text(ranks_table(ledger.history()))


def test_bad_pictures(tmp_path: Path):
    with pytest.raises(ConfigError, match="a picture is one of"):
        plot_ledger(run(1), tmp_path / "x.docx")
    with pytest.raises(CheckpointError, match="attach"):
        plot_ledger(Ledger(), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


SDXL = [
    f"lora_unet_{block}_{i}_1_transformer_blocks_{k}_{what}"
    for block in ("input_blocks", "middle_block", "output_blocks")
    for i in range(3)
    for k in range(4)
    for what in ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_k", "ff_net_2")
]


@pytest.mark.parametrize("others", [[], ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"]])
def test_names_that_differ_in_the_middle_are_told_apart_when_they_are_shortened(others: list[str]):
    types = {row.type for row in arrange([*SDXL, *others])}  # with others "unet" stays in front
    assert len(types) == 3 * 7 + len(others)
    for most in (30, 44):
        short = {shortened(kind, most) for kind in types}
        assert len(short) == len(types)
        assert all(len(name) <= most for name in short)
    assert shortened("q_proj", 30) == "q_proj"
    assert len(shortened("x" * 80, 30)) == 30


@given(st.text(st.sampled_from("ab._ "), max_size=60), st.integers(4, 40))
def test_a_shortened_name_fits_and_keeps_its_end(text: str, most: int):
    short = shortened(text, most)
    assert len(short) <= most
    assert short == text if len(text) <= most else text.endswith(short.partition("…")[2])
    assert text.startswith(short.partition("…")[0])


def test_blocks_have_panels_where_types_are_many(tmp_path: Path):
    found = inspected(1)
    modules = tuple(dataclasses.replace(found.modules[0], name=name) for name in SDXL)
    figure = spectra_figure(dataclasses.replace(found, modules=modules))
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == ["input_blocks", "middle_block", "output_blocks"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.rpartition("*_")[2] for label in labels[:3]] == ["attn1_to_q", "attn1_to_k", "attn1_to_v"]


@pytest.mark.parametrize(("layers", "told"), [(70, 210), (300, 3)])
def test_last_ranks_stand_beside_the_picture_at_any_size(layers: int, told: int):
    ledger = run(layers)
    last = ledger.history()[-1][1]
    texts = [text.get_text().strip() for text in ledger_figure(ledger).axes[1].texts]
    if told == 3:
        spans = [sorted(last[row.name] for row in arrange(last) if row.label.endswith(kind)) for kind in TYPES]
        assert [text for text in texts if " to " in text] == [f"{s[0]} to {s[-1]}" for s in spans]
    else:
        assert len([t for t in texts if t.isdecimal()]) >= told
