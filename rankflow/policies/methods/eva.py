"""EVA: before the first step, ranks go where a module's inputs vary, and A starts out along those directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from rankflow.plans.allocate import even
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.policies._initial import Opening
from rankflow.policies.observation import Observation, Signal, Study


@dataclass(frozen=True, kw_only=True)
class Eva(Opening):
    """EVA (arXiv 2410.07170): a fresh adapter starts along the principal directions of each module's inputs.

    Incremental PCA over some batches gives every module's leading directions and the share of its input variance that
    each explains. The directions of largest share, of all modules together, are the adapter's; no module gets more than
    `rho` times the mean rank (without a budget: its own). A's rows are those directions, of norm 1; B is 0. Linear
    layers only. Run once, before the first step; any other policy may follow.

    When to use: the adapter is fresh, some batches are at hand, and A should start along the directions in which the
    inputs vary.

    Differs: from PEFT's `initialize_lora_eva_weights`,
    - it looks at a fixed number of `batches`, where PEFT goes round the data until directions settle (`tau`);
    - it keeps `components` directions from batch to batch, of which the leading ones are used, and each step's SVD is
      exact; PEFT keeps no more than are used, by a randomised SVD;
    - tokens that `attention_mask` hides are left out, those without a label (`use_label_mask`) are not;
    - budgets may be in parameters, where a share counts per parameter; limits and ties hold; equal shares go to the
      lower direction, then the earlier module;
    - a module at rank 0 leaves the adapter by way of `exclude_modules`; there is no `whiten`;
    - it takes a loss, although only inputs are looked at, as every study does.
    """

    rho: Annotated[
        float,
        Field(ge=1, description="no module gets more than this times the mean rank (without a budget: its own)"),
    ] = 2.0
    init_a: Annotated[
        Literal["inputs", "keep"],
        Field(description="rows of A: principal directions of the inputs, or those there are; B is 0 either way"),
    ] = "inputs"
    batches: Annotated[PositiveInt, Field(description="batches whose inputs are looked at")] = 16
    components: Annotated[
        PositiveInt, Field(description="directions followed in each module; take more than the largest rank")
    ] = 64

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.INPUTS, Signal.INPUT_ENERGY})
    source: ClassVar[str] = "EVA, arXiv 2410.07170"

    @property
    def studies(self) -> tuple[Study, ...]:
        return (Study("inputs", self.needs, self.batches, components=self.components),)

    @property
    def beyond_ranks(self) -> bool:
        return self.init_a == "inputs"

    def gains(self, obs: Observation, layout: Layout, budget: Budget) -> Mapping[str, Sequence[float]]:
        found = {name: _explained(record) for name, record in obs.items() if Signal.INPUTS in record}
        return {name: [*found.get(name, ()), *[0.0] * most][:most] for name, most in self._most(layout, budget).items()}

    def directions(self, record: Mapping[Signal, Tensor]) -> Tensor | None:
        return record[Signal.INPUTS] if self.init_a == "inputs" and Signal.INPUTS in record else None

    def norms(self, record: Mapping[Signal, Tensor], rank: int) -> Tensor:
        return torch.ones(rank)

    def _most(self, layout: Layout, budget: Budget) -> dict[str, int]:
        if self.budget is None:
            return {name: round(self.rho * slot.rank) for name, slot in layout.items()}
        mean = budget.amount / sum(budget.cost(slot) for slot in layout.values())
        # Where limits hold some modules down the others must go beyond, or the budget would not be spent
        return {name: max(rank, round(self.rho * mean), 1) for name, rank in even(layout, budget).items()}


def _explained(record: Mapping[Signal, Tensor]) -> list[float]:
    """The share of the variance that each direction explains, descending; 0 where there is none."""
    variance = record[Signal.INPUTS].square().sum(-1)
    return torch.where(record[Signal.INPUT_ENERGY] > 0, variance / record[Signal.INPUT_ENERGY], 0.0).tolist()
