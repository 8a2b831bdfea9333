"""Damaged files of every kind: one clear error or a valid output, in bounded time and memory, and no code run.

More of them: RANKFLOW_FUZZ_SEED and RANKFLOW_FUZZ_COUNT, or `python tests/helpers/fuzzing.py --seed 5 --count 2000`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from fuzzing import READERS
from safetensors.torch import load_file, save_file
from whole_files import put

from rankflow import AdapterError, CheckpointError, ConfigError, expand, inspect, squeeze
from rankflow.calibration.statistics import Statistics
from rankflow.compress.plan_file import read_plan, write_plan
from rankflow.config.yaml import read_yaml
from rankflow.plans.budget import Budget
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.names import natural
from rankflow.plans.peft_patterns import matches
from rankflow.training.ledger import Ledger

SCRIPT = Path(__file__).parents[1] / "helpers" / "fuzzing.py"


def fuzz(seed: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seed", str(seed), "--count", str(count)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wrong = [part for part in done.stdout.split("\ncase ") if "WRONG" in part]
    assert not wrong, "\n".join(wrong)
    died = f"died of {done.stdout.splitlines()[-1:]}: {done.stderr[-3000:]}"
    assert done.stdout.endswith("done\n"), died
    assert done.returncode == 0, died


def test_three_hundred_damaged_files():
    fuzz(0, 300)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_damaged_files(part: int):
    count = int(os.environ.get("RANKFLOW_FUZZ_COUNT", "6000")) // 4
    fuzz(int(os.environ.get("RANKFLOW_FUZZ_SEED", "1")) * 100_000 + part * count, count)


# -- what was found, one by one ---------------------------------------------------------------------------------------


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return put(tmp_path / "src", READERS["peft"]())


def configure(folder: Path, text: str | None = None, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields) if text is None else text)


CONFIGS = {
    "no expression": ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
    "a repeat too many": ({"rank_pattern": {"a{1,4294967296}": 3}}, "not a regular expression"),
    "names that are a number": ({"exclude_modules": 7}, "list of names"),
    "names that are numbers": ({"target_parameters": [1]}, "list of names"),
    "a huge alpha": ({"lora_alpha": 10**400}, "positive number"),
    "a tiny alpha": ({"lora_alpha": 5e-324}, "positive number"),
    "a nest": ({"auto_mapping": json.loads("[" * 200 + "]" * 200)}, "nested too deeply"),
    "NaN": ({"lora_dropout": float("nan")}, "is no number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(src: Path, tmp_path: Path, case: str):
    fields, message = CONFIGS[case]
    configure(src, **fields)
    with pytest.raises(AdapterError, match=message) as error:
        squeeze(src, tmp_path / "out", target_rank=2)
    assert str(src) in str(error.value)
    assert len(str(error.value)) < 500


def test_an_expression_that_backtracks_for_ever(tmp_path: Path):
    name = "a" * 60
    src = put(tmp_path / "src", READERS["peft"]())
    save_file(
        {f"base_model.model.{name}.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}, src / "adapter_model.safetensors"
    )
    configure(src, rank_pattern={"(a|aa)+!": 4})
    with pytest.raises(AdapterError, match="more than 1 s") as error:
        squeeze(src, tmp_path / "out", target_rank=2)
    assert str(src) in str(error.value)
    configure(src, rank_pattern={})
    with pytest.raises(ConfigError, match="more than 1 s"):
        squeeze(src, tmp_path / "out", target_rank=2, limits=Limits((Limit("re:(a|aa)+!", max=2),)))


def test_the_scale_of_an_output_is_one_that_can_be_read(src: Path, tmp_path: Path):
    for alpha in (1e-30, 3e-30, 1e30, 3.9e30, 10**30):
        configure(src, lora_alpha=alpha)
        try:
            squeeze(src, tmp_path / "out", target_rank=3, force=True)
        except AdapterError as e:
            assert str(src) in str(e)  # noqa: PT017
        else:
            inspect(tmp_path / "out")


def test_a_config_that_says_things_twice(src: Path):
    configure(src, (src / "adapter_config.json").read_text().replace("{", '{"r": 4, ', 1))
    with pytest.raises(AdapterError, match="'r' stands twice"):
        inspect(src)


def test_more_orders_of_parameters_than_can_be_tried(tmp_path: Path):
    src = put(tmp_path / "src", READERS["experts"]())
    configure(src, target_parameters=[f"mlp.p{i}" for i in range(500)])
    with pytest.raises(AdapterError, match="more than can be told apart"):
        inspect(src)


TENSORS = {
    "a deep name": ({"a." * 2000 + "x": torch.ones(1)}, "is no name of a tensor"),
    "an unprintable name": ({"\x1b[31m": torch.ones(1)}, "is no name of a tensor"),
    "a thin giant": (
        {
            f"base_model.model.layers.0.q.lora_{p}.weight": torch.ones(s)
            for p, s in (("A", (3000, 2)), ("B", (2, 3000)))
        },
        "has rank 3000",
    ),
    "eight bits": (
        {f"base_model.model.layers.0.q.lora_{p}.weight": torch.ones(4, 4).to(torch.float8_e5m2) for p in "AB"},
        "at least 16 bits",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(src: Path, case: str):
    more, message = TENSORS[case]
    configure(src, r=3000 if case == "a thin giant" else 4, rank_pattern={})
    path = src / "adapter_model.safetensors"
    kept = {} if case == "a thin giant" else load_file(path)
    save_file(kept | more, path)
    with pytest.raises(AdapterError, match=message):
        inspect(src)


def test_values_whose_squares_no_number_holds(src: Path):
    path = src / "adapter_model.safetensors"
    save_file({key: t.double() * 1e90 for key, t in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="too large for float64") as error:
        squeeze(src, src.parent / "out", target_rank=2)
    assert str(src) in str(error.value)


def torch_file(folder: Path, data: object) -> None:
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    torch.save(data, folder / "adapter_model.bin")


class Filler:
    def __reduce__(self):
        return bytearray, (1 << 20,)


def test_torch_files(src: Path):
    tensors = load_file(src / "adapter_model.safetensors")
    key = next(iter(tensors))
    for data, message in (
        (tensors | {key: torch.zeros(1).expand(10**6, 10**6)}, "larger than the file"),
        (tensors | {"x": Filler()}, "only tensors are ever loaded"),
        ({**tensors, 1: tensors[key]}, "no name of a tensor"),
        (tensors | {key: tensors[key].to_sparse()}, r"no adapter|other than tensors"),
        (tensors | {key: tensors[key].to("meta")}, r"no adapter|other than tensors"),
    ):
        torch_file(src, data)
        with pytest.raises(AdapterError, match=message):
            inspect(src)
    torch_file(src, {name: torch.nn.Parameter(t) for name, t in tensors.items()})
    whole = inspect(src)
    with zipfile.ZipFile(src / "adapter_model.bin") as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(src / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name, raw in parts.items():
            new.writestr(name, raw)
    with pytest.raises(AdapterError, match="compressed"):
        inspect(src)
    assert whole.modules


@pytest.mark.parametrize("reader", ["loha", "unilora", "vblora", "gralora"])
def test_other_kinds_with_nothing_in_them(tmp_path: Path, reader: str):
    src = put(tmp_path / "src", READERS[reader]())
    tensors = load_file(src / "adapter_model.safetensors")
    for key in tensors:
        save_file(tensors | {key: tensors[key][:0].clone()}, src / "adapter_model.safetensors")
        with pytest.raises(AdapterError) as error:
            inspect(src)
        assert str(src) in str(error.value)


def test_randlora_of_several_precisions(tmp_path: Path):
    src = put(tmp_path / "src", READERS["randlora"]())
    before = squeeze(src, tmp_path / "one", target_rank=2, base=src / "base")
    tensors = load_file(src / "adapter_model.safetensors")
    for key in [key for key in tensors if "gamma" in key]:
        tensors[key] = tensors[key].double()
    save_file(tensors, src / "adapter_model.safetensors")
    after = squeeze(src, tmp_path / "other", target_rank=2, base=src / "base")
    for one, other in zip(before.modules, after.modules, strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-5)


def test_miss_and_vera_of_ranks_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rankflow.formats.as_lora import miss as blocks
    from rankflow.formats.as_lora import vera

    def never(*args: object) -> None:
        raise AssertionError("made what is larger than any file")

    src = put(tmp_path / "src", READERS["miss"]())
    wide = {f"layers.{i}.q.weight": torch.ones(1, 5000) for i in range(2)}
    save_file(wide, src / "base" / "model.safetensors")
    names = [f"base_model.model.layers.{i}.q" for i in range(2)]
    save_file({f"{name}.miss_block": torch.ones(5000, 1) for name in names}, src / "adapter_model.safetensors")
    configure(src, r=5000)
    monkeypatch.setattr(blocks, "_summing", never)
    assert [m.rank for m in inspect(src, base=src / "base").modules] == [1, 1]

    src = put(tmp_path / "vera", READERS["drawn vera"]())
    tensors = load_file(src / "adapter_model.safetensors")
    save_file(
        {key: torch.ones(5000) if "lambda_d" in key else t for key, t in tensors.items()},
        src / "adapter_model.safetensors",
    )
    configure(src, r=5000)
    monkeypatch.setattr(vera, "_drawn", never)
    with pytest.raises(AdapterError, match="rank 5000 is above what any module's shape can hold"):
        inspect(src, base=src / "base")


def test_a_base_model_of_no_inputs_and_one_too_large_to_count_in(tmp_path: Path):
    src = put(tmp_path / "src", READERS["miss"]())
    weights = src / "base" / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: t[:, :0].clone() for key, t in tensors.items()}, weights)
    with pytest.raises(AdapterError, match=r"no such linear layer as layers\.0\.q"):
        inspect(src, base=src / "base")
    for size in (1e19, 3e38):
        save_file({key: t.sign() * size for key, t in tensors.items()}, weights)
        with pytest.raises(ConfigError, match=r"layers\.0\.q has values in it .* too large to be compared") as error:
            inspect(src, base=src / "base")
        assert str(src) in str(error.value)
    save_file({key: t * 1e10 for key, t in tensors.items()}, weights)
    inspect(src, base=src / "base")


def test_factors_that_are_made_are_not_held_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rankflow.formats.as_lora.parts import Lazy
    from rankflow.formats.peft.adapter import PeftAdapter

    made: list[weakref.ref[torch.Tensor]] = []
    get, most = Lazy.__getitem__, 0

    def counted(self: Lazy, key: str) -> torch.Tensor:
        nonlocal most
        t = get(self, key)
        made.append(weakref.ref(t))
        most = max(most, sum(ref() is not None for ref in made))
        return t

    monkeypatch.setattr(Lazy, "__getitem__", counted)
    src = put(tmp_path / "src", READERS["vera"]())
    PeftAdapter(src, src / "base")
    assert len(made) == 4
    assert most == 1


def test_a_statistics_header_with_a_key_of_two_lines(tmp_path: Path):
    header = {"version": 1, "tokens": 1, "batches": None, "base": "", "data": "", "digests": {}, "a\nb": 1}
    save_file({"x": torch.zeros(1)}, tmp_path / "s.safetensors", {"rankflow_statistics": json.dumps(header)})
    with pytest.raises(AdapterError, match="of the statistics") as error:
        Statistics.load(tmp_path / "s.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("amount", [10**400, float("inf"), float("nan"), -1, 0])
def test_budgets_beyond_all_use(amount: float):
    with pytest.raises(ConfigError, match="not a positive number"):
        Budget("total_rank", amount)


def test_names_with_digits_that_are_no_numbers_are_sorted():
    assert sorted(["a.²", "a.10", "a.2"], key=natural)[:2] == ["a.2", "a.10"]


def test_expressions_mean_what_they_mean_to_python():
    assert matches(r"layers\.(\d+)\.q", "layers.12.q").groups() == ("12",)  # type: ignore[union-attr]
    assert matches(r"layers\.(\d+)\.q", "layers.12.qq") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]\n" if i else "k0: &k0 [1]\n" for i in range(40)),
            "too many values",
        ),
        (
            "".join(f"k{i}: &k{i} {{<<: [*k{i - 1}, *k{i - 1}]}}\n" if i else "k0: &k0 {x: 1}\n" for i in range(40)),
            "many",
        ),
        ("ranks: " + "[" * 3000, "nested too deeply"),
        ("ranks: 2001-99-99", "not what its form or tag says"),
        ("ranks: !!int x", "not what its form or tag says"),
    ],
    ids=["aliases", "merges", "nest", "date", "tag"],
)
def test_yaml(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    assert len(str(error.value)) < 500


def test_plans_of_modules_with_long_names_can_be_followed(tmp_path: Path):
    long = "base_model.model." + "a" * 200 + ".{}.weight"
    files = READERS["peft"]()
    src = put(tmp_path / "src", files)
    save_file({long.format(f"lora_{p}"): torch.randn(4, 4) for p in "AB"}, src / "adapter_model.safetensors")
    report = squeeze(src, target_rank=2, dry_run=True)
    assert read_plan(write_plan(report, tmp_path / "plan.yaml")) == report.ranks


def test_residuals_that_lie_about_shapes(tmp_path: Path):
    src = put(tmp_path / "src", READERS["peft"]())
    residual = tmp_path / "residual.safetensors"
    squeeze(src, tmp_path / "small", target_rank=2, keep_residual=residual)
    from safetensors import safe_open

    with safe_open(residual, framework="pt") as file:
        metadata = dict(file.metadata())
    shapes = json.loads(metadata["rankflow_shapes"])
    key = next(iter(shapes))
    for change in ({key: [4, 2**40]}, {key: [4, 9]}, {key: [-4, 8]}, {key: 4}, {key: [2**62] * 4}, {"x": [1]}):
        save_file(load_file(residual), residual, {**metadata, "rankflow_shapes": json.dumps(shapes | change)})
        with pytest.raises(AdapterError, match=r"residual"):
            expand(tmp_path / "small", residual, tmp_path / "whole")
    spoilt = load_file(residual)
    next(iter(spoilt.values())).fill_(torch.nan)
    save_file(spoilt, residual, metadata)
    with pytest.raises(AdapterError, match="NaN"):
        expand(tmp_path / "small", residual, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "event",
    [
        {"event": "resize", "step": 1},
        {"event": "resize", "step": 1, "plan": {"ops": {"nobody": [{"op": "drop"}]}}},
        {"event": "resize", "step": 1, "plan": {"ops": {"layers.0.q": [{"idx": 3}]}}},
        {"event": "skip", "step": "x"},
        {"event": "restore", "step": 1, "events": -1},
        {"event": "fold", "step": 1, "policy": "x", "gates": [1], "total": None},
    ],
    ids=str,
)
def test_ledgers(tmp_path: Path, event: dict):
    path = tmp_path / "rankflow.jsonl"
    first = READERS["ledger"]()["rankflow.jsonl"].splitlines()[0].decode()
    path.write_text(f"{first}\n{json.dumps(event)}\n")
    with pytest.raises(CheckpointError, match="damaged") as error:
        Ledger.read(path).history()
    assert str(path) in str(error.value)


def test_the_same_squeeze_is_the_same_file(tmp_path: Path):
    src = put(tmp_path / "src", READERS["kohya"]()) / "x.safetensors"
    written = set()
    for i in range(4):
        squeeze(src, tmp_path / f"{i}.safetensors", target_rank=2)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
