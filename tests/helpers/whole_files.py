"""A small valid file for every reader there is, as bytes: what the damaged ones are made from."""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from rankflow import squeeze
from rankflow.calibration.statistics import Statistics, digest
from rankflow.policies.observation import Signal

Files = dict[str, bytes]  # name in the source's folder, or in a folder of it, -> content
RANK = 4
_STEM = "down_blocks.0.attentions.0.attn1."


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


def _pairs(shapes: Mapping[str, tuple[int, ...]], form: str, ranks: Mapping[str, int] = {}) -> dict[str, Tensor]:
    """Factors of modules of these shapes (in, out, *kernel); `form` has a place for the module and one for A or B."""
    down, up = ("A", "B") if "lora_{1}" in form and "down" not in form else ("down", "up")
    down, up = ("down", "up") if form.endswith("@") else (down, up)
    form = form.rstrip("@")
    out = {}
    for i, (name, (n_in, n_out, *kernel)) in enumerate(shapes.items()):
        r = ranks.get(name, RANK)
        out[form.format(name, down)] = _drawn(2 * i, r, n_in, *kernel)
        out[form.format(name, up)] = _drawn(2 * i + 1, n_out, r, *[1] * len(kernel))
    return out


_LINEAR = {"layers.0.q": (8, 8), "layers.0.up": (8, 12), "layers.1.q": (8, 8)}
_PEFT = "base_model.model.{0}.lora_{1}.weight"


def _config(**fields: Any) -> bytes:
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q", "up"], "rank_pattern": {},
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "bias": "none", "modules_to_save": None,
        "exclude_modules": None, "init_lora_weights": True, "base_model_name_or_path": "some/base",
        "target_parameters": None, "fan_in_fan_out": False, "lora_dropout": 0.05, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return json.dumps(config | fields).encode()


