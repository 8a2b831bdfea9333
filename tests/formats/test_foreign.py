"""What other programs and versions save: read, or refused for what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import AdapterError, expand, squeeze
from rankflow.formats.open import open_adapter
from rankflow.formats.peft.adapter import PeftAdapter

PREFIX = "base_model.model.model.layers"


def factors(ranks: dict[int, int] | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(4):
        r = (ranks or {}).get(i, 4)
        tensors[f"{PREFIX}.{i}.q_proj.lora_A.weight"] = torch.randn(r, 16, generator=g)
        tensors[f"{PREFIX}.{i}.q_proj.lora_B.weight"] = torch.randn(12, r, generator=g)
    return tensors


def configured(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def whole(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    configured(folder, **config)
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def sharded(folder: Path, tensors: dict[str, Tensor], end: str = "safetensors") -> Path:
    configured(folder)
    keys = sorted(tensors)
    index = {}
    for i, part in enumerate((keys[:3], keys[3:])):  # a module's factors in two files
        name = f"adapter_model-{i + 1:05}-of-00002.{end}"
        inside = {key: tensors[key] for key in part}
        if end == "bin":
            torch.save(inside, folder / name)
        else:
            save_file(inside, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / f"adapter_model.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_shards_with_an_index_are_read_as_one_file(end: str, tmp_path: Path):
    src = sharded(tmp_path / "src", factors(), end)
    squeeze(whole(tmp_path / "one"), tmp_path / "a", target_rank=2)
    report = squeeze(src, tmp_path / "b", target_rank=2, keep_residual=tmp_path / "residual.safetensors")
    wanted = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = PeftAdapter(tmp_path / "b").tensors_in_files()[0]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert report.file_bytes_before == sum(f.stat().st_size for f in src.glob("*-of-*"))
    by_index = PeftAdapter(src / f"adapter_model.{end}.index.json")
    assert by_index.layout == PeftAdapter(src).layout
    expand(tmp_path / "b", tmp_path / "residual.safetensors", tmp_path / "back")
    assert PeftAdapter(tmp_path / "back").layout.ranks == PeftAdapter(src).layout.ranks


NAMES = {"elsewhere": "../adapter_model.safetensors", "two lines": "a\nb", "too long": "a" * 300}


@pytest.mark.parametrize(
    "case", ["missing", "elsewhere", "two lines", "too long", "a module short", "twice", "no index"]
)
def test_damaged_indices_are_refused(case: str, tmp_path: Path):
    src = sharded(tmp_path / "src", factors())
    index = src / "adapter_model.safetensors.index.json"
    shards = sorted(src.glob("*-of-*"))
    if case == "missing":
        shards[0].unlink()
    elif case in NAMES:
        index.write_text(json.dumps({"weight_map": {"x": NAMES[case]}}))
    elif case == "a module short":
        save_file({k: t for k, t in load_file(shards[1]).items() if "layers.3." not in k}, shards[1])
    elif case == "twice":
        save_file(load_file(shards[0]) | load_file(shards[1]), shards[1])
    else:
        index.write_text("[]")
    with pytest.raises(AdapterError, match=r"index|another shard|no such file"):
        open_adapter(src)


def test_whole_numbers_and_types_are_read_and_written_as_peft_writes_them(tmp_path: Path):
    ranks = {1: 2}
    pattern = {r"^model\.layers\.1\.q_proj": 2.0}
    src = whole(tmp_path / "src", factors(ranks), peft_type="lora", r=4.0, lora_alpha=8.0, rank_pattern=pattern)
    adapter = PeftAdapter(src)
    assert sorted(adapter.layout.ranks.values()) == [2, 4, 4, 4]
    assert [note for note in adapter.notes if "peft_type, r, rank_pattern" in note]
    squeeze(src, tmp_path / "out", target_rank=3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert all(type(r) is int for r in (config["r"], *config["rank_pattern"].values()))


@pytest.mark.parametrize("r", [4.5, "4", True, 1e300, None])
def test_ranks_that_are_no_whole_numbers_stay_refused(r: Any, tmp_path: Path):
    with pytest.raises(AdapterError, match="r "):
        open_adapter(whole(tmp_path / "src", r=r))


def mlx() -> dict[str, Tensor]:
    return {"model.layers.0.q_proj.lora_a": torch.ones(16, 4), "model.layers.0.q_proj.lora_b": torch.ones(4, 16)}


def test_other_programs_are_named(tmp_path: Path):
    folder = configured(tmp_path / "mlx", fine_tune_type="lora", lora_parameters={"rank": 4, "scale": 20.0})
    save_file(mlx(), folder / "adapters.safetensors")
    save_file(mlx(), tmp_path / "adapters.safetensors")
    tune = tmp_path / "tune"
    tune.mkdir()
    torch.save({f"{key}.weight": t for key, t in mlx().items()}, tune / "adapter_0.pt")
    cases = {
        folder: "mlx-lm",
        folder / "adapters.safetensors": "mlx-lm",
        tmp_path / "adapters.safetensors": "mlx-lm",
        tune: "torchtune",
        tune / "adapter_0.pt": "torchtune",
        whole(tmp_path / "mixed", factors() | {f"{key}.weight": t for key, t in mlx().items()}): "torchtune",
        whole(tmp_path / "merged", enable_lora=[True, False, True]): "MergedLinear",
    }
    for path, name in cases.items():
        with pytest.raises(AdapterError, match=name):
            open_adapter(path)
    assert open_adapter(whole(tmp_path / "plain", enable_lora=None)).layout  # as PEFT 0.2 writes for plain LoRA


@pytest.mark.parametrize("key", ["q_proj.lora_A.weight", "score.weight", "norm.bias"])
def test_what_zero_3_left_empty_is_refused_wherever_it_is(key: str, tmp_path: Path):
    empty = {f"{PREFIX}.0.{key}": torch.empty(0)}
    with pytest.raises(AdapterError, match="ZeRO-3"):
        open_adapter(whole(tmp_path / "src", factors() | empty, modules_to_save=["score"]))
    single = {k.replace("base_model.model.model.layers", "diffusion_model.blocks"): t for k, t in factors().items()}
    save_file(single | {"diffusion_model.norm.diff": torch.empty(0)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="ZeRO-3"):
        open_adapter(tmp_path / "x.safetensors")


def test_embeddings_of_new_tokens_go_with_the_adapter_and_what_is_left_behind_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rankflow.formats.peft.files._MOST_BYTES", 1000)
    src = whole(tmp_path / "src")
    save_file({"input_embeddings": torch.ones(30, 16)}, src / "new_embeddings.safetensors")
    (src / "tokenizer.json").write_text("x" * 2000)
    report = squeeze(src, tmp_path / "out", target_rank=2)
    assert report.copied == ("new_embeddings.safetensors",)
    assert (tmp_path / "out" / "new_embeddings.safetensors").read_bytes() == (src / report.copied[0]).read_bytes()
    assert [note for note in report.notes if note.startswith("left behind") and "tokenizer.json" in note]
