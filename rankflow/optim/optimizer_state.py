"""The optimizer's side of a resize: whose state goes to which parameter, in which group and at which place."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.errors import OptimizerError
from rankflow.linalg.decompose import Factor
from rankflow.lora.adapter import Adapter
from rankflow.lora.site import Site
from rankflow.lora.transaction import Transaction
from rankflow.optim.handlers import find_handler
from rankflow.optim.introspection import innermost, is_scalar, unknown_state
from rankflow.optim.moments import Level, Moments
from rankflow.optim.param_groups import ParamGroups, Token

OnUnknownState = Literal["error", "reset"]


@dataclass
class Swap:
    """What becomes of one site's parameters, by role: A, B, bias, magnitude. A role only in `old` leaves the optimizer,
    one only in `new` comes back to it. `state` is the new parameters' optimizer state, empty where it starts afresh."""

    site: Site
    old: Mapping[str, nn.Parameter]
    new: Mapping[str, nn.Parameter]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)


class OptimizerState:
    """One optimizer that holds an adapter. All reading is free of side effects; `write` goes through a transaction.

    Raises:
        OptimizerError: the optimizer keeps references that a resize would leave behind, or was not made by torch's
            class.
    """

    def __init__(self, optimizer: Optimizer, adapter: Adapter, on_unknown_state: OnUnknownState = "error"):
        self.optimizer = innermost(optimizer)
        self.handler = find_handler(self.optimizer)
        self.groups = ParamGroups(self.optimizer, adapter)
        self._adapter = adapter
        self._on_unknown_state = on_unknown_state

    @property
    def title(self) -> str:
        return type(self.optimizer).__name__

    # -- checks -----------------------------------------------------------------------------------------------------

    def check(self, touched: Iterable[str], trained: Mapping[str, Collection[str]]) -> set[str]:
        """Return the modules among `touched` whose state has to be given up.

        Raises:
            OptimizerError: a trainable parameter, or one of the roles in `trained`, is not in exactly one group; state
                nobody knows how to resize (with `on_unknown_state="reset"`, that module is returned instead); state
                whose shape is not its parameter's.
        """
        held = self.groups.counts()
        touched = set(touched)
        lost: set[str] = set()
        for name, site in self._adapter.sites.items():
            for role, p in site.tensors().items():
                times = held.get(id(p), 0)
                if times > 1:
                    raise OptimizerError(
                        f"{name}: {self.title} holds its {role} {times} times; it must be in one group"
                    )
                if times == 0 and (p.requires_grad or role in trained.get(name, ())):
                    raise OptimizerError(
                        f"{name}: {self.title} does not hold its {role} {list(p.shape)}. Make the optimizer after the "
                        "adapter (and after restoring one), from all its trainable parameters"
                    )
                if self.handler is not None and times and (why := self.handler.refusal(p)) is not None:
                    raise OptimizerError(f"{name}: {self.title} cannot follow a resize of its {role}: {why}")
                if name in touched and role in ("A", "B") and self._unknown(name, role, p):
                    lost.add(name)
        return lost

    def _unknown(self, name: str, role: str, p: nn.Parameter) -> bool:
        shapes = self.handler.shapes(p.shape) if self.handler is not None else {}
        for key, value in self.optimizer.state.get(p, {}).items():
            if key in shapes and isinstance(value, Tensor):
                if tuple(value.shape) != shapes[key]:
                    raise OptimizerError(
                        f"{name}: {self.title} keeps {key} {list(value.shape)} for {role} {list(p.shape)}; that state "
                        "is another layout's. Restore the adapter's ranks before loading the optimizer's state"
                    )
            elif not is_scalar(value):
                if self._on_unknown_state == "reset":
                    return True
                raise OptimizerError(f"{name}: {self.title} keeps {key!r} for {role}, {_NOT_RESIZED}")
        return False

    def check_carried(self) -> None:
        """
        Raises:
            OptimizerError: what the optimizer keeps for the adapter, now or from its first step on, would not follow a
                resize (`on_unknown_state="reset"` lets it start afresh), or it keeps parameters elsewhere.
        """
        self.check(self._adapter.sites, {})
        held = self.groups.counts()
        for p in self._adapter.parameters():
            if id(p) in held:
                key = unknown_state(self.optimizer, self.handler, p)
                if key is not None and self._on_unknown_state == "error":
                    raise OptimizerError(f"{self.title} keeps {key}, {_NOT_RESIZED}")
                return

    def verify(self, swaps: Iterable[Swap]) -> str | None:
        """Return what is wrong after `write`, or None. A fused optimizer would not notice and would compute
        nonsense."""
        held = self.groups.counts()
        for swap in swaps:
            gone = {id(p) for role, p in swap.old.items() if p is not swap.new.get(role)}
            for role, p in swap.old.items():
                if id(p) in gone and (id(p) in held or p in self.optimizer.state):
                    return f"{swap.site.name}: {self.title} still holds the old {role}"
            for role, p in swap.site.tensors().items():
                if held.get(id(p), 0) != 1 and p.requires_grad:
                    return f"{swap.site.name}: {self.title} holds {role} {held.get(id(p), 0)} times"
                shapes = self.handler.shapes(p.shape) if self.handler is not None else {}
                for key, value in self.optimizer.state.get(p, {}).items():
                    if role in ("A", "B") and not is_scalar(value) and tuple(value.shape) != shapes.get(key):
                        return f"{swap.site.name}: {key} is {list(value.shape)} for {role} {list(p.shape)}"
        return None

    # -- state ------------------------------------------------------------------------------------------------------

    def moments(self, site: Site, role: Factor) -> Moments | None:
        """Return the state of a factor. For a module that left it has no directions, and it is there if a like module
        has any."""
        if self.handler is None:
            return None
        owner = self._owner(site, role)
        found = None if owner is None else self._load(owner, role)
        return found if owner is site or found is None else found.keep(())

    def level(self, site: Site, role: Factor) -> Level | None:
        """Return the typical second moments of other modules of this shape."""
        found = [(like, m) for like in self._like(site) if (m := self._load(like, role)) is not None]
        seconds = [float(m.second.mean(dtype=torch.float64)) for _, m in found if m.second is not None]
        if not seconds:
            return None
        partners = [like.b().detach() if role == "A" else like.a().detach() for like, _ in found]
        sizes = [float(t.double().square().sum(-2 if role == "A" else -1).mean()) for t in partners]
        return Level(statistics.median(seconds), statistics.median(sizes))

    def stored(self, site: Site, role: Factor, moments: Moments, capacity: int | None = None) -> dict[str, Any]:
        """`moments` in the optimizer's own form, as the state of what takes the place of a factor of `site`, of this
        `capacity` (`Site.raw_a`)."""
        owner = self._owner(site, role)
        assert owner is not None
        assert self.handler is not None
        old = owner.A if role == "A" else owner.B
        state = dict(self.optimizer.state[old])
        if owner is not site:  # a step count of one's own: optimizers add to it in place
            state = {k: v.clone() if isinstance(v, Tensor) and is_scalar(v) else v for k, v in state.items()}
        raw = partial(site.raw_a if role == "A" else site.raw_b, capacity=capacity)
        return self.handler.store(moments.to(old.device), state, self.groups.of(old), raw)

    def fill(self, transaction: Transaction, swap: Swap) -> None:
        """Return the state of factors that stay the same parameters and hold other directions; fresh if there is
        none."""
        for role in ("A", "B"):
            p = swap.old[role]
            new = swap.state.get(role) or self.fresh(p, swap.site)
            if p in self.optimizer.state:
                transaction.contents(self.optimizer.state[p], new)
            elif new:
                transaction.contents(self.optimizer.state, {**self.optimizer.state, p: new})  # type: ignore[arg-type, dict-item]

    def rescale(self, transaction: Transaction, site: Site, value: Tensor) -> None:
        """Let the state of A follow A' = diag(value) A, in place. State that no handler knows starts afresh."""
        p = site.A
        if not self.optimizer.state.get(p):
            return
        moments = self.moments(site, "A")
        new = self.stored(site, "A", moments.over(value)) if moments is not None else self.fresh(p, site)
        transaction.contents(self.optimizer.state[p], new)

    def fresh(self, p: nn.Parameter, near: Site) -> dict[str, Any]:
        """Return the state of a parameter that starts afresh, if the optimizer does not make it by itself."""
        params = [id(q) for q in near.tensors().values()]
        groups = [g for g in self.optimizer.param_groups if any(id(q) in params for q in g["params"])]
        if self.handler is None or (params and not groups):  # not known, or not held: a frozen module
            return {}
        return self.handler.fresh(p, (groups or self.optimizer.param_groups)[0], self.optimizer)

    def _owner(self, site: Site, role: Factor) -> Site | None:
        """Return the site whose state a factor of `site` goes on from, or None."""
        if site.present:
            return site
        loaded = ((like, self._load(like, role)) for like in self._like(site))
        return next((like for like, m in loaded if m is not None and m.second is not None), None)

    def _load(self, site: Site, role: Factor) -> Moments | None:
        p, canonical = (site.A, site.a) if role == "A" else (site.B, site.b)
        state = self.optimizer.state.get(p)
        if not state or self.handler is None:
            return None
        return self.handler.load(role, state, self.groups.of(p), canonical)

    def _like(self, site: Site) -> list[Site]:
        mine = site.slot()
        shape = (mine.kind, mine.experts, mine.in_features, mine.out_features)
        others = [(o, o.slot()) for o in self._adapter.sites.values() if o.present and o is not site]
        return [o for o, s in others if (s.kind, s.experts, s.in_features, s.out_features) == shape]

    def write(self, transaction: Transaction, swaps: Sequence[Swap]) -> None:
        """Put new parameters in the places of old ones, with their state. The modules hold them already."""
        replaced: dict[int, nn.Parameter | None] = {}
        back: list[tuple[Token, nn.Parameter]] = []
        state: dict[int, dict[str, Any]] = {}
        for swap in swaps:
            for role, p in swap.old.items():
                if (new := swap.new.get(role)) is not p:
                    replaced[id(p)] = new
            for role, p in swap.new.items():
                if role in swap.state:
                    state[id(p)] = swap.state[role]
                if role not in swap.old:
                    back.append(((swap.site.name, role), p))

        self.groups.write(transaction, replaced, back)
        new_state: dict[Tensor, Any] = {}
        for p, entries in self.optimizer.state.items():
            if id(p) not in replaced:
                new_state[p] = entries
            elif (new := replaced[id(p)]) is not None and state.get(id(new)):
                new_state[new] = state.pop(id(new))
        for p in (p for swap in swaps for p in swap.new.values()):
            if p not in new_state and state.get(id(p)):
                new_state[p] = state[id(p)]
        transaction.contents(self.optimizer.state, new_state)  # type: ignore[arg-type]


_NOT_RESIZED = (
    'which rankflow does not know how to resize. Use on_unknown_state="reset" to start the state of resized modules '
    "afresh, or an optimizer of torch.optim"
)
