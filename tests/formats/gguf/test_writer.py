"""GGUF adapters: read by gguf's own reader, and applied as llama.cpp does to weights in its converter's order."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from helpers import lora, minilm_folder, randomise, wrap
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from rankflow import ConfigError, check, pad, squeeze
from rankflow.formats.open import converted, open_adapter
from tests.cli.test_app import run
from tests.formats.single_file.test_single_file import UNET, drawn, kohya


def save(model: nn.Module, folder: Path) -> Path:
    """The adapter, beside a folder `base` with its model's config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    config = model.base_model.model.config
    (folder.parent / "base").mkdir(exist_ok=True)
    names = {"architectures": [type(model.base_model.model).__name__]}
    (folder.parent / "base" / "config.json").write_text(json.dumps(config.to_dict() | names, default=str))
    return folder


def read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Fields and tensors, the latter by shapes as numpy has them: ne the other way round."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        data = torch.from_numpy(t.data.copy())
        if t.tensor_type == GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        tensors[t.name] = data.reshape([int(n) for n in t.shape[::-1]])
    return fields, tensors


def served(path: Path) -> dict[str, Tensor]:
    """llama.cpp's `get_scale` and `build_lora_mm`: tensor -> DeltaW in its layout; of token_embd [vocabulary, out]."""
    fields, tensors = read(path)
    alpha = fields["adapter.lora.alpha"]
    found = {}
    for key, b in tensors.items():
        if key.endswith(".lora_b"):
            name = key.removesuffix(".lora_b")
            a, scale = tensors[f"{name}.lora_a"].double(), alpha / b.shape[1] if alpha else 1.0
            found[name] = scale * (a @ b.double().T if name == "token_embd.weight" else b.double() @ a)
    return found


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp has them of q and k of the llama family: row 2i of a head is i, row 2i + 1 is i + half."""
    half = weight.shape[0] // heads // 2
    rows = []
    for head in range(heads):
        for i in range(half):
            rows += [head * 2 * half + i, head * 2 * half + half + i]
    return weight[rows]


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("rslora", [False, True])
def test_llama(tmp_path: Path, rslora: bool):
    targets = [name.split(".")[1] for name in LLAMA] + ["embed_tokens", "lm_head"]
    patterns = {"rank_pattern": {"k_proj": 2, "embed_tokens": 3}, "alpha_pattern": {"v_proj": 5, "embed_tokens": 1}}
    model = lora("linear", dtype=torch.float32, target_modules=targets, use_rslora=rslora, **patterns)
    src = save(model, tmp_path / "src")
    squeeze(src, tmp_path / "out.gguf", keep=True, engine="llamacpp", base=tmp_path / "base")
    fields, _ = read(tmp_path / "out.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0
    wanted = {}
    for name, d in deltas(model).items():
        if "layers" in name:
            _, _, layer, rest = name.split(".", 3)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest)
            wanted[f"blk.{layer}.{LLAMA[rest]}.weight"] = d if heads is None else turned(d, heads)
        else:
            wanted["output.weight" if name == "lm_head" else "token_embd.weight"] = d
    found = served(tmp_path / "out.gguf")
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["blk.0.attn_q.weight"], deltas(model)["model.layers.0.self_attn.q_proj"], atol=1e-3)
    ranks = {name: t.shape[-1] for name, t in read(tmp_path / "out.gguf")[1].items() if name.endswith("lora_b")}
    assert (ranks["blk.1.attn_k.weight.lora_b"], ranks["token_embd.weight.lora_b"]) == (2, 3)  # mixed as they were
    assert ranks["blk.1.attn_q.weight.lora_b"] == 4


def test_other_families_keep_their_rows(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model = wrap(qwen, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj"]))
    randomise(model)
    squeeze(
        save(model, tmp_path / "q" / "src"),
        tmp_path / "q.gguf",
        keep=True,
        to_format="gguf",
        base=tmp_path / "q" / "base",
    )
    for name, d in deltas(model).items():
        _, _, layer, rest = name.split(".", 3)
        torch.testing.assert_close(
            served(tmp_path / "q.gguf")[f"blk.{layer}.{LLAMA[rest]}.weight"], d, rtol=1e-5, atol=1e-6
        )
    gpt2 = lora("conv1d_transformers", dtype=torch.float32)
    squeeze(
        save(gpt2, tmp_path / "g" / "src"),
        tmp_path / "g.gguf",
        keep=True,
        to_format="gguf",
        base=tmp_path / "g" / "base",
    )
    found = served(tmp_path / "g.gguf")
    for name, d in deltas(gpt2).items():
        tensor = "attn_qkv" if "c_attn" in name else "ffn_down"
        # PEFT gives the update of Conv1D as its weight is kept, [in, out]; llama.cpp keeps it the other way round
        torch.testing.assert_close(found[f"blk.{name.split('.')[2]}.{tensor}.weight"], d.T, rtol=1e-5, atol=1e-6)


def test_bert_by_the_folder_that_the_adapter_names(tmp_path: Path):
    """MiniLM's own folder, read from base_model_name_or_path; nothing else is given."""
    model = wrap(AutoModel.from_pretrained(minilm_folder()), LoraConfig(r=2, target_modules=["query", "dense"]))
    randomise(model)
    for name, p in model.named_parameters():
        if "pooler" in name and "lora_B" in name:
            p.data.zero_()
    src = save(model, tmp_path / "src")
    with pytest.raises(ConfigError, match=r"pooler.dense: is no module of bert"):
        squeeze(src, tmp_path / "out.gguf", keep=True, to_format="gguf")
    report = squeeze(src, tmp_path / "out", energy=0.999)  # which lets go of the pooler, being zero
    squeeze(tmp_path / "out", tmp_path / "out.gguf", keep=True, to_format="gguf")
    found = served(tmp_path / "out.gguf")
    assert len(found) == len(report.ranks) - 1
    name = "encoder.layer.5.attention.self.query"
    torch.testing.assert_close(found["blk.5.attn_q.weight"], deltas(model)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_types(tmp_path: Path, dtype: torch.dtype):
    model = lora("linear", dtype=dtype, lora_alpha=5)
    src = save(model, tmp_path / "src")
    squeeze(src, tmp_path / "out.gguf", keep=True, to_format="gguf", base=tmp_path / "base")
    kept = torch.float32 if dtype == torch.float64 else dtype
    _, tensors = read(tmp_path / "out.gguf")
    before = load_file(src / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {kept}
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], before[f"{stem}.lora_A.weight"].to(kept))
    scaled = (before[f"{stem}.lora_B.weight"].double() * 1.25).to(kept)
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], scaled)


