"""One adapted module: its factors as plain matrices, and the writes that change its rank inside PEFT's layer."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.errors import AdapterError
from rankflow.linalg.decompose import Factor
from rankflow.lora.transaction import Transaction
from rankflow.plans.peft_patterns import alpha_for
from rankflow.plans.plan import Slot

_MEMO = "_rankflow_dormant"  # attribute of a LoraLayer: adapter name -> Dormant
_ABSENT: Any = object()


@dataclass
class Dormant:
    """What a module that left the adapter needs to come back as it was."""

    slot: Slot  # at rank 0
    config_scaling: float
    dtype: torch.dtype
    requires_grad: dict[str, bool]  # by role
    order: tuple[str, ...]  # of the layer's adapters, which is that of its parameters
    dropout: nn.Module | None


class Entries(NamedTuple):
    """What a layer made for an adapter and does not hold yet: the parameters by role, and all of it."""

    tensors: dict[str, nn.Parameter]
    values: list[Any]


class Site:
    """One module of the adapter. Factors are looked up on every access: a resize replaces them."""

    def __init__(self, name: str, layer: LoraLayer, adapter: str, kind: str, inner: bool = False):
        self.name = name
        self.layer = layer
        self.kind = kind  # linear, conv, embedding, attention, experts
        self.inner = inner  # the output projection in a MultiheadAttention: PEFT knows it only as part of the whole
        self.tie: str | None = None  # sites of one tie always have one rank
        self.min_rank = 1 if kind in ("attention", "experts") else 0
        self.sharded = False  # whether its parameters are spread over processes between steps (`rankflow.lora.dtensor`)
        self._adapter = adapter
        self._paused: tuple[str, ...] | None = None  # roles that `train` has switched off
        self._held: int | None = None  # the rank, where factors have room for more (see `rankflow.lora.capacity`)

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def present(self) -> bool:
        """False while the module has left the adapter (rank 0)."""
        return self.placed and self._held != 0

    @property
    def placed(self) -> bool:
        """Whether the layer has factors of this adapter; with room for more than rank 0, it has them at that too."""
        return self._adapter in self.layer.r

    @property
    def roomy(self) -> bool:
        """Whether factors have room for more than the rank: rows of A and columns of B beyond it are zero."""
        return self._held is not None

    @property
    def A(self) -> nn.Parameter:
        if not self.placed:
            raise AdapterError(f"{self.name}: has left the adapter (rank 0) and has no factors")
        module, name = self.holders["A"]
        return module._parameters[name]  # type: ignore[return-value]

    @property
    def B(self) -> nn.Parameter:
        if not self.placed:
            raise AdapterError(f"{self.name}: has left the adapter (rank 0) and has no factors")
        module, name = self.holders["B"]
        return module._parameters[name]  # type: ignore[return-value]

    @property
    def holders(self) -> dict[Factor, tuple[nn.Module, str]]:
        """The module that each factor is a parameter of, and its name there. A gate computes what the module shows of
        it; what is trained and resized is in `_parameters`."""
        layer, name = self.layer, self._adapter
        if self.kind == "embedding":
            return {"A": (layer.lora_embedding_A, name), "B": (layer.lora_embedding_B, name)}
        return {"A": (layer.lora_A[name], "weight"), "B": (layer.lora_B[name], "weight")}

    def tensors(self) -> dict[str, nn.Parameter]:
        """All parameters of the module's adapter by role, in `named_parameters` order: A, B and, where they exist,
        the bias of `lora_bias` and DoRA's magnitude, neither of which knows about rank. Empty at rank 0, unless there
        is room for more."""
        if not self.placed:
            return {}
        found = {"A": self.A, "B": self.B}
        bias = getattr(self.layer.lora_B[self._adapter], "bias", None) if self.kind != "embedding" else None
        if bias is not None:
            found["bias"] = bias
        if self._adapter in self.layer.lora_magnitude_vector:
            found["magnitude"] = self.layer.lora_magnitude_vector[self._adapter].weight  # type: ignore[assignment]
        return found

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self._adapter]) if self.placed else self._dormant.slot.scaling

    @property
    def dora(self) -> bool:
        return bool(self.layer.use_dora.get(self._adapter, False))

    @property
    def trainable(self) -> bool:
        if not self.placed:
            return self._dormant.slot.trainable
        return any(p.requires_grad for p in self.tensors().values())

    @property
    def experts(self) -> int:
        return int(self.layer.num_experts) if self.kind == "experts" else 1  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return self.size if self._held is None else self._held

    @property
    def size(self) -> int:
        """How many directions the factors have room for: what PEFT calls their rank."""
        return self.layer.r[self._adapter] if self.placed else 0

    @property
    def alpha(self) -> float:
        """What PEFT calls lora_alpha, at the present size."""
        return self.layer.lora_alpha[self._adapter]

    def slot(self) -> Slot:
        if not self.placed:
            return self._dormant.slot
        a, b = canonical_a(self.A.detach(), self.experts), canonical_b(self.B.detach(), self.experts)
        if not (a.shape[-2] == b.shape[-1] == self.size and self._sizes_agree()):
            raise AdapterError(
                f"{self.name}: PEFT says rank {self.size} but A is {list(a.shape)} and B is {list(b.shape)}; "
                "something else resized this adapter"
            )
        return Slot(
            rank=self.rank,
            in_features=a.shape[-1],
            out_features=b.shape[-2],
            scaling=self.scaling,
            min_rank=self.min_rank,
            kind=self.kind,
            experts=self.experts,
            itemsize=self.A.element_size(),
            tie=self.tie,
            trainable=self.trainable,
        )

    def _sizes_agree(self) -> bool:
        """Whether PEFT's modules say of themselves what their weights are."""
        if self.kind == "embedding":
            return True
        down, up = self.layer.lora_A[self._adapter], self.layer.lora_B[self._adapter]
        width = "channels" if self.kind == "conv" else "features"
        return (getattr(down, f"out_{width}"), getattr(up, f"in_{width}")) == (self.A.shape[0], self.B.shape[1])

    # -- canonical views --------------------------------------------------------------------------------------------

    def a(self, t: Tensor | None = None) -> Tensor:
        """A, or a tensor of its shape, as ``[*experts, r, in]``; a view wherever strides allow."""
        found = canonical_a(self.A if t is None else t, self.experts)
        return found if self._held is None else found[..., : self._held, :]

    def b(self, t: Tensor | None = None) -> Tensor:
        """B, or a tensor of its shape, as ``[*experts, out, r]``; a view wherever strides allow."""
        found = canonical_b(self.B if t is None else t, self.experts)
        return found if self._held is None else found[..., : self._held]

    def raw_a(self, t: Tensor, size: int | None = None) -> Tensor:
        """Back from ``[*experts, r, in]`` to the shape that PEFT stores at that rank, or with zeros up to `size`: that
        of the factors there are, if they have room for more than r."""
        size = self.size if size is None and self.roomy else size
        t = t if size is None else F.pad(t, (0, 0, 0, size - t.shape[-2]))
        if self.experts > 1:
            return t.reshape(-1, t.shape[-1])
        return t.reshape(t.shape[0], *self._kernel)

    def raw_b(self, t: Tensor, size: int | None = None) -> Tensor:
        """Back from ``[*experts, out, r]``, likewise."""
        size = self.size if size is None and self.roomy else size
        t = t if size is None else F.pad(t, (0, size - t.shape[-1]))
        if self.experts > 1:
            return stored_b(t, self.experts)
        return t.reshape(*t.shape, *[1] * (len(self._kernel) - 1))

    @cached_property
    def _kernel(self) -> tuple[int, ...]:
        """Shape of one row of A as stored: (in,), or (channels, *kernel) of a convolution."""
        base = self.layer.get_base_layer()
        if self.kind == "conv":
            return (int(base.in_channels), *base.kernel_size)  # type: ignore[arg-type, misc]
        return (-1,)

    # -- writes -----------------------------------------------------------------------------------------------------

    def put(self, transaction: Transaction, A: nn.Parameter, B: nn.Parameter, scaling: float | None = None) -> None:
        """Make `A` and `B`, in stored shape, the factors, and everything PEFT keeps beside them agree.

        Scaling stays, and alpha follows the rank, unless another `scaling` is given.
        """
        layer, name = self.layer, self._adapter
        rank = canonical_a(A.detach(), self.experts).shape[-2]
        kept = self._config_scaling() if scaling is None else scaling
        alpha = alpha_for(kept, rank, bool(layer.use_rslora.get(name)))
        for (module, key), p in zip(self.holders.values(), (A, B), strict=True):
            transaction.contents(module._parameters, {**module._parameters, key: p})
        if self.kind != "embedding":
            down, up = layer.lora_A[name], layer.lora_B[name]
            width = "channels" if self.kind == "conv" else "features"
            transaction.attr(down, f"out_{width}", A.shape[0])
            transaction.attr(up, f"in_{width}", B.shape[1])
        transaction.contents(layer.r, {**layer.r, name: rank})
        transaction.contents(layer.lora_alpha, {**layer.lora_alpha, name: alpha})
        if scaling is not None:
            transaction.contents(layer.scaling, {**layer.scaling, name: scaling})

    def fill(self, transaction: Transaction, A: Tensor, B: Tensor, rank: int) -> None:
        """Make `rank` directions the module's, of factors with room for more: in place, in stored shape, zeros beyond
        them. Gradients go, as they do with factors that are replaced."""
        for p, value in ((self.A, A), (self.B, B)):
            transaction.tensor(p, value)
            transaction.attr(p, "grad", None)
        transaction.attr(self, "_held", rank)

    def hold(self, transaction: Transaction, rank: int | None) -> None:
        """Say that the factors have room for more than `rank`, and zeros there; None: they have not."""
        transaction.attr(self, "_held", rank)

    def leave(self, transaction: Transaction) -> None:
        """Rank 0: this adapter's entries leave the layer, whose wrapper, active adapters and other adapters stay.

        Differs: `LoraLayer.delete_adapter` would make another adapter the active one.
        """
        layer, name = self.layer, self._adapter
        stores = layer.lora_embedding_A if self.kind == "embedding" else layer.lora_A
        left = Dormant(
            slot=replace(self.slot(), rank=0),
            config_scaling=self._config_scaling(),
            dtype=self.A.dtype,
            requires_grad={role: p.requires_grad for role, p in self.tensors().items()},
            order=tuple(stores.keys()),
            dropout=layer.lora_dropout._modules.get(name),
        )
        memo = vars(layer).setdefault(_MEMO, {})
        transaction.contents(memo, {**memo, name: left})
        for store in _stores(layer):
            if name in store:
                transaction.contents(store, {k: v for k, v in store.items() if k != name})

    def recall(self, transaction: Transaction, scaling: float) -> None:
        """Take over the scaling that a checkpoint knows: a module that has left takes it up when it returns.

        One that is there has its own, and only loses what rounding alpha and dividing by the rank again have changed.
        """
        if self.placed:
            if math.isclose(self.scaling, scaling, rel_tol=1e-9):
                transaction.contents(self.layer.scaling, {**self.layer.scaling, self._adapter: scaling})
            return
        left = self._dormant
        times = scaling / left.slot.scaling
        left = replace(left, slot=replace(left.slot, scaling=scaling), config_scaling=times * left.config_scaling)
        memo = vars(self.layer)[_MEMO]
        transaction.contents(memo, {**memo, self._adapter: left})

    @property
    def switched(self) -> tuple[str, ...]:
        """Roles that `train` switches: on, those it has switched off before (all, if it never did)."""
        if self._paused is not None:
            return self._paused
        flags = self._flags()
        return tuple(role for role, on in flags.items() if on) or tuple(flags)

    def _flags(self) -> dict[str, bool]:
        if not self.placed:
            return self._dormant.requires_grad
        return {role: p.requires_grad for role, p in self.tensors().items()}

    def train(self, transaction: Transaction, on: bool) -> None:
        """Switch training of the module's parameters; off, they lose their gradients. Also while it has left.

        What its owner had frozen before it was switched off stays frozen when it is switched on again.
        """
        roles = self.switched
        transaction.attr(self, "_paused", None if on else roles)
        flags = {role: on if role in roles else was for role, was in self._flags().items()}
        if not self.placed:
            memo = vars(self.layer)[_MEMO]
            left = replace(self._dormant, slot=replace(self._dormant.slot, trainable=on), requires_grad=flags)
            transaction.contents(memo, {**memo, self._adapter: left})
        for role, p in self.tensors().items():
            transaction.attr(p, "requires_grad", flags[role])
            if not flags[role]:
                transaction.attr(p, "grad", None)

    def build(self, config: LoraConfig, rank: int) -> Entries:
        """Fresh entries for a module that is to come back, made by the layer itself; the layer stays as it is.

        The global random state stays as it is too. Hand the result to `rejoin`.
        """
        layer, name, left = self.layer, self._adapter, self._dormant
        plain = copy.copy(config)
        plain.init_lora_weights = True  # the factors are ours to fill; other schemes change the base weight
        plain.inference_mode = False
        alpha = alpha_for(self._config_scaling(), rank, bool(config.use_rslora))
        stores = _stores(layer)
        before = [dict(store) for store in stores]
        flags = [(p, p.requires_grad) for p in nn.Module.parameters(layer)]  # type: ignore[arg-type]
        attrs = {k: vars(layer)[k] for k in ("_active_adapter", "adapter_layer_names") if k in vars(layer)}
        device = next((p.device for p, _ in flags), torch.device("cpu"))
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT said it all when the adapter was made
                update = cast(Any, layer).update_layer
                update(name, rank, lora_alpha=alpha, **_update_arguments(update, plain, self.name))
            for role, p in self.tensors().items():
                p.requires_grad_(left.requires_grad.get(role, True))
                p.data = p.data.to(left.dtype)
            if left.dropout is not None:
                layer.lora_dropout[name] = left.dropout
            layer.scaling[name] = left.slot.scaling
            return Entries(self.tensors(), [store.get(name, _ABSENT) for store in stores])
        finally:
            for store, old in zip(stores, before, strict=True):
                store.clear()
                store.update(old)
            for p, flag in flags:
                p.requires_grad_(flag)
            vars(layer).pop("adapter_layer_names", None)
            vars(layer).update(attrs)

    def rejoin(self, transaction: Transaction, entries: Entries) -> None:
        """Put the entries of `build` back in their old place among the layer's adapters."""
        layer, name = self.layer, self._adapter
        place = {adapter: i for i, adapter in enumerate(self._dormant.order)}
        for store, entry in zip(_stores(layer), entries.values, strict=True):
            if entry is not _ABSENT:
                new = {**store, name: entry}
                transaction.contents(store, dict(sorted(new.items(), key=lambda kv: place.get(kv[0], len(place)))))
        memo = vars(layer)[_MEMO]
        transaction.contents(memo, {k: v for k, v in memo.items() if k != name})

    @property
    def _dormant(self) -> Dormant:
        return vars(self.layer)[_MEMO][self._adapter]

    def _config_scaling(self) -> float:
        """Scaling as rank and alpha give it; `set_scale` and `scale_layer` may have put another one in force."""
        if not self.placed:
            return self._dormant.config_scaling
        size = self.size
        return self.alpha / (math.sqrt(size) if self.layer.use_rslora.get(self._adapter) else size)


def canonical_a(t: Tensor, experts: int) -> Tensor:
    """A as stored, expert-major, to ``[*experts, r, in]``."""
    return t.reshape(experts, -1, t.shape[-1]) if experts > 1 else t.flatten(1)


def canonical_b(t: Tensor, experts: int) -> Tensor:
    """B as stored, its columns rank-major and expert-minor, to ``[*experts, out, r]``."""
    return t.reshape(t.shape[0], -1, experts).permute(2, 0, 1) if experts > 1 else t.flatten(1)


def stored_b(t: Tensor, experts: int) -> Tensor:
    """The way back of `canonical_b`, but for the kernel dimensions of a convolution."""
    return t.permute(1, 2, 0).reshape(t.shape[1], -1) if experts > 1 else t


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


def dormant_with(layer: LoraLayer, adapter: str) -> Dormant | None:
    """What the layer remembers of an adapter that has left it."""
    return vars(layer).get(_MEMO, {}).get(adapter)
