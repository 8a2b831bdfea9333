"""One adapted module as it is: its factors as plain matrices, rank, scaling, and what it needs to come back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.errors import AdapterError
from rankflow.linalg.decompose import Factor
from rankflow.linalg.factor_shapes import canonical_a, canonical_b, stored_a, stored_b
from rankflow.plans.layout import Slot

DORMANT = "_rankflow_dormant"  # attribute of a LoraLayer: adapter name -> Dormant


@dataclass
class Dormant:
    """What a module that left the adapter needs to come back as it was."""

    slot: Slot  # at rank 0
    config_scaling: float
    dtype: torch.dtype
    requires_grad: dict[str, bool]  # by role
    order: tuple[str, ...]  # of the layer's adapters, which is that of its parameters
    dropout: nn.Module | None


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
        self.adapter_name = adapter
        self.paused: tuple[str, ...] | None = None  # roles that `train` has switched off
        self._masked_rank: int | None = None  # the rank, where capacity is above it (`rankflow.lora.capacity`)

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def present(self) -> bool:
        """Whether the module is in the adapter: its rank is above 0."""
        return self.has_factors and self._masked_rank != 0

    @property
    def has_factors(self) -> bool:
        """Whether the layer has factors of this adapter; where they are masked, it has them at rank 0 too."""
        return self.adapter_name in self.layer.r

    @property
    def masked(self) -> bool:
        """Whether capacity may be above the rank: rows of A and columns of B beyond the rank are zero."""
        return self._masked_rank is not None

    @property
    def A(self) -> nn.Parameter:
        if not self.has_factors:
            raise AdapterError(f"{self.name}: has left the adapter (rank 0) and has no factors")
        module, name = self.holders["A"]
        return module._parameters[name]  # type: ignore[return-value]

    @property
    def B(self) -> nn.Parameter:
        if not self.has_factors:
            raise AdapterError(f"{self.name}: has left the adapter (rank 0) and has no factors")
        module, name = self.holders["B"]
        return module._parameters[name]  # type: ignore[return-value]

    @property
    def holders(self) -> dict[Factor, tuple[nn.Module, str]]:
        """The module that each factor is a parameter of, and its name there. A gate computes what the module shows of
        it; what is trained and resized is in `_parameters`."""
        layer, name = self.layer, self.adapter_name
        if self.kind == "embedding":
            return {"A": (layer.lora_embedding_A, name), "B": (layer.lora_embedding_B, name)}
        return {"A": (layer.lora_A[name], "weight"), "B": (layer.lora_B[name], "weight")}

    def tensors(self) -> dict[str, nn.Parameter]:
        """All parameters of the module's adapter by role, in `named_parameters` order: A, B and, where they exist,
        the bias of `lora_bias` and DoRA's magnitude, neither of which knows about rank. Empty at rank 0, unless
        factors are masked."""
        if not self.has_factors:
            return {}
        found = {"A": self.A, "B": self.B}
        bias = getattr(self.layer.lora_B[self.adapter_name], "bias", None) if self.kind != "embedding" else None
        if bias is not None:
            found["bias"] = bias
        if self.adapter_name in self.layer.lora_magnitude_vector:
            found["magnitude"] = self.layer.lora_magnitude_vector[self.adapter_name].weight  # type: ignore[assignment]
        return found

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter_name]) if self.has_factors else self.dormant.slot.scaling

    @property
    def dora(self) -> bool:
        return bool(self.layer.use_dora.get(self.adapter_name, False))

    @property
    def trainable(self) -> bool:
        if not self.has_factors:
            return self.dormant.slot.trainable
        return any(p.requires_grad for p in self.tensors().values())

    @property
    def experts(self) -> int:
        return int(self.layer.num_experts) if self.kind == "experts" else 1  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return self.capacity if self._masked_rank is None else self._masked_rank

    @property
    def capacity(self) -> int:
        """How many directions the factors have, those of zeros too: what PEFT calls their rank."""
        return self.layer.r[self.adapter_name] if self.has_factors else 0

    @property
    def alpha(self) -> float:
        """What PEFT calls lora_alpha, at the present capacity."""
        return self.layer.lora_alpha[self.adapter_name]

    def slot(self) -> Slot:
        if not self.has_factors:
            return self.dormant.slot
        a, b = canonical_a(self.A.detach(), self.experts), canonical_b(self.B.detach(), self.experts)
        if not (a.shape[-2] == b.shape[-1] == self.capacity and self._sizes_agree()):
            raise AdapterError(
                f"{self.name}: PEFT says rank {self.capacity} but A is {list(a.shape)} and B is {list(b.shape)}; "
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
        """Return whether the sizes that PEFT's modules state are those of their weights."""
        if self.kind == "embedding":
            return True
        down, up = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        width = "channels" if self.kind == "conv" else "features"
        return (getattr(down, f"out_{width}"), getattr(up, f"in_{width}")) == (self.A.shape[0], self.B.shape[1])

    # -- canonical views --------------------------------------------------------------------------------------------

    def a(self, t: Tensor | None = None) -> Tensor:
        """A, or a tensor of its shape, as ``[*experts, r, in]``; a view wherever strides allow."""
        found = canonical_a(self.A if t is None else t, self.experts)
        return found if self._masked_rank is None else found[..., : self._masked_rank, :]

    def b(self, t: Tensor | None = None) -> Tensor:
        """B, or a tensor of its shape, as ``[*experts, out, r]``; a view wherever strides allow."""
        found = canonical_b(self.B if t is None else t, self.experts)
        return found if self._masked_rank is None else found[..., : self._masked_rank]

    def shown(self, factor: Factor) -> Tensor:
        """A factor as forwards use it, canonical: under a gate, what the gate makes of it."""
        module, name = self.holders[factor]
        used = module[name] if self.kind == "embedding" else getattr(module, name)  # type: ignore[index]
        return self.a(used) if factor == "A" else self.b(used)

    def raw_a(self, t: Tensor, capacity: int | None = None) -> Tensor:
        """A as PEFT stores it, from ``[*experts, r, in]``; zeros up to `capacity`, or up to the module's if masked."""
        t = self._padded(t, -2, capacity)
        return stored_a(t, self.experts) if self.experts > 1 else t.reshape(t.shape[0], *self._kernel)

    def raw_b(self, t: Tensor, capacity: int | None = None) -> Tensor:
        """B as PEFT stores it, from ``[*experts, out, r]``, likewise."""
        t = self._padded(t, -1, capacity)
        return stored_b(t, self.experts) if self.experts > 1 else t.reshape(*t.shape, *[1] * (len(self._kernel) - 1))

    def _padded(self, t: Tensor, dim: int, capacity: int | None) -> Tensor:
        if capacity is None and self.masked:
            capacity = self.capacity
        if capacity is None:
            return t
        more = capacity - t.shape[dim]
        return F.pad(t, (0, more) if dim == -1 else (0, 0, 0, more))

    @cached_property
    def _kernel(self) -> tuple[int, ...]:
        """Shape of one row of A as stored: (in,), or (channels, *kernel) of a convolution."""
        base = self.layer.get_base_layer()
        if self.kind == "conv":
            return (int(base.in_channels), *base.kernel_size)  # type: ignore[arg-type, misc]
        return (-1,)

    @property
    def dormant(self) -> Dormant:
        """What the module needs to come back; only while it has left."""
        return vars(self.layer)[DORMANT][self.adapter_name]


def dormant_with(layer: LoraLayer, adapter: str) -> Dormant | None:
    """What the layer remembers of an adapter that has left it."""
    return vars(layer).get(DORMANT, {}).get(adapter)