def test_squeezed_padded_and_of_a_size(tmp_path: Path):
    model = lora("linear", dtype=torch.float32, rank_pattern={"v_proj": 2})
    src = save(model, tmp_path / "src")
    base = tmp_path / "base"
    report = squeeze(src, tmp_path / "a.gguf", target_rank=2, to_format="gguf", base=base)
    assert not report.language_model  # what vLLM has to be told is told of files that it loads
    d = deltas(model)["model.layers.1.mlp.down_proj"]
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    torch.testing.assert_close(
        served(tmp_path / "a.gguf")["blk.1.ffn_down.weight"], u[:, :2] * s[:2] @ v[:2], rtol=1e-5, atol=1e-5
    )
    assert set(report.ranks.values()) == {2}
    pad(src, tmp_path / "b.gguf", rank=6, engine="llamacpp", base=base)
    _, tensors = read(tmp_path / "b.gguf")
    assert {t.shape[-1] for name, t in tensors.items() if name.endswith("_b")} == {6}
    for name, found in served(tmp_path / "b.gguf").items():
        kept = served(tmp_path / "a.gguf")[name]
        assert found.shape == kept.shape
    torch.testing.assert_close(served(tmp_path / "b.gguf")["blk.1.ffn_down.weight"], d, rtol=1e-5, atol=1e-6)
    whole = (tmp_path / "b.gguf").stat().st_size
    small = squeeze(src, tmp_path / "c.gguf", size=whole * 3 // 4, to_format="gguf", base=base)
    assert (tmp_path / "c.gguf").stat().st_size <= whole * 3 // 4
    assert small.params_after > 0
    gone = squeeze(
        src, tmp_path / "d.gguf", ranks={n: int("down" in n) for n in report.ranks}, to_format="gguf", base=base
    )
    assert len(served(tmp_path / "d.gguf")) == sum(gone.ranks.values()) == 2


def test_several_outputs_and_default_names(tmp_path: Path):
    src = save(lora("linear", dtype=torch.float32), tmp_path / "src")
    assert squeeze(src, target_rank=2, to_format="gguf", base=tmp_path / "base").out == str(tmp_path / "src-r2.gguf")
    run("squeeze", src, "--engine", "llamacpp", "--base", tmp_path / "base")
    assert (tmp_path / "src-llamacpp.gguf").is_file()
    run("squeeze", src, "--to-format", "gguf", "--base", tmp_path / "base", "--ranks", "1,2", "-o", tmp_path / "x.gguf")
    assert {p.name for p in tmp_path.glob("x*")} == {"x-r1.gguf", "x-r2.gguf"}
    assert (
        "is there already" in run("squeeze", src, "--engine", "llamacpp", "--base", tmp_path / "base", status=2).stderr
    )


def test_the_converters_own_way_is_what_check_is_about(tmp_path: Path):
    """llama.cpp's converter keeps lora_alpha alone: right for mixed ranks of one alpha, wrong for the rest."""

    def fates(**changes) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora("linear", dtype=torch.float32, **changes).save_pretrained(folder)
        return [p.fate.value for p in check(folder, "llamacpp").problems]

    assert fates() == []
    assert fates(rank_pattern={"v_proj": 2}) == []
    assert fates(alpha_pattern={"v_proj": 2}) == ["silent"]
    assert fates(use_rslora=True) == ["silent"]


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_the_base_model_has_to_be_known(tmp_path: Path):
    src = save(lora("linear", dtype=torch.float32), tmp_path / "src")

    def says(base: Path | None, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            squeeze(src, tmp_path / "out.gguf", target_rank=2, to_format="gguf", base=base)
        assert not (tmp_path / "out.gguf").exists()

    says(None, "not named in the adapter.*give its folder with --base")
    says(tmp_path, r"config.json: no such file; --base is the folder of the base model")
    config = tmp_path / "base" / "config.json"
    whole = json.loads(config.read_text())
    for change, match in (
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM, whose layout in llama.cpp is not known",
        ),
        ({"architectures": None}, "architecture None"),
        ({"num_hidden_layers": 1}, r"model.layers.1.\S+: is no module of llama as"),
        ({"architectures": True}, "architecture True"),
        ({"architectures": ["x" * 5000]}, "architecture x{80}, whose"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be a whole number from 1"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000; it must be a whole number from 1 to 1,000"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"num_attention_heads": 3}, r"q_proj: has 16 outputs, and .* says 3 heads"),
    ):
        config.write_text(json.dumps(whole | change))
        says(config.parent, match)
    for text in ("{", "[]"):
        config.write_text(text)
        says(config.parent, "not JSON|not a JSON object")


