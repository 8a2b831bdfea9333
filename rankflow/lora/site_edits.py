"""Change one adapted module inside PEFT's layer: its factors, rank and scaling, whether it is there, whether it trains.

Every function writes through a transaction, or undoes what it did itself.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankflow.linalg.factor_shapes import canonical_a
from rankflow.lora.site import DORMANT, Dormant, Site
from rankflow.lora.transaction import Transaction
from rankflow.plans.peft_patterns import alpha_for, scaling_for

_ABSENT: Any = object()


class Entries(NamedTuple):
    """The entries that a layer made for an adapter and does not hold yet: its parameters by role, and everything
    else."""

    tensors: dict[str, nn.Parameter]
    values: list[Any]


def put(site: Site, transaction: Transaction, A: nn.Parameter, B: nn.Parameter, scaling: float | None = None) -> None:
    """Make `A` and `B`, in stored shape, the factors, and make everything that PEFT keeps beside them agree.

    Scaling stays, and alpha follows the rank, unless another `scaling` is given.
    """
    layer, name = site.layer, site.adapter_name
    rank = canonical_a(A.detach(), site.experts).shape[-2]
    kept = _config_scaling(site) if scaling is None else scaling
    alpha = alpha_for(kept, rank, bool(layer.use_rslora.get(name)))
    for (module, key), p in zip(site.holders.values(), (A, B), strict=True):
        transaction.contents(module._parameters, {**module._parameters, key: p})
    if site.kind != "embedding":
        down, up = layer.lora_A[name], layer.lora_B[name]
        width = "channels" if site.kind == "conv" else "features"
        transaction.attr(down, f"out_{width}", A.shape[0])
        transaction.attr(up, f"in_{width}", B.shape[1])
    transaction.contents(layer.r, {**layer.r, name: rank})
    transaction.contents(layer.lora_alpha, {**layer.lora_alpha, name: alpha})
    if scaling is not None:
        transaction.contents(layer.scaling, {**layer.scaling, name: scaling})


def fill(site: Site, transaction: Transaction, A: Tensor, B: Tensor, rank: int) -> None:
    """Make `rank` directions the module's, of factors of a greater capacity: in place, in stored shape, zeros beyond
    them. Gradients go, as they do with factors that are replaced."""
    for p, value in ((site.A, A), (site.B, B)):
        transaction.tensor(p, value)
        transaction.attr(p, "grad", None)
    transaction.attr(site, "_masked_rank", rank)


def mask(site: Site, transaction: Transaction, rank: int | None) -> None:
    """Let the module have `rank`, and factors of its capacity with zeros beyond that; None: capacity is its rank."""
    transaction.attr(site, "_masked_rank", rank)


def leave(site: Site, transaction: Transaction) -> None:
    """Set rank 0: this adapter's entries leave the layer, whose wrapper, active adapters and other adapters stay.

    Differs: `LoraLayer.delete_adapter` would make another adapter the active one.
    """
    layer, name = site.layer, site.adapter_name
    stores = layer.lora_embedding_A if site.kind == "embedding" else layer.lora_A
    left = Dormant(
        slot=replace(site.slot(), rank=0),
        config_scaling=_config_scaling(site),
        dtype=site.A.dtype,
        requires_grad={role: p.requires_grad for role, p in site.tensors().items()},
        order=tuple(stores.keys()),
        dropout=layer.lora_dropout._modules.get(name),
    )
    memo = vars(layer).setdefault(DORMANT, {})
    transaction.contents(memo, {**memo, name: left})
    for store in _stores(layer):
        if name in store:
            transaction.contents(store, {k: v for k, v in store.items() if k != name})


def recall(site: Site, transaction: Transaction, scaling: float) -> None:
    """Take over the scaling that a checkpoint knows: a module that has left takes it up when it returns.

    One that is there has its own, and only loses what rounding alpha and dividing by the rank again have changed.
    """
    if site.has_factors:
        if math.isclose(site.scaling, scaling, rel_tol=1e-9):
            transaction.contents(site.layer.scaling, {**site.layer.scaling, site.adapter_name: scaling})
        return
    left = site.dormant
    times = scaling / left.slot.scaling
    left = replace(left, slot=replace(left.slot, scaling=scaling), config_scaling=times * left.config_scaling)
    memo = vars(site.layer)[DORMANT]
    transaction.contents(memo, {**memo, site.adapter_name: left})


def switched(site: Site) -> tuple[str, ...]:
    """Return the roles that `train` switches; switching on, those that it switched off before (all, if it never
    did)."""
    if site.paused is not None:
        return site.paused
    flags = _flags(site)
    return tuple(role for role, on in flags.items() if on) or tuple(flags)


def _flags(site: Site) -> dict[str, bool]:
    if not site.has_factors:
        return site.dormant.requires_grad
    return {role: p.requires_grad for role, p in site.tensors().items()}


def train(site: Site, transaction: Transaction, on: bool) -> None:
    """Switch training of the module's parameters; off, they lose their gradients. Also while it has left.

    What its owner had frozen before it was switched off stays frozen when it is switched on again.
    """
    roles = switched(site)
    transaction.attr(site, "paused", None if on else roles)
    flags = {role: on if role in roles else was for role, was in _flags(site).items()}
    if not site.has_factors:
        memo = vars(site.layer)[DORMANT]
        left = replace(site.dormant, slot=replace(site.dormant.slot, trainable=on), requires_grad=flags)
        transaction.contents(memo, {**memo, site.adapter_name: left})
    for role, p in site.tensors().items():
        transaction.attr(p, "requires_grad", flags[role])
        if not flags[role]:
            transaction.attr(p, "grad", None)


def build(site: Site, config: LoraConfig, rank: int) -> Entries:
    """Fresh entries for a module that is to come back, made by the layer itself; the layer stays as it is.

    The global random state stays as it is too. Hand the result to `rejoin`.
    """
    layer, name, left = site.layer, site.adapter_name, site.dormant
    plain = copy.copy(config)
    plain.init_lora_weights = True  # the factors are ours to fill; other schemes change the base weight
    plain.inference_mode = False
    alpha = alpha_for(_config_scaling(site), rank, bool(config.use_rslora))
    stores = _stores(layer)
    before = [dict(store) for store in stores]
    flags = [(p, p.requires_grad) for p in nn.Module.parameters(layer)]  # type: ignore[arg-type]
    attrs = {k: vars(layer)[k] for k in ("_active_adapter", "adapter_layer_names") if k in vars(layer)}
    device = next((p.device for p, _ in flags), torch.device("cpu"))
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT said it all when the adapter was made
            update = cast(Any, layer).update_layer
            update(name, rank, lora_alpha=alpha, **_update_arguments(update, plain, site.name))
        for role, p in site.tensors().items():
            p.requires_grad_(left.requires_grad.get(role, True))
            p.data = p.data.to(left.dtype)
        if left.dropout is not None:
            layer.lora_dropout[name] = left.dropout
        layer.scaling[name] = left.slot.scaling
        return Entries(site.tensors(), [store.get(name, _ABSENT) for store in stores])
    finally:
        for store, old in zip(stores, before, strict=True):
            store.clear()
            store.update(old)
        for p, flag in flags:
            p.requires_grad_(flag)
        vars(layer).pop("adapter_layer_names", None)
        vars(layer).update(attrs)


def rejoin(site: Site, transaction: Transaction, entries: Entries) -> None:
    """Put the entries of `build` back in their old place among the layer's adapters."""
    layer, name = site.layer, site.adapter_name
    place = {adapter: i for i, adapter in enumerate(site.dormant.order)}
    for store, entry in zip(_stores(layer), entries.values, strict=True):
        if entry is not _ABSENT:
            new = {**store, name: entry}
            transaction.contents(store, dict(sorted(new.items(), key=lambda kv: place.get(kv[0], len(place)))))
    memo = vars(layer)[DORMANT]
    transaction.contents(memo, {k: v for k, v in memo.items() if k != name})


def _config_scaling(site: Site) -> float:
    """Scaling as rank and alpha give it; `set_scale` and `scale_layer` may have put another one in force."""
    if not site.has_factors:
        return site.dormant.config_scaling
    return scaling_for(site.alpha, site.capacity, bool(site.layer.use_rslora.get(site.adapter_name)))


def _stores(layer: LoraLayer) -> list[dict[str, Any]]:
    """Every plain dict in the layer that has one entry per adapter."""
    found: list[dict[str, Any]] = []
    for attr in dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")):
        value = getattr(layer, attr, None)
        if isinstance(value, nn.ModuleDict):
            found.append(value._modules)
        elif isinstance(value, nn.ParameterDict):
            found += [value._keys, value._parameters]
        elif isinstance(value, dict):
            found.append(value)
    return found


def _update_arguments(update: Any, config: LoraConfig, target_name: str) -> dict[str, Any]:
    """Arguments of `update_layer`, which took the config's fields one by one before it took the config."""
    wanted = inspect.signature(update).parameters
    if "config" in wanted:
        return {"config": config, "target_name": target_name}
    skip = ("r", "lora_alpha")
    return {field: getattr(config, field) for field in wanted if field not in skip and hasattr(config, field)}
