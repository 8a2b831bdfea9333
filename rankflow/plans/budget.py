"""Turn scores, limits and a budget into ranks. The same input gives the same ranks on every machine.

Modules that are tied move as one; everything else is a question of what one more direction is worth and costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Unit, units

BudgetKind = Literal["mean_rank", "total_rank", "max_params", "size", "fraction"]
_UNHEARD_OF = 1e30  # an amount


@dataclass(frozen=True)
class Budget:
    """How much adapter there may be. `resolve` turns shares into whole units of rank or of parameters.

    mean_rank: total rank / modules matched at attach (those at rank 0 count), rounded down to a whole total.
    total_rank: sum of ranks. max_params: LoRA parameters. size: bytes of LoRA factors.
    fraction: share (0, 1] of the LoRA parameters at attach.

    Raises:
        ConfigError: an unknown kind, or an amount that is not positive, not whole where it must be, or a share over 1.
    """

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise ConfigError(f"unknown budget {self.kind!r}; known: {', '.join(get_args(BudgetKind))}")
        if not 0 < self.amount < _UNHEARD_OF:
            raise ConfigError(
                f"budget {self.kind}: {str(self.amount)[:80]} is not a positive number, or beyond all use"
            )
        if self.kind in ("total_rank", "max_params", "size"):
            if self.amount != int(self.amount):
                raise ConfigError(f"budget {self.kind}: {self.amount} is not a whole number")
            object.__setattr__(self, "amount", int(self.amount))
        if self.kind == "fraction" and self.amount > 1:
            raise ConfigError(f"budget fraction: {self.amount} is over 1, which is all parameters there are at attach")

    def __str__(self) -> str:
        return self.unit(self.amount)

    def unit(self, amount: float) -> str:
        """Return `amount` with the unit that this budget counts in, in words."""
        match self.kind:
            case "mean_rank" | "fraction":
                return f"{self.kind} {amount:g}"
            case "total_rank":
                return f"total rank {amount:,}"
        return f"{amount:,} {'bytes' if self.kind == 'size' else 'parameters'}"

    def resolve(self, layout: Layout) -> Budget:
        """The same budget as `total_rank`, `max_params` or `size` with a whole amount.

        Raises:
            ConfigError: a share so small that nothing is left of it.
        """
        share = Fraction(str(self.amount))  # 0.29 of 100 is 29, which floats would round down to 28
        if self.kind == "mean_rank":
            kind, amount = "total_rank", math.floor(share * len(layout))
        elif self.kind == "fraction":
            kind, amount = "max_params", math.floor(share * layout.params)
        else:
            return self
        if amount < 1:
            raise ConfigError(f"budget {self} of {len(layout)} modules leaves no rank at all")
        return Budget(kind, amount)

    def cost(self, slot: Slot) -> int:
        """Return what one rank of `slot` costs in the unit that this budget counts in: ranks, parameters or bytes."""
        if self.kind in ("mean_rank", "total_rank"):
            return 1
        return slot.params_per_rank * (slot.itemsize if self.kind == "size" else 1)

    def price(self, unit: Unit) -> int:
        """Return the `cost` of all modules of a unit together."""
        return sum(self.cost(slot) for slot in unit.slots)

    def spent(self, layout: Layout) -> int:
        """What `layout` costs, in the unit of the resolved budget."""
        return sum(slot.rank * self.cost(slot) for slot in layout.values())


def reachable(layout: Layout, budget: Budget) -> tuple[int, int]:
    """The smallest and the largest total that limits allow, in what the resolved budget counts."""
    spans = [(unit.span, budget.price(unit)) for unit in units(layout)]
    return sum(low * cost for (low, _), cost in spans), sum(high * cost for (_, high), cost in spans)


def check_reachable(layout: Layout, budget: Budget, what: str = "") -> None:
    """Raise ConfigError if limits keep every total above or below the (resolved) budget. The message calls it
    `what`."""
    least, most = reachable(layout, budget)
    if not least <= budget.amount <= most:
        raise ConfigError(
            f"{what or f'budget is {budget}'} but limits allow only {budget.unit(least)} to {budget.unit(most)}; "
            "change either"
        )


def check_lowers(policy: str, layout: Layout, budget: Budget) -> None:
    """Raise ConfigError if `policy`, which only lowers ranks, cannot come down to the (resolved) budget."""
    if budget.spent(layout) < budget.amount:
        raise ConfigError(
            f"{policy} only lowers ranks, but the adapter has {budget.unit(budget.spent(layout))} and its budget is "
            f"{budget}; lower the budget, or put a policy that grows before it"
        )
