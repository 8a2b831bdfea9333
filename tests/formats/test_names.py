"""Names that training wraps: read, and written, as the format has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow import AdapterError, squeeze
from rankflow.formats.wrappers import peft_names, unwrapped, unwrapped_names

PREFIX = "base_model.model."
MODULES = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "v_proj")]


def factors(rank: dict[str, int] | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name in MODULES:
        r = (rank or {}).get(name, 4)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, 16, generator=g)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(12, r, generator=g)
    return tensors


def saved(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled inside": lambda k: k.replace("self_attn", "_orig_mod.self_attn"),
    "ddp": lambda k: f"module.{k}",
    "ddp of a compiled one": lambda k: f"module._orig_mod.{k}",
    "ddp inside": lambda k: k.replace(PREFIX, f"{PREFIX}module."),
    "opacus": lambda k: f"_module.{k}",
    "fsdp": lambda k: re.sub(r"(layers.\d)", r"\1._fsdp_wrapped_module", k),
    "fairscale": lambda k: "_fsdp_wrapped_module._fpw_module." + k,
    "checkpointed": lambda k: re.sub(r"(layers.\d)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", k),
    "bare": lambda k: k.removeprefix(PREFIX),
    "bare ddp": lambda k: "module." + k.removeprefix(PREFIX),
    "inside another model": lambda k: f"language_model.{k}",
    "default": lambda k: k.replace(".weight", ".default.weight"),
    "named adapter": lambda k: k.replace(".weight", ".my_adapter.weight"),
    "all at once": lambda k: f"module._orig_mod.{k.removeprefix(PREFIX).replace('.weight', '.default.weight')}",
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrapped_names_are_read_and_written_as_peft_has_them(wrap: Callable[[str], str], tmp_path: Path):
    plain = saved(tmp_path / "plain", factors())
    wrapped = saved(tmp_path / "wrapped", {wrap(key): t for key, t in factors().items()})
    squeeze(plain, tmp_path / "a", target_rank=2)
    report = squeeze(wrapped, tmp_path / "b", target_rank=2)
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [note for note in report.notes if wrap(next(iter(factors()))) in note and "8 of 8" in note]


def test_config_and_what_is_carried_along_lose_wrappers_too(tmp_path: Path):
    ranks = {MODULES[1]: 2}
    tensors = {k.replace("self_attn", "_orig_mod.self_attn"): t for k, t in factors(ranks).items()}
    tensors[f"{PREFIX}score.modules_to_save._orig_mod.weight"] = torch.ones(3, 5)
    inner = re.escape(MODULES[1].replace("self_attn", "_orig_mod.self_attn"))
    src = saved(tmp_path / "src", tensors, rank_pattern={f"^{inner}": 2}, modules_to_save=["score"])
    squeeze(src, tmp_path / "out", target_rank=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "_orig_mod" not in json.dumps(config)
    assert not [key for key in load_file(tmp_path / "out" / "adapter_model.safetensors") if "_orig_mod" in key]


def test_modules_of_ones_own_keep_their_names():
    own = [f"{PREFIX}layers.0.module.q.lora_A.weight", f"{PREFIX}my_orig_mod.lora_A.weight"]
    assert all(old == new for old, new in peft_names(own).items())
    part = [f"{PREFIX}module.q.lora_A.weight", f"{PREFIX}head.lora_A.weight"]  # no wrapper of the whole model
    assert all(old == new for old, new in peft_names(part).items())
    told = [f"{PREFIX}module.q.lora_A.weight"]
    assert list(peft_names(told, {"target_modules": ["module.q"]}).values()) == told
    assert list(peft_names(told, {"target_modules": ["q"]}).values()) == [f"{PREFIX}q.lora_A.weight"]
    several = [f"{PREFIX}q.lora_A.a.weight", f"{PREFIX}q.lora_A.b.weight"]  # which are refused where they are read
    assert list(peft_names(several).values()) == several


def test_wrappers_in_single_files():
    names = ["transformer.module.x.lora_A.weight", "transformer.module.y.lora_A.weight", "text_encoder.z.lora_A.weight"]
    new = unwrapped_names(names)
    assert list(new.values()) == [name.replace("module.", "") for name in names]
    assert (
        unwrapped("lora_unet__orig_mod_double_blocks_0_img_mlp_0.alpha") == "lora_unet_double_blocks_0_img_mlp_0.alpha"
    )
    assert unwrapped(r"^model\.layers\.0\._orig_mod\.q") == r"^model\.layers\.0\.q"


def test_two_names_that_become_one_are_refused(tmp_path: Path):
    tensors = factors()
    tensors |= {f"_orig_mod.{key}": t.clone() for key, t in list(tensors.items())[:2]}
    with pytest.raises(AdapterError, match="are both"):
        squeeze(saved(tmp_path / "src", tensors), tmp_path / "out", target_rank=2)
