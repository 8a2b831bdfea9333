"""llama.cpp's names for the modules of a transformers model, and the order in which it keeps their rows.

Names are those of the `gguf` package's own map. Rows are another matter: the converter reorders those of q and k in
models of the llama family (`LlamaModel.permute` in llama.cpp's `conversion/llama.py`: rotary pairs side by side instead
of half a head apart), and B has to follow. So only architectures are known whose conversion was read, by the name that
`architectures` in their config.json gives:

Llama, Mistral         rows of q_proj and k_proj reordered
Qwen2, Qwen3           as they are
Gemma, Gemma2, Gemma3  as they are; Gemma3's embeddings are cut to the tokenizer's size, so no adapter of them fits
Phi, Phi3              as they are; Phi3's joined qkv_proj and gate_up_proj stay joined
GPT2                   as they are, its weights being turned round from Conv1D's, as A and B of PEFT are already
Bert                   as they are
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import BaseNeeded, ConfigError

# transformers' class -> (architecture in gguf, whether q and k are reordered, modules that cannot be adapted)
_KNOWN: Mapping[str, tuple[str, bool, tuple[str, ...]]] = {
    "LlamaForCausalLM": ("LLAMA", True, ()),
    "MistralForCausalLM": ("LLAMA", True, ()),
    "Qwen2ForCausalLM": ("QWEN2", False, ()),
    "Qwen3ForCausalLM": ("QWEN3", False, ()),
    "GemmaForCausalLM": ("GEMMA", False, ("lm_head",)),
    "Gemma2ForCausalLM": ("GEMMA2", False, ("lm_head",)),
    "Gemma3ForCausalLM": ("GEMMA3", False, ("lm_head", "embed_tokens")),
    "PhiForCausalLM": ("PHI2", False, ()),
    "Phi3ForCausalLM": ("PHI3", False, ()),
    "GPT2LMHeadModel": ("GPT2", False, ()),
    "BertModel": ("BERT", False, ()),
}
_TIED = ("lm_head", "embed_tokens", "wte", "word_embeddings")
_MOST = 1_000  # layers or heads; names are made for every layer
_EXTRA = 'the gguf package is needed to write GGUF; install it with: pip install "rankflow-lora[gguf]"'


@dataclass(frozen=True)
class Names:
    """The names and row orders of one base model."""

    architecture: str  # as general.architecture in the file has it
    _map: Any
    _reorders: bool
    _fixed: tuple[str, ...]
    _heads: int
    _key_heads: int
    _base: Path

    @classmethod
    def of(cls, base: Path) -> Names:
        """
        Args:
            base: a base model's folder, of which only config.json is read.

        Raises:
            ConfigError: no config, an architecture that is not known, or no gguf package.
        """
        try:
            import gguf
        except ImportError:
            raise ConfigError(_EXTRA) from None
        config = _config(base)
        named = config.get("architectures")
        found = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        if found not in _KNOWN:
            said = found if found and found.isprintable() else ascii(named)
            raise ConfigError(
                f"{base / 'config.json'}: architecture {said[:80]}, whose layout in llama.cpp is not known here; known "
                f"are {', '.join(_KNOWN)}"
            )
        name, reorders, fixed = _KNOWN[found]
        if config.get("tie_word_embeddings", name in ("GPT2", "GEMMA", "GEMMA2", "GEMMA3")):
            fixed = (*fixed, *_TIED)
        layers = _number(config, base, "num_hidden_layers", "n_layer")
        heads = _number(config, base, "num_attention_heads", "n_head")
        grouped = config.get("num_key_value_heads") is not None
        arch = gguf.MODEL_ARCH[name]
        return cls(
            gguf.MODEL_ARCH_NAMES[arch],
            gguf.get_tensor_name_map(arch, layers),
            reorders,
            fixed,
            heads,
            _number(config, base, "num_key_value_heads") if grouped else heads,
            base,
        )

    def tensor(self, module: str) -> str:
        """Return the name of the base model's tensor that is the weight of `module`.

        Raises:
            ConfigError: there is none, or none that an adapter can be for.
        """
        last = module.rpartition(".")[2]
        if last in self._fixed:
            raise ConfigError(
                f"{module}: has no tensor of its own in llama.cpp's form of this model (tied or cut); train without it"
            )
        found = self._map.get_name(module)
        if found is None:
            raise ConfigError(
                f"{module}: is no module of {self.architecture} as {self._base / 'config.json'} describes it; give the "
                "adapter's own base model with --base"
            )
        return f"{found}.weight"

    def rows(self, module: str, b: Tensor) -> Tensor:
        """Return B ``[out, r]`` with its rows in llama.cpp's order."""
        heads = {"q_proj": self._heads, "k_proj": self._key_heads}.get(module.rpartition(".")[2])
        if not self._reorders or heads is None:
            return b
        if b.shape[0] % (2 * heads):
            raise ConfigError(
                f"{module}: has {b.shape[0]} outputs, and {self._base / 'config.json'} says {heads} heads; give the "
                "adapter's own base model with --base"
            )
        order = torch.arange(b.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        return b[order]


def _config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))  # not strictly: transformers itself writes Infinity
    except FileNotFoundError:
        raise BaseNeeded(f"{path}: no such file; --base is the folder of the base model, or of its config") from None
    except (ValueError, OSError, RecursionError) as e:
        raise ConfigError(f"{path}: not JSON ({e}); --base is the folder of the base model, or of its config") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object; --base is the folder of the base model, or of its config")
    return config


def _number(config: Mapping[str, Any], base: Path, *names: str) -> int:
    value = next((config[name] for name in names if name in config), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
        raise ConfigError(
            f"{base / 'config.json'}: {names[0]} is {ascii(value)[:80]}; it must be a whole number from 1 to {_MOST:,}"
        )
    return value
