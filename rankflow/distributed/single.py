"""What other processes that train replicas of the same model have to do with a run; by itself a process has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import nn
from torch.optim import Optimizer

from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.policies.observation import Observation

T = TypeVar("T")


class SingleProcess:
    """One process: what it saw is all there is to see, and nobody has to agree.

    All of them make every call, in the same order; `rankflow.distributed.replicas.Replicas` is the other kind.
    """

    leads = True  # decides, and keeps the ledger on disk

    def start(self, settings: Mapping[str, str]) -> None:
        """All train the same model under the same `settings`, which are in force here, by their names."""

    def come_to(self, about: str) -> None:
        """Say what all calls from here on are about; others are to be at the same, and whoever waits names it."""

    def attempt(self, work: Callable[[], T]) -> T:
        """What `work` gives, if it goes well in every process; else its error, or in the others that one had one."""
        return work()

    def average(self, observed: Observation) -> Observation:
        """What was seen over the batches of all processes."""
        return observed

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make `.grad` of parameters that no wrapper of the model knows the mean over processes, in place."""

    def reduce(self, model: nn.Module, *, unscaled: bool) -> None:
        """Gradients are ready, `unscaled` if a loss scaler has been at them: where no wrapper reduces those of the
        adapter, make them the mean over processes."""

    def gathered(self, optimizer: Optimizer | None, transaction: Transaction) -> AbstractContextManager[None]:
        """In the block this process has the adapter's factors whole, with gradients and their state in `optimizer`, and
        what is written to them stays. Without an optimizer, only gradients may be written to. All of it is undone with
        `transaction`, as it has to be where the block raises."""
        return nullcontext()

    def agree(self, decide: Callable[[], RankPlan], layout: Layout, step: int) -> RankPlan:
        """The plan that one of them decides on, for all."""
        return decide()

    def resized(self, layout: Layout, step: int, *, replaced: bool) -> None:
        """A plan was carried out, and the parameters that train were `replaced` by others, or not: all have to have
        come to this layout."""

    def undone(self) -> None:
        """Parameters, and which of them train, are again those that were there before; nobody else is waited for."""
