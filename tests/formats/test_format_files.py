"""A format is one file: what is in the folder, offered by an installed package or registered, is read and written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packages import assert_pair_is_read, drop_file, install
from safetensors import safe_open
from safetensors.torch import load_file

from rankflow import ConfigError, check, squeeze
from rankflow.formats import single_file as folder
from rankflow.formats.added import register_format
from rankflow.formats.as_lora.parts import Form
from rankflow.formats.open import open_adapter, readable_formats, writable_formats
from rankflow.formats.single_file.registry import shipped
from tests.formats.test_convert import PARTS, delta, drawn, write

TOY = '''"""Toy's files: names with slashes, `down` and `up`, scales in the factors."""

from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Fit


class ToyAdapter(SingleFile):
    kind = "toy"

    @classmethod
    def recognises(cls, names):
        return Fit.CERTAIN if all(stem.startswith("toy/") for stem in names.stems) else Fit.NONE

    @classmethod
    def to_common(cls, names):
        return [name.removeprefix("toy/").replace("/", ".") for name in names]

    @classmethod
    def from_common(cls, names):
        return ["toy/" + name.replace(".", "/") for name in names]

    @classmethod
    def describe(cls, metadata, modules, ranks):
        return {**metadata, "toy": str(max(ranks.values()))}
'''
FORM = """from rankflow.formats.as_lora.parts import Factors, Form, Parts, folded


def fold(config, tensors, path):
    parts = Parts(tensors, ["pair_A", "pair_B"], "Pair", path)
    found = {m: parts.of(m, "pair_A", "pair_B") for m in parts}
    modules = {m: Factors(len(a), lambda a=a: 2 * a, lambda b=b: b, a.numel()) for m, (a, b) in found.items()}
    return folded(config, modules, parts.rest, ["Pair, read as LoRA"], path)


FORM = Form("PAIR", fold)
"""


@pytest.fixture(params=["a file in the folder", "an installed package"])
def toy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "file" in request.param:
        drop_file(folder, "toy", TOY, tmp_path / "more", monkeypatch)
    else:
        offer(tmp_path, monkeypatch, "acme_format", TOY, {"toy": "acme_format:ToyAdapter"})
    shipped.cache_clear()
    yield
    shipped.cache_clear()


def offer(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, offered: dict[str, str]) -> None:
    monkeypatch.syspath_prepend(str(path))
    install(path, name, source, {"rankflow.formats": offered})
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("toy")
def test_adapters_are_written_in_it_and_read_from_it(tmp_path: Path):
    assert "toy" in readable_formats()
    assert "toy" in writable_formats()
    factors = drawn(PARTS["unet"][2], scale=0.7, seed=3)
    squeeze(write("kohya", tmp_path, "unet", factors), tmp_path / "toy.safetensors", target_rank=6, to_format="toy")
    found = open_adapter(tmp_path / "toy.safetensors")
    assert found.kind == "toy"
    with safe_open(tmp_path / "toy.safetensors", "pt") as file:
        assert file.metadata()["toy"] == "6"
    for name, f in factors.items():
        a, b = found.factors("toy/unet/" + name.replace(".", "/"))
        torch.testing.assert_close(b.double() @ a.double(), delta(*f), rtol=1e-5, atol=1e-6)
    squeeze(tmp_path / "toy.safetensors", tmp_path / "back.safetensors", target_rank=6, to_format="kohya")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(tmp_path / "x.safetensors").keys()
    assert check(tmp_path / "toy.safetensors", "comfyui").problems[0].what == "format"


def test_a_form_that_equals_a_lora_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offer(tmp_path, monkeypatch, "acme_form", FORM, {"pair": "acme_form:FORM"})
    assert_pair_is_read(tmp_path)


def test_a_broken_package_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offer(tmp_path, monkeypatch, "acme_broken", "1 / 0", {"broken": "acme_broken:Broken"})
    with pytest.warns(UserWarning, match="acme_broken"):
        assert "kohya" in readable_formats()


def test_what_is_registered_is_a_format_whose_name_is_free():
    taken = type("Kohya", (shipped()["kohya"],), {})
    for wrong in (taken, Form("LOHA", print), Form("IA3", print), 1):
        with pytest.raises(ConfigError):
            register_format(wrong)
