"""New factors of modules and their optimizer state, computed before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rankflow.errors import AdapterError, PlanError
from rankflow.linalg.decompose import Factor, refactor
from rankflow.linalg.growth import new_rows, rows_from_sketch
from rankflow.lora import site_edits
from rankflow.lora.site import Site
from rankflow.lora.site_edits import Entries
from rankflow.optim.moments import Moments, Partner, SeedV
from rankflow.optim.optimizer_state import OptimizerState, Swap
from rankflow.plans.ops import Drop, Grow, Keep, Op, Open, Refactor, Share, Train

ROLES: tuple[Factor, Factor] = ("A", "B")
Added = tuple[Tensor, Tensor]  # rows of A ``[*experts, n, in]``, gates' values in them, and columns of B


@dataclass
class Staged:
    """One module's part of a plan, ready to be written."""

    swap: Swap
    entries: Entries | None = None  # for a module that comes back
    train: bool | None = None
    fill: Mapping[str, Tensor] | None = None  # what factors of enough capacity are to hold, in stored shape
    added: Sequence[Added] = ()  # directions that are new, in the order in which they came

    @property
    def resized(self) -> bool:
        return self.swap.new is not self.swap.old


@dataclass(frozen=True)
class Stage:
    """Computes what a plan makes of modules. Nothing here writes to a model or an optimizer.

    Args:
        config: of the adapter, from which a module that comes back is built.
        optimizer_state: the optimizer; None without one.
        seed_v: see `Moments.grow`.
        device: where to compute; None for the adapter's own.
    """

    config: LoraConfig
    optimizer_state: OptimizerState | None
    seed_v: SeedV
    device: torch.device | str | None = None

    def module(
        self,
        site: Site,
        ops: Sequence[Op],
        generator: torch.Generator,
        *,
        carry: bool,
        gate: Tensor | None = None,
        added: Iterator[Added] | None = None,
    ) -> Staged:
        """Apply `ops` to copies, in order. Without `carry`, optimizer state starts afresh.

        `gate` ``[r]`` is what directions are multiplied by; 1 where it is left out. Directions that are new start as
        those that another model got by the same ops, where `added` gives them (`Staged.added`).

        Each op's result is rounded to the parameter's dtype, so whatever later ops keep stays bit for bit.
        """
        old = site.tensors()
        train = next((op.on for op in reversed(ops) if isinstance(op, Train)), None)
        resizing = [op for op in ops if not isinstance(op, Train | Share)]
        if not resizing:
            return Staged(Swap(site, old, old), train=train)
        entries = None
        if not site.has_factors:
            entries = site_edits.build(site, self.config, rank=sum(op.n for op in resizing if isinstance(op, Grow)))
        like = old if entries is None else entries.tensors
        factors = self._factors(site, like, carry, gate)
        for op in resizing:
            match op:
                case Keep():
                    factors.keep(op.idx)
                case Refactor():
                    factors.refactor(site.name, op.N, op.M)
                case Grow():
                    self._append(site, factors, *(next(added) if added else self._grown(site, factors, op, generator)))
                case Open():
                    rest, back = op.apart(factors.A.shape[-2])
                    rows, columns = factors.opened(op.idx, op.to)
                    factors.keep(rest)
                    self._append(site, factors, rows, columns, op.to if gate is not None else 1.0)
                    factors.keep(back)
                case Drop():
                    factors.keep(())
        if site.masked:
            fill = {"A": site.raw_a(factors.A), "B": site.raw_b(factors.B)}
            states = self._states(site, factors, old, old) if factors.A.shape[-2] else {}
            return Staged(Swap(site, old, old, states), train=train, fill=fill, added=factors.added)
        if factors.A.shape[-2] == 0:
            return Staged(Swap(site, old, {}), train=train)
        new = {
            **like,
            "A": _parameter(site.raw_a(factors.A), like["A"]),
            "B": _parameter(site.raw_b(factors.B), like["B"]),
        }
        return Staged(Swap(site, old, new, self._states(site, factors, old, new)), entries, train, added=factors.added)

    def at_capacity(self, site: Site, capacity: int) -> Staged:
        """Stage the module with factors of this capacity, no less than its rank, and all else as it is; at 0 it
        leaves."""
        old = site.tensors()
        if capacity == 0:
            return Staged(Swap(site, old, {}))
        entries = None if site.has_factors else site_edits.build(site, self.config, rank=capacity)
        like = old if entries is None else entries.tensors
        factors = self._factors(site, like, True, None)
        new = {
            **like,
            "A": _parameter(site.raw_a(factors.A, capacity), like["A"]),
            "B": _parameter(site.raw_b(factors.B, capacity), like["B"]),
        }
        states = self._states(site, factors, old, new, capacity) if site.present else {}
        return Staged(Swap(site, old, new, states), entries)

    def _factors(self, site: Site, like: Mapping[str, nn.Parameter], carry: bool, gate: Tensor | None) -> _Factors:
        a, b = site.a(like["A"].detach()), site.b(like["B"].detach())
        if not site.present:
            a, b = a[..., :0, :], b[..., :0]
        moments: dict[Factor, Moments] = {}
        if carry and self.optimizer_state is not None:
            found: dict[Factor, Moments | None] = {role: self.optimizer_state.moments(site, role) for role in ROLES}
            moments = {role: m for role, m in found.items() if m is not None}
        if self.device is not None:
            a, b = a.to(self.device), b.to(self.device)
            moments = {role: m.to(self.device) for role, m in moments.items()}
        ones = torch.ones(a.shape[-2], device=a.device)
        return _Factors(a, b, ones if gate is None else gate.to(a.device), moments)

    def _grown(self, site: Site, factors: _Factors, op: Grow, generator: torch.Generator) -> Added:
        a, b = factors.A, factors.B
        rows = new_rows(0, a, generator, kind=site.kind)
        if op.init == "grad" and op.sketch is not None:
            rows = rows_from_sketch(op.n, a, op.sketch.to(a.device), kind=site.kind)
        if (short := op.n - rows.shape[-2]) > 0:
            rows = torch.cat([rows, new_rows(short, a, generator, kind=site.kind)], -2)
        return rows, b.new_zeros(*b.shape[:-1], op.n)

    def _append(self, site: Site, factors: _Factors, rows: Tensor, columns: Tensor, gate: float = 1.0) -> None:
        """Add directions that are new to the optimizer, under a gate: rows of A ``[*e, n, in]``, columns of B
        ``[*e, out, n]``."""
        new_a, old_a = (t.double().square().sum(-1) for t in (rows, factors.A))
        new_b, old_b = (t.double().square().sum(-2) for t in (columns, factors.B))
        partners: dict[Factor, Partner] = {
            "A": Partner(new_b, old_b.mean(-1)),
            "B": Partner(new_a, old_a.mean(-1)),
        }
        factors.added.append((rows * gate, columns))
        new: dict[Factor, Tensor] = {"A": rows, "B": columns}
        factors.A, factors.B = torch.cat([factors.A, rows], -2), torch.cat([factors.B, columns], -1)
        factors.gate = torch.cat([factors.gate, factors.gate.new_full((rows.shape[-2],), gate)])
        for role, m in factors.moments.items():
            level = (
                partial(self.optimizer_state.level, site, role) if self.optimizer_state is not None else lambda: None
            )
            factors.moments[role] = m.grow(new[role], self.seed_v, partners[role], level, gate)

    def _states(
        self,
        site: Site,
        factors: _Factors,
        old: Mapping[str, nn.Parameter],
        new: Mapping[str, nn.Parameter],
        capacity: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        if self.optimizer_state is None:
            return {}
        states = {role: self.optimizer_state.stored(site, role, m, capacity) for role, m in factors.moments.items()}
        fresh = {
            r: self.optimizer_state.fresh(p, site) for r, p in new.items() if r not in states and p is not old.get(r)
        }
        return {**states, **fresh}


@dataclass
class _Factors:
    """Both factors of one module on their way through the ops, canonical, with what the optimizer keeps of them."""

    A: Tensor  # [*experts, r, in]
    B: Tensor  # [*experts, out, r]
    gate: Tensor  # [r], float32
    moments: dict[Factor, Moments]
    added: list[Added] = field(default_factory=list)

    def keep(self, idx: Sequence[int]) -> None:
        at = torch.tensor(idx, dtype=torch.long, device=self.A.device)
        self.A, self.B, self.gate = self.A.index_select(-2, at), self.B.index_select(-1, at), self.gate[at]
        self.moments = {role: m.keep(idx) for role, m in self.moments.items()}

    def opened(self, idx: Sequence[int], to: float) -> tuple[Tensor, Tensor]:
        """Return the rows of A and the columns of B of some directions, those of B for gates of `to`."""
        at = torch.tensor(idx, dtype=torch.long, device=self.A.device)
        scale = self.gate[at].double() / self.gate.new_tensor(to).double()  # as forwards see it, in float32
        return self.A.index_select(-2, at), (self.B.index_select(-1, at) * scale).to(self.B.dtype)

    def refactor(self, name: str, N: Tensor, M: Tensor) -> None:
        if N.shape[:-2] not in ((), self.A.shape[:-2]):
            raise PlanError(f"{name}: plan refactors with N {list(N.shape)} but A is {list(self.A.shape)}")
        self.A, self.B = refactor(self.A, self.B, N, M)
        if N.shape[-2] != N.shape[-1]:  # without a gate: under one, directions stay apart (see `Gates.check`)
            self.gate = self.gate.new_ones(N.shape[-2])
        self.moments = {role: m.refactor(N, M) for role, m in self.moments.items()}


def _parameter(raw: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(raw.to(like.device).contiguous(), like.requires_grad)


def check_finite(staged: Sequence[Staged]) -> None:
    named = [
        (f"{s.swap.site.name}: {what}", t)
        for s in staged
        if s.resized or s.fill is not None
        for role, p in (s.swap.new if s.fill is None else s.fill).items()
        for what, t in ((role, p.detach()), *((f"{k} of {role}", v) for k, v in s.swap.state.get(role, {}).items()))
        if isinstance(t, Tensor)
    ]
    if not named:
        return
    finite = torch.stack([t.isfinite().all().to(named[0][1].device) for _, t in named]).tolist()
    if not all(finite):
        bad = named[finite.index(False)][0]
        raise AdapterError(f"{bad} would not be finite; it was NaN or infinite before, or the plan's matrices overflow")