def _peft(tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> Files:
    tensors = _pairs(_LINEAR, _PEFT) if tensors is None else dict(tensors)
    return {
        "adapter_model.safetensors": save(dict(tensors), {"format": "pt"}),
        "adapter_config.json": _config(**fields),
    }


def as_bin(tensors: Mapping[str, Tensor], *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _dora() -> Files:
    norms = {f"base_model.model.{n}.lora_magnitude_vector": _drawn(9, s[1]).abs() + 1 for n, s in _LINEAR.items()}
    return _peft(_pairs(_LINEAR, _PEFT) | norms, use_dora=True)


def _embedding() -> Files:
    tensors = _pairs(_LINEAR, _PEFT)
    tensors["base_model.model.emb.lora_embedding_A"] = _drawn(7, RANK, 20)
    tensors["base_model.model.emb.lora_embedding_B"] = _drawn(8, 8, RANK)
    tensors["base_model.model.head.weight"] = _drawn(6, 3, 8)
    return _peft(tensors, target_modules=["q", "up", "emb"], modules_to_save=["head"])


def _experts() -> Files:
    tensors = {
        "base_model.model.mlp.lora_A.weight": _drawn(1, 3 * RANK, 8),
        "base_model.model.mlp.lora_B.weight": _drawn(2, 10, 3 * RANK),
        "base_model.model.mlp.base_layer.lora_A.weight": _drawn(3, 3 * RANK, 10),
        "base_model.model.mlp.base_layer.lora_B.weight": _drawn(4, 8, 3 * RANK),
    }
    return _peft(tensors, target_modules=[], target_parameters=["mlp.up_proj", "mlp.down_proj"])


def _mixed() -> Files:
    ranks = {"layers.0.q": 2, "layers.0.up": 6}
    patterns = {"rank_pattern": {"layers.0.q": 2, r"layers\.\d+\.up": 6}, "alpha_pattern": {"layers.1.q": 3.5}}
    return _peft(_pairs(_LINEAR, _PEFT, ranks), use_rslora=True, exclude_modules=["vision"], **patterns)


def _adalora() -> Files:
    tensors = _pairs(_LINEAR, "base_model.model.{0}.lora_{1}")
    tensors |= {f"base_model.model.{name}.lora_E": _drawn(i, RANK, 1) for i, name in enumerate(_LINEAR)}
    masks = {f"{name}.lora_E": [True] * RANK for name in _LINEAR}
    return _peft(tensors, peft_type="ADALORA", init_r=RANK, target_r=2, tinit=1, total_step=9, rank_pattern=masks)


def _form(kind: str, parts: Mapping[str, Tensor], shared: Mapping[str, Tensor] = {}, **fields: Any) -> Files:
    """Two modules with the same parts, as PEFT names them, and what all share."""
    tensors = {f"base_model.model.layers.{i}.q.{part}": t.clone() for i in range(2) for part, t in parts.items()}
    tensors |= {f"base_model.{part}": t for part, t in shared.items()}
    return _peft(tensors, peft_type=kind, alpha=8, target_modules=["q"], **fields)


def _middles() -> Files:
    middles = {f"base_model.model.{name}.lora_N": _drawn(40 + i, RANK, RANK) for i, name in enumerate(_LINEAR)}
    return _peft(_pairs(_LINEAR, _PEFT) | middles)


def _loha() -> Files:
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
    return _form("LOHA", {part: _drawn(i, *shape) for i, (part, shape) in enumerate(shapes.items())})


def _lokr() -> Files:
    return _form("LOKR", {"lokr_w1": _drawn(1, 2, 2), "lokr_w2_a": _drawn(2, 4, 2), "lokr_w2_b": _drawn(3, 2, 4)})


def _vblora() -> Files:
    logits = {"vblora_logits_A": _drawn(1, RANK, 2, 5), "vblora_logits_B": _drawn(2, 3, RANK, 5)}
    return _form("VBLORA", logits, {"vblora_vector_bank.default": _drawn(3, 5, 4)}, topk=2)


def _unilora() -> Files:
    made = {}
    for i, (side, shape) in enumerate({"A": (RANK, 8), "B": (12, RANK)}.items()):
        generator = torch.Generator().manual_seed(i)
        made[f"unilora_indices_{side}"] = torch.randint(0, 30, shape, generator=generator)
        made[f"unilora_scales_{side}"] = _drawn(i, *shape)
    return _form("UNILORA", made, {"unilora_theta_d.default": _drawn(3, 30)})


def _delora() -> Files:
    sizes = {"delora_lambda": _drawn(3, 1).abs(), "delora_w_norm": _drawn(4, 8).abs()}
    return _form("DELORA", {"delora_A": _drawn(1, RANK, 8), "delora_B": _drawn(2, 12, RANK), **sizes})


def _gralora() -> Files:
    return _form("GRALORA", {"gralora_A": _drawn(1, 2, 4, RANK), "gralora_B": _drawn(2, 2, RANK, 6)}, hybrid_r=0)


def _base(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The weights of a base model, as [out, in]."""
    return {f"{name}.weight": _drawn(50 + i, *shape[::-1]) for i, (name, shape) in enumerate(shapes.items())}


def _on_base(kind: str, parts: Mapping[str, Tensor], shared: Mapping[str, Tensor] = {}, **fields: Any) -> Files:
    """`_form` of two modules with 8 inputs and 12 outputs, and their base model."""
    base = save(_base({f"layers.{i}.q": (8, 12) for i in range(2)}), {"format": "pt"})
    return _form(kind, parts, shared, r=RANK, **fields) | {"base/model.safetensors": base}


def _vera(stem: str = "vera", *, drawn: bool = False) -> Files:
    rows = RANK * (2 if stem == "pvera" else 1)
    vectors = {f"{stem}_lambda_b": _drawn(1, 12), f"{stem}_lambda_d": _drawn(2, rows)}
    shared = {} if drawn else {f"{stem}_A": _drawn(3, rows, 8), f"{stem}_B": _drawn(4, 12, RANK)}
    sampled = {"sample_at_inference": False} if stem == "pvera" else {}
    return _on_base(stem.upper(), vectors, shared, projection_prng_key=7, save_projection=not drawn, **sampled)


def _miss() -> Files:
    return _on_base("MISS", {"miss_block": _drawn(1, RANK, 6)}, init_weights="mini", mini_r=2)


def _randlora() -> Files:
    vectors = {"randlora_lambda": _drawn(1, RANK, 2), "randlora_gamma": _drawn(2, 2, 8)}
    shared = {"randlora_A": _drawn(3, RANK, 1, 8), "randlora_B": _drawn(4, 12, 2, RANK)}
    return _on_base("RANDLORA", vectors, shared, randlora_alpha=8, save_projection=True)


def _full() -> Files:
    """A full fine-tune in one file, and its base in two."""
    base = _base(_LINEAR) | {"norm.weight": torch.ones(8), "emb.weight": _drawn(60, 9, 8)}
    tuned = {name: t + _drawn(70 + i, *t.shape) for i, (name, t) in enumerate(base.items())}
    shards = {f"base/model-{i}-of-2.safetensors": dict(list(base.items())[i - 1 :: 2]) for i in (1, 2)}
    index = {name: Path(file).name for file, tensors in shards.items() for name in tensors}
    return {
        "full/model.safetensors": save(tuned, {"format": "pt"}),
        "full/config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]}).encode(),
        "base/model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode(),
        **{file: save(tensors, {"format": "pt"}) for file, tensors in shards.items()},
    }


_UNET = {_STEM + "to_q": (8, 8), _STEM + "to_out.0": (8, 12), "mid_block.resnets.0.conv1": (4, 6, 3, 3)}


def _alphas(tensors: dict[str, Tensor], value: float = 2.0) -> dict[str, Tensor]:
    stems = {re.split(r"\.lora_", key)[0] for key in tensors}
    return tensors | {f"{stem}.alpha": torch.tensor(value) for stem in sorted(stems)}


def _kohya() -> Files:
    flat = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in _UNET.items()}
    tensors = _alphas(_pairs(flat, "{0}.lora_{1}.weight@"))
    meta = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_module": "networks.lora"}
    return {"x.safetensors": save(tensors, meta)}


def _locon() -> Files:
    files = _kohya()
    flat = {"lora_unet_mid_block_resnets_0_conv2": (4, 6, 1, 1)}
    tensors = _alphas(_pairs(flat, "{0}.lora_{1}.weight@"))
    tensors["lora_unet_mid_block_resnets_0_conv2.lora_mid.weight"] = _drawn(5, RANK, RANK, 3, 3)
    return {"x.safetensors": save(tensors | unpacked(files["x.safetensors"])[0], {"ss_network_dim": "4"})}


def _comfyui() -> Files:
    return {"x.safetensors": save(_alphas(_pairs(_UNET, "diffusion_model.{0}.lora_{1}.weight")))}


def _diffusers() -> Files:
    packed = {"unet.r": RANK, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"], "unet.rank_pattern": {}}
    meta = {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}
    return {"pytorch_lora_weights.safetensors": save(_pairs(_UNET, "unet.{0}.lora_{1}.weight"), meta)}


def _wrapped() -> Files:
    """As a compiled model under DDP saves it, without PEFT's prefix and with its adapter's name."""
    return _peft(_pairs(_LINEAR, "module._orig_mod.{0}.lora_{1}.default.weight"), r=float(RANK), peft_type="lora")


def _sharded() -> Files:
    tensors = _pairs(_LINEAR, _PEFT)
    shards = {f"adapter_model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    index = {key: name for name, part in shards.items() for key in part}
    return {
        "adapter_model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode(),
        "adapter_config.json": _config(),
        **{name: save(part, {"format": "pt"}) for name, part in shards.items()},
    }


def _checkpoints_names() -> Files:
    """BFL's control LoRA: names of FLUX's own checkpoint, biases of B, norms as they are."""
    tensors = _pairs({"double_blocks.0.img_attn.qkv": (8, 12), "img_in": (8, 8)}, "{0}.lora_{1}.weight")
    whole = {
        "double_blocks.0.img_attn.qkv.lora_B.bias": _drawn(9, 12),
        "single_blocks.0.norm.key_norm.scale": _drawn(8, 4),
    }
    return {"x.safetensors": save(tensors | whole)}


def _xlabs() -> Files:
    shapes = {"double_blocks.0.processor.qkv_lora1": (8, 12), "single_blocks.0.processor.proj_lora": (8, 8)}
    return {"x.safetensors": save(_pairs(shapes, "{0}.{1}.weight@"))}


def _gguf() -> Files:
    """What GGUF is made of: the adapter of a model of the llama family, and that model's config."""
    shapes = {f"model.layers.{i}.{name}": (8, 8) for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "hidden_size": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    adapter = _peft(_pairs(shapes, _PEFT), target_modules=["q_proj", "up_proj"])
    return {"base/config.json": json.dumps(config).encode(), **adapter}


def _residual() -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder / "src", _mixed())
        squeeze(folder / "src", folder / "out", target_rank=2, keep_residual=folder / "residual.safetensors")
        return {f.name: f.read_bytes() for f in ((folder / "residual.safetensors"), *(folder / "out").iterdir())}


def _statistics() -> Files:
    measured, digests = {}, {}
    factors = _pairs(_LINEAR, _PEFT)
    for i, name in enumerate(_LINEAR):
        z, d = _drawn(20 + i, 40, RANK).double(), _drawn(30 + i, 40, RANK).double()
        digests[name] = digest(factors[_PEFT.format(name, "A")], factors[_PEFT.format(name, "B")])
        measured[name] = {
            Signal.MEAN_ZZ: z.T @ z / 40,
            Signal.MEAN_DD: d.T @ d / 40,
            Signal.MEASURED: torch.full((RANK,), 40.0, dtype=torch.float64),
        }
    with tempfile.TemporaryDirectory() as name:
        path = Statistics(measured, digests, 40, 2, "base", "data").save(Path(name) / "stats.safetensors")
        return {"stats.safetensors": path.read_bytes(), **_peft()}


def _plan() -> Files:
    plan = {"adapter": "src", "target": {"energy": 0.9}, "summary": "x", "ranks": dict.fromkeys(_LINEAR, 2)}
    return {"plan.yaml": yaml.safe_dump(plan, sort_keys=False).encode(), **_peft()}


def _budget() -> Files:
    budget = {
        "budget": {"mean_rank": 2.5},
        "limits": {"*.q": {"min": 1, "max": 3}, "re:.*up": {"max": 4}, r"layers\.0\.up": 3},
        "tie": [["re:layers\\.(\\d+)\\.q"]],
        "rank_buckets": [1, 2, 3, 4],
        "rank_multiple": 1,
    }
    return {"budget.yaml": yaml.safe_dump(budget, sort_keys=False).encode(), **_peft()}


def _ledger() -> Files:
    slot = {"rank": 2, "in_features": 16, "out_features": 16, "scaling": 2.0, "buckets": [], "kind": "linear"}
    names = [f"layers.{i}.{kind}" for i in range(2) for kind in ("q", "up")]
    plan = {"reason": "why", "state": "carry", "rewarm": 0}
    gates = {name: {"open": 2.0, "mean_bits": 3.5} for name in names}
    shape = {"shape": [1, 5], "N": "00", "M": "00", "metric": "weights"}
    events = [
        {"event": "attach", "step": 0, "layout": dict.fromkeys(names, slot), "total_steps": 40, "seed": 0},
        {"event": "phase", "step": 0, "policy": "increlora", "end": 41, "notes": ["a"],
         "decides": {"first": 10, "before": 30, "every": 10}, "budget": "mean_rank 4", "time": 1e9},
        {"event": "resize", "step": 10, "plan": plan | {"ops": {names[0]: [{"op": "grow", "n": 3, "init": "zero_b"}]}},
         "policy": "increlora", "reason": "best", "ranks": {names[0]: 5}, "total_rank": 11, "params": 352},
        {"event": "skip", "step": 20, "policy": "increlora", "reason": "not finite"},
        {"event": "restore", "step": 20, "events": 4},
        {"event": "resize", "step": 25, "plan": plan | {"ops": {
            names[1]: [{"op": "drop"}], names[2]: [{"op": "keep", "idx": [0]}], names[0]: [{"op": "refactor", **shape}]
        }}, "policy": "increlora", "reason": "x", "ranks": {names[1]: 0}},
        {"event": "fold", "step": 30, "policy": "bayesian_lora", "gates": gates, "total": {"open": 8.0}},
        {"event": "finish", "step": 40, "total_rank": 6, "params": 352},
    ]  # fmt: skip
    return {"rankflow.jsonl": "".join(json.dumps(e) + "\n" for e in events).encode()}


def _quantized() -> Files:
    """One module with bits of its own for each tensor; the adapter is what the integers give."""
    ints = [torch.randint(-2, 2, s, generator=torch.Generator().manual_seed(0)) for s in ((2, 4), (6, 2), (2,))]
    step = torch.tensor([0.1, 0.2, 0.3])
    a, b, e = (t.float() * s for t, s in zip(ints, step, strict=True))
    packed = {f"q.{key}": t.reshape(-1).to(torch.int8) for key, t in zip("ABE", ints, strict=True)} | {"q.step": step}
    about = {"format": 1, "modules": {"q": {"bits": [8, 8, 8], "shapes": [list(t.shape) for t in ints]}}}
    adapter = {_PEFT.format("q", "A"): e[:, None] * a, _PEFT.format("q", "B"): b}
    quantized = save(packed, {"rankflow_quantized": json.dumps(about)})
    return {"rankflow_quantized.safetensors": quantized, **_peft(adapter, r=2)}


def _checkpoint() -> Files:
    """Of a run under gates, so that there are tensors of all kinds."""
    from tiny import Tiny, save

    from rankflow.training.checkpoint import save_state

    run = Tiny({"policy": "sora", "when": {"start": 2, "every": 2}, "limits": {"*": {"min": 1}}}, 8).until(3)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a model that has no config
        folder = Path(name)
        save(run, folder)
        save_state(run.flow, folder)
        (folder / "run.pt").unlink()
        (folder / "README.md").unlink(missing_ok=True)
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


READERS: dict[str, Callable[[], Files]] = {
    "peft": _peft,
    "rslora": lambda: _peft(use_rslora=True),
    "dora": _dora,
    "conv": lambda: _peft(_pairs({"conv": (4, 6, 3, 3), "one": (4, 6, 3)}, _PEFT), target_modules=["conv", "one"]),
    "embedding": _embedding,
    "experts": _experts,
    "mixed": _mixed,
    "bin": lambda: {"adapter_model.bin": as_bin(_pairs(_LINEAR, _PEFT)), "adapter_config.json": _config()},
    "old bin": lambda: {
        "adapter_model.bin": as_bin(_pairs(_LINEAR, _PEFT), legacy=True),
        "adapter_config.json": _config(),
    },
    "adalora": _adalora,
    "middles": _middles,
    "loha": _loha,
    "lokr": _lokr,
    "vblora": _vblora,
    "unilora": _unilora,
    "delora": _delora,
    "gralora": _gralora,
    "vera": _vera,
    "drawn vera": lambda: _vera(drawn=True),
    "pvera": lambda: _vera("pvera"),
    "miss": _miss,
    "randlora": _randlora,
    "full": _full,
    "kohya": _kohya,
    "locon": _locon,
    "comfyui": _comfyui,
    "diffusers": _diffusers,
    "wrapped": _wrapped,
    "sharded": _sharded,
    "checkpoint's names": _checkpoints_names,
    "xlabs": _xlabs,
    "gguf": _gguf,
    "residual": _residual,
    "statistics": _statistics,
    "plan": _plan,
    "budget": _budget,
    "ledger": _ledger,
    "quantized": _quantized,
    "checkpoint": _checkpoint,
}


def unpacked(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = int.from_bytes(raw[:8], "little")
    return load(raw), json.loads(raw[8 : 8 + size]).get("__metadata__", {})


def put(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder
