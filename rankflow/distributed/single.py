"""What a run asks of the other processes that train the same model, and the answers where there are none."""

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
    """A run in one process, which averages over nobody else and decides by itself.

    All of them make every call, in the same order; `rankflow.distributed.replicas.Replicas` is the other kind.
    """

    leads = True  # decides, and keeps the ledger on disk

    def start(self, settings: Mapping[str, str]) -> None:
        """Check that all processes begin with the same `settings` (name -> value)."""

    def come_to(self, about: str) -> None:
        """Name what the calls from here on are about; other processes have to name the same, and errors quote it."""

    def attempt(self, work: Callable[[], T]) -> T:
        """Return what `work` returns if it succeeds in every process; else raise its error, or that another process
        failed."""
        return work()

    def average(self, observed: Observation) -> Observation:
        """Average what was seen over the batches of all processes."""
        return observed

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace `.grad` by its mean over processes, for parameters that no wrapper of the model knows."""

    def reduce(self, model: nn.Module, *, unscaled: bool) -> None:
        """Replace gradients of the adapter by their mean over processes where no wrapper does so. They are ready, and
        `unscaled` if a loss scaler has been at them."""

    def gathered(self, optimizer: Optimizer | None, transaction: Transaction) -> AbstractContextManager[None]:
        """Make the adapter's factors whole in the block, with gradients and their state in `optimizer`; what is written
        to them stays. Without an optimizer, only gradients may be written to. All of it is undone with `transaction`,
        as it has to be where the block raises."""
        return nullcontext()

    def agree(self, decide: Callable[[], RankPlan], layout: Layout, step: int) -> RankPlan:
        """Return the plan that one process decides on, in all of them."""
        return decide()

    def resized(self, layout: Layout, step: int, *, replaced: bool) -> None:
        """Check, after a plan was carried out, that all processes have come to this layout. `replaced` says whether
        other parameters train now."""

    def undone(self) -> None:
        """Take note that the parameters, and which of them train, are those of before again. Waits for nobody."""
