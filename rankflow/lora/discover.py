"""Find a LoRA adapter's layers in a live model, and refuse what cannot be resized."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from rankflow.errors import AdapterError
from rankflow.lora.site import dormant_with


def root_of(model: nn.Module, adapter_name: str) -> nn.Module:
    """Return the module that the adapter is in. It is the same one for every module around it.

    Raises:
        AdapterError: no such adapter.
    """
    return find(model, adapter_name)[0]


def find(model: nn.Module, name: str) -> tuple[nn.Module, LoraConfig]:
    """The module inside which names start, and the adapter's config, which it shares with no other adapter."""
    roots: list[tuple[nn.Module, dict[str, Any]]] = [
        (m.model, m.peft_config) for m in model.modules() if isinstance(m, BaseTuner)
    ]
    if not roots:  # inject_adapter_in_model and transformers' add_adapter leave their configs on the model itself
        roots = [(m, c) for m in model.modules() if isinstance(c := m.__dict__.get("peft_config"), dict)]
    if not roots:
        raise AdapterError(f"{type(model).__name__} has no LoRA adapter; wrap it with peft.get_peft_model first")
    having = [(root, configs) for root, configs in roots if name in configs]
    if not having:
        known = ", ".join(sorted({n for _, configs in roots for n in configs}))
        raise AdapterError(f"no adapter {name!r} in this model; there is {known}")
    if len(having) > 1:
        raise AdapterError(f"{len(having)} models inside this one have an adapter {name!r}; pass the one that is meant")
    root, configs = having[0]
    config = configs[name]
    if any(other is config for key, other in configs.items() if key != name):
        config = configs[name] = copy.deepcopy(config)  # TRL gives its reference adapter that of the one it trains
    if config.peft_type != PeftType.LORA:
        kind = PeftType(config.peft_type).value
        raise AdapterError(f"adapter {name!r} is {kind}, not LORA; only plain LoRA can be resized")
    return root, config


def adapted_layers(root: nn.Module, adapter: str, shards: bool) -> Iterator[tuple[str, LoraLayer, str]]:
    """Yield name, layer and kind of every module that has the adapter, or had it before a resize took it to rank 0."""
    modules = dict(root.named_modules())
    for path, layer in modules.items():
        if not isinstance(layer, LoraLayer):
            continue
        left = dormant_with(layer, adapter)
        if adapter not in layer.r and left is None:
            continue
        parts, kept = path.split("."), []
        for i, part in enumerate(parts):
            inside = isinstance(modules.get(".".join(parts[:i])), BaseTunerLayer)
            if part != "_orig_mod" and not (part == "base_layer" and inside):
                kept.append(part)
        if isinstance(layer, ParamWrapper):
            kept.append(layer.parameter_name)
        name = ".".join(kept)
        if left is not None and adapter not in layer.r:
            yield name, layer, left.slot.kind
            continue
        refuse_unsupported(name, layer, adapter, shards)
        outer = modules.get(path.removesuffix(".base_layer.out_proj"))
        in_attention = isinstance(layer, MultiheadAttention) or isinstance(outer, MultiheadAttention)
        yield name, layer, "attention" if in_attention else _kind(name, layer, adapter)


def _kind(name: str, layer: LoraLayer, adapter: str) -> str:
    if isinstance(layer, ParamWrapper):
        return "experts"
    if adapter in layer.lora_embedding_A:
        return "embedding"
    factors = (layer.lora_A[adapter], layer.lora_B[adapter])
    for kind, cls in (("linear", nn.Linear), ("conv", nn.modules.conv._ConvNd)):
        if all(isinstance(factor, cls) for factor in factors):
            return kind
    types = " and ".join(type(factor).__name__ for factor in factors)
    raise AdapterError(f"{name}: its LoRA factors are {types}, which rankflow does not know how to resize")


def refuse_unsupported(name: str, layer: LoraLayer, adapter: str, shards: bool) -> None:
    if adapter in layer.merged_adapters:
        raise AdapterError(f"{name}: adapter {adapter!r} is merged into the base weights; call unmerge_adapter() first")
    variant = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else "Dora"
    if not variant.startswith("Dora"):
        raise AdapterError(
            f"{name}: uses PEFT's {variant.removesuffix('Variant')}, which ties what it computes to the rank or the "
            "basis of its factors (or to the input); only plain LoRA and DoRA can be resized"
        )
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise AdapterError(f"{name}: a grouped convolution ties rank to its groups; leave it out of target_modules")
    holder, key = (layer.lora_A[adapter], "weight") if adapter in layer.lora_A else (layer.lora_embedding_A, adapter)
    if not shards and hasattr(holder._parameters.get(key), "device_mesh"):
        raise AdapterError(
            f"{name}: its LoRA factors are sharded over devices (DTensor, of FSDP2 or tensor parallelism) and cannot "
            "be resized; shard the base only, leaving the adapter out with fully_shard(..., ignored_params=...), or "
            "use rankflow.attach with mode: mask in a loop of your own"
        )
