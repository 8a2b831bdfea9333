"""Find and check what PEFT keeps of a LoRA adapter in a live model; `Site` does the same for one module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import nn

from rankflow.errors import AdapterError
from rankflow.linalg.random import keyed_generator
from rankflow.lora import site_edits
from rankflow.lora.discover import adapted_layers, find, refuse_unsupported
from rankflow.lora.site import Site
from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.peft_inits import loadable_init, refuse_init
from rankflow.plans.peft_patterns import anchored, exclude_modules, rank_config


class Adapter:
    """One LoRA adapter of a live model, site by site.

    `model` is a `PeftModel`, or any model into which PEFT has injected LoRA layers; DDP and torch.compile wrappers
    around it do no harm. `sites` are in `named_modules` order under the names that `rank_pattern` would use; the
    output projection of a `MultiheadAttention`, which PEFT adapts along with the input, is `<name>.out_proj`.
    With `shards`, factors may be spread over processes (`rankflow.lora.dtensor`), and `sharded` says whether they are.

    Raises:
        AdapterError: there is no such adapter, or it cannot be resized: merged, not plain LoRA or DoRA, a grouped
            convolution, factors shared between modules or split over devices. The message says which and why.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", *, shards: bool = False):
        self.model = model
        self.name = adapter_name
        self._shards = shards
        root, self.config = find(model, adapter_name)
        self.root = root
        self.sites: dict[str, Site] = {}
        for name, layer, kind in adapted_layers(root, adapter_name, shards):
            inner = kind == "attention" and not isinstance(layer, MultiheadAttention)
            self.sites[name] = Site(name, layer, adapter_name, kind, inner)
        if not self.sites:
            raise AdapterError(f"adapter {adapter_name!r} has no LoRA layer in this model")
        self.sharded = any(hasattr(p, "device_mesh") for p in self.parameters())
        for site in self.sites.values():
            site.sharded = self.sharded
        self.check()
        self._tie(root)

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        layers = [site.layer for site in self.sites.values() if site.present]
        return all(not layer.disable_adapters and self.name in layer.active_adapters for layer in layers)

    def layout(self) -> Layout:
        """What exists now; limits are the widest that PEFT allows."""
        return Layout({name: site.slot() for name, site in self.sites.items()})

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters as they are now: factors, LoRA biases, DoRA magnitudes."""
        for site in self.sites.values():
            yield from site.tensors().values()

    def check(self) -> None:
        """Raise AdapterError if the adapter is, by now, in a state that cannot be resized."""
        owner: dict[int, str] = {}
        for name, site in self.sites.items():
            if not site.present:
                continue
            refuse_unsupported(name, site.layer, self.name, self._shards)
            for p in (site.A, site.B):
                at = id(p) if hasattr(p, "device_mesh") else p.data_ptr()  # a shard without a row is nowhere
                first = owner.setdefault(at, name)
                if first != name and p.device.type != "meta":
                    raise AdapterError(
                        f"{first} and {name} share their LoRA factors; resizing would part them. Adapt only one of "
                        "the two, or leave out ensure_weight_tying"
                    )

    def refuse_resizing(self) -> None:
        """Raise AdapterError if it is tied to its ranks by how it was started."""
        refuse_init(self.config.init_lora_weights, f"adapter {self.name!r}")

    def check_trains(self) -> None:
        """Raise AdapterError if it is not active while another is, or if nothing of it trains."""
        present = [site for site in self.sites.values() if site.present]
        active = {name for site in present for name in site.layer.active_adapters}
        if present and self.name not in active:
            raise AdapterError(
                f"adapter {self.name!r} is not active, {' and '.join(map(repr, sorted(active))) or 'none'} is; call "
                f"model.set_adapter({self.name!r}), then make the optimizer"
            )
        if not any(p.requires_grad for p in self.parameters()):
            raise AdapterError(
                f"nothing of adapter {self.name!r} trains. Load it with PeftModel.from_pretrained(base, folder, "
                f"is_trainable=True), or call model.set_adapter({self.name!r}), then make the optimizer"
            )

    def write_config(self, transaction: Transaction) -> None:
        """Write what the layers now are into the PEFT config, so that what is saved can be loaded anywhere."""
        sites = [s for s in self.sites.values() if not s.inner]
        present = {s.name: s for s in sites if s.has_factors}
        absent = [s.name for s in sites if not s.has_factors]
        fields = rank_config({n: s.capacity for n, s in present.items()}, {n: s.alpha for n, s in present.items()})
        for field, value in fields._asdict().items():
            transaction.attr(self.config, field, value)
        current = self.config.exclude_modules
        excluded = exclude_modules(current, [*present], absent)
        if excluded != current and not (isinstance(current, set) and excluded == sorted(current)):
            transaction.attr(self.config, "exclude_modules", excluded)
        if (init := loadable_init(self.config.init_lora_weights)) != self.config.init_lora_weights:
            transaction.attr(self.config, "init_lora_weights", init)

    def config_problem(self) -> str | None:
        """Return where the PEFT config differs from the layers, or None."""
        config = self.config
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        for name, site in self.sites.items():
            if site.has_factors and not site.inner:
                key = anchored(name)
                said = (ranks.get(key, config.r), alphas.get(key, config.lora_alpha))
                if said != (site.capacity, site.alpha):
                    return f"{name}: config says (r, alpha) = {said} and the layer {(site.capacity, site.alpha)}"
        return None

    def _tie(self, root: nn.Module) -> None:
        names: dict[int, int] = {}  # layer -> under how many names it is reached
        for _, module in root.named_modules(remove_duplicate=False):
            if isinstance(module, LoraLayer):
                names[id(module)] = names.get(id(module), 0) + 1
        by_weight: dict[int, list[Site]] = {}
        for site in self.sites.values():
            weight = getattr(site.layer.get_base_layer(), "weight", None)
            if names[id(site.layer)] > 1:
                site.min_rank = 1
            if weight is not None and site.kind not in ("experts", "attention") and not self.config.layer_replication:
                by_weight.setdefault(id(weight), []).append(site)
            if site.kind == "attention":
                site.tie = site.name.removesuffix(".out_proj") if site.inner else site.name
        for sites in by_weight.values():
            if len(sites) > 1:
                for site in sites:
                    site.tie, site.min_rank = sites[0].name, 1


def reshape(adapter: Adapter, target: Mapping[str, int] | Layout, transaction: Transaction | None = None) -> Layout:
    """Give live modules the ranks of `target` (from a `Layout` also the scalings), so that weights can be loaded.

    Modules whose rank differs get fresh factors (A as PEFT draws it, B zero) and lose what they held; an optimizer
    made before still holds the old ones. Modules that `target` does not name stay. With a `transaction` it is undone,
    too, should that one be.

    Raises:
        AdapterError: `target` names a module that the adapter does not have, or a rank it cannot have; or the adapter
            is tied to its ranks by how it was started.
    """
    for name, want in target.items():
        rank = want.rank if isinstance(want, Slot) else want
        if name not in adapter.sites:
            raise AdapterError(f"{name}: not a module of adapter {adapter.name!r}")
        if rank < adapter.sites[name].min_rank:
            raise AdapterError(f"{name}: cannot have rank {rank}; its least is {adapter.sites[name].min_rank}")
    ranks = {n: want.rank if isinstance(want, Slot) else want for n, want in target.items()}
    if not any({**adapter.layout().ranks, **ranks}.values()):
        raise AdapterError("no module would stay in the adapter; PEFT cannot load an adapter without one")
    if any(rank != adapter.sites[name].rank for name, rank in ranks.items()):
        adapter.refuse_resizing()
    with Transaction(transaction) as transaction:
        for name, want in target.items():
            site, rank = adapter.sites[name], ranks[name]
            scaling = want.scaling if isinstance(want, Slot) else None
            if rank == 0:
                if site.present:
                    site_edits.leave(site, transaction)
                continue
            if not site.present:
                site_edits.rejoin(site, transaction, site_edits.build(site, adapter.config, rank))
            slot = site.slot()
            if rank != slot.rank or scaling not in (None, slot.scaling):
                a, b = (site.A, site.B) if rank == slot.rank else _fresh(site, slot, rank)
                site_edits.put(site, transaction, a, b, scaling)
        adapter.write_config(transaction)
    return adapter.layout()


def _fresh(site: Site, slot: Slot, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    lead = (slot.experts,) if slot.experts > 1 else ()
    bound = 1.0 / math.sqrt(slot.in_features)
    a = torch.empty(*lead, rank, slot.in_features).uniform_(-bound, bound, generator=keyed_generator(site.name, rank))
    b = torch.zeros(*lead, slot.out_features, rank)
    return (
        nn.Parameter(site.raw_a(a).to(site.A).contiguous(), site.A.requires_grad),
        nn.Parameter(site.raw_b(b).to(site.B).contiguous(), site.B.requires_grad),
    )