def test_tied_weights_have_no_tensor_of_their_own(tmp_path: Path):
    for target in ("lm_head", "embed_tokens"):
        src = save(lora("linear", dtype=torch.float32, target_modules=[target]), tmp_path / target / "src")
        base = src.parent / "base"
        config = json.loads((base / "config.json").read_text())
        squeeze(src, src.parent / "out.gguf", target_rank=2, to_format="gguf", base=base)
        (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        with pytest.raises(ConfigError, match=f"{target}: has no tensor of its own"):
            squeeze(src, target_rank=2, to_format="gguf", base=base)


def test_what_gguf_cannot_hold(tmp_path: Path):
    save(lora("linear", dtype=torch.float32), tmp_path / "src")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("conv", "attention", "experts"):
            lora(kind, dtype=torch.float32).save_pretrained(tmp_path / kind)
        lora("linear", dtype=torch.float32, use_dora=True).save_pretrained(tmp_path / "dora")
    for kind in ("conv", "attention", "experts"):
        with pytest.raises(ConfigError, match=f"is of kind {kind}"):
            squeeze(tmp_path / kind, target_rank=1, to_format="gguf", base=tmp_path / "base")
    with pytest.raises(ConfigError, match="has more than LoRA factors"):
        squeeze(tmp_path / "dora", target_rank=1, to_format="gguf", base=tmp_path / "base")
    save_file(kohya(drawn(UNET)), tmp_path / "k.safetensors")
    with pytest.raises(ConfigError, match="adapters of language models"):
        squeeze(tmp_path / "k.safetensors", target_rank=1, to_format="gguf", base=tmp_path / "base")


def test_where_it_may_be_written(tmp_path: Path):
    src = save(lora("linear", dtype=torch.float32), tmp_path / "src")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"text")
    (tmp_path / "folder.gguf").mkdir()

    def says(out: Path, match: str, force: bool = True) -> None:
        with pytest.raises(ConfigError, match=match):
            squeeze(src, out, target_rank=2, to_format="gguf", base=tmp_path / "base", force=force)

    says(tmp_path / "out", r"give it a name like out.gguf")
    says(tmp_path / "folder.gguf", "is a folder")
    says(other, "is not GGUF, so --force does not replace it")
    says(other, "is there already", force=False)
    assert other.read_bytes() == b"text"
    for _ in range(2):
        squeeze(src, tmp_path / "out.gguf", target_rank=2, to_format="gguf", base=tmp_path / "base", force=True)


def test_nothing_is_left_of_an_output_that_fails(tmp_path: Path):
    src = save(lora("linear", dtype=torch.float32), tmp_path / "src")
    adapter = converted(open_adapter(src), "gguf", tmp_path / "base")
    with pytest.raises(KeyboardInterrupt), adapter.rewrite(tmp_path / "out.gguf", adapter.layout.ranks):
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "src"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    src = save(lora("linear", dtype=torch.float32), tmp_path / "src")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'pip install "rankflow-lora\[gguf\]"'):
        squeeze(src, target_rank=1, to_format="gguf", base=tmp_path / "base")
