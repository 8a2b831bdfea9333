"""The places of an adapter's parameters in an optimizer's groups, kept through changes of rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankflow.errors import OptimizerError
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction

Token = tuple[str, str]  # (site, role): a parameter of the adapter, whatever tensor it is at the moment


class ParamGroups:
    """Which group holds which of an adapter's parameters, and where they all were when this was made.

    A module that has left the adapter comes back to its place, whoever left meanwhile.
    """

    def __init__(self, optimizer: Optimizer, adapter: Adapter):
        self._optimizer = optimizer
        self._adapter = adapter
        tokens = self.tokens()
        self._order: list[list[Token | int]] = [
            [tokens.get(id(p), id(p)) for p in group["params"]] for group in optimizer.param_groups
        ]
        self._others = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in tokens]  # keep ids
        self._names = {
            tokens[id(p)]: name
            for group in optimizer.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
            if id(p) in tokens
        }

    def tokens(self) -> dict[int, Token]:
        """The adapter's parameters as they are now, by `id`."""
        return {id(p): (name, role) for name, site in self._adapter.sites.items() for role, p in site.tensors().items()}

    def counts(self) -> dict[int, int]:
        """How many times each parameter is in a group, by `id`."""
        counts: dict[int, int] = {}
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                counts[id(p)] = counts.get(id(p), 0) + 1
        return counts

    def of(self, p: nn.Parameter) -> dict[str, Any]:
        """The param group that holds `p`."""
        return next(g for g in self._optimizer.param_groups if any(p is q for q in g["params"]))

    def write(
        self,
        transaction: Transaction,
        replaced: Mapping[int, nn.Parameter | None],
        back: Sequence[tuple[Token, nn.Parameter]],
    ) -> None:
        """Put new parameters in the places of those with these ids, take those out that have none, and put those `back`
        that come to the adapter again."""
        groups = [_Group(g) for g in self._optimizer.param_groups]
        for group in groups:
            group.swap(replaced)
        tokens = self.tokens()
        for token, p in back:
            if p.requires_grad or any(token in order for order in self._order):
                self._insert(token, p, groups, tokens)
        for group, now in zip(self._optimizer.param_groups, groups, strict=True):
            if [*map(id, group["params"])] != [*map(id, now.params)]:
                transaction.contents(group["params"], now.params)
                if now.names is not None:
                    transaction.contents(group["param_names"], now.names)

    def _home(self, token: Token, groups: list[_Group], tokens: Mapping[int, Token]) -> int | None:
        """Return the group that a returning parameter belongs to: its own, or else that of the nearest one of its
        role."""
        for i, order in enumerate(self._order):
            if token in order:
                return i
        names = list(self._adapter.sites)
        at = names.index(token[0])
        near: list[tuple[int, int]] = []
        for i, group in enumerate(groups):
            for p in group.params:
                other = tokens.get(id(p))
                if other is not None and other[1] == token[1]:
                    near.append((abs(names.index(other[0]) - at), i))
        return min(near)[1] if near else None

    def _insert(self, token: Token, p: nn.Parameter, groups: list[_Group], tokens: Mapping[int, Token]) -> None:
        home = self._home(token, groups, tokens)
        if home is None:
            title = type(self._optimizer).__name__
            raise OptimizerError(f"{token[0]}: no group of {title} holds a {token[1]}, so none can take this one")
        group, order = groups[home], self._order[home] if home < len(self._order) else []
        held = [tokens.get(id(q), id(q)) for q in group.params]
        if token in order:
            at = order.index(token)
            after = next((held.index(t) for t in order[at + 1 :] if t in held), None)
            before = next((held.index(t) for t in reversed(order[:at]) if t in held), len(held) - 1)
            place = before + 1 if after is None else after
        else:
            place = self._guess(p, group.params, tokens)
        group.params.insert(place, p)
        if group.names is not None:
            group.names.insert(place, self._names.get(token) or self._name_of(p))

    def _guess(self, p: nn.Parameter, held: list[nn.Parameter], tokens: Mapping[int, Token]) -> int:
        """Return the place of a parameter that this optimizer never held, by the order of the model and of the
        adapter."""
        rank = {id(q): i for i, q in enumerate(self._adapter.model.parameters())}
        ranks = [rank.get(id(q), -1) for q in held]
        mine = [(i, r) for i, (q, r) in enumerate(zip(held, ranks, strict=True)) if id(q) in tokens]
        first = max((i + 1 for i, r in mine if r < rank[id(p)]), default=0)
        last = min((i for i, r in mine if r > rank[id(p)]), default=len(held))
        return next((i for i in range(first, last) if ranks[i] > rank[id(p)]), last)

    def _name_of(self, p: nn.Parameter) -> str:
        return next(name for name, q in self._adapter.model.named_parameters() if q is p)


class _Group:
    """A param group as it will be."""

    def __init__(self, group: Mapping[str, Any]):
        self.params: list[nn.Parameter] = list(group["params"])
        self.names: list[str] | None = list(group["param_names"]) if "param_names" in group else None

    def swap(self, replaced: Mapping[int, nn.Parameter | None]) -> None:
        kept = [(replaced.get(id(p), p), i) for i, p in enumerate(self.params)]
        if self.names is not None:
            self.names = [self.names[i] for p, i in kept if p is not None]
        self.params = [p for p, _ in kept if p is not None]
