"""Averages of weights (EMA, SWA) that go through the resizes of the model they are taken of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from rankflow.gating.parametrize import as_used, ungate
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Grow, Keep, Op, Open, Share, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import first, ops_to
from rankflow.surgery.holders import ours
from rankflow.surgery.listeners import Listeners
from rankflow.surgery.staging import Staged
from rankflow.surgery.surgeon import Surgeon


class _Managed(Protocol):
    """A `Controller`, or a `RankFlowCallback`."""

    @property
    def listeners(self) -> Listeners: ...

    @property
    def adapter_name(self) -> str: ...


def averaged_model(model: nn.Module, flow: _Managed, **options: Any) -> AveragedModel:
    """torch's AveragedModel of a model whose ranks `flow` manages; it has the model's ranks at all times.

    A resize takes A and B of the average through the same algebra as the factors: kept directions stay, A' = N A and
    B' = B M where they are put together anew, and new ones start as they start in the model. Modules leave and return.
    Whatever is not resized is what a plain AveragedModel would have. Factors under a gate are averaged as forwards use
    them, so that the average is a plain LoRA at all times.

        averaged = rankflow.averaged_model(model, flow, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        ...
        flow.after_step()
        averaged.update_parameters(model)

    Save `averaged.state_dict()` with the other states. To go on from it, make the averaged model anew once model and
    `flow` hold the checkpoint, and load it.

    Args:
        model: what `flow` was attached to, or what the Trainer is given.
        flow: from `rankflow.attach`, or a `RankFlowCallback`, also before train(). Under the Trainer, call
            `update_parameters` from a callback of your own, in `on_step_end`. The best model that the Trainer loads at
            the end is not averaged: the average stays that of the run.
        options: `device`, `avg_fn`, `multi_avg_fn` and `use_buffers` of torch's AveragedModel.

    Raises:
        AdapterError: there is no such adapter, or it cannot be resized.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with _without_our_hooks(inner):
        averaged = _Averaged(inner, **options)
    ungate(averaged.module)
    flow.listeners.add_follower(_Following(averaged, flow.adapter_name))
    return averaged


class _Averaged(AveragedModel):
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_AsUsed(model))  # type: ignore[arg-type]


class _AsUsed:
    """The parts of a model that an AveragedModel reads, with factors as their gates make them."""

    def __init__(self, model: nn.Module):
        self._model = model

    def parameters(self) -> Iterator[Tensor]:
        return as_used(self._model)

    def buffers(self) -> Iterator[Tensor]:
        return self._model.buffers()


class _Following:
    """Does to the average what is done to the model, with a surgeon of its own."""

    def __init__(self, averaged: AveragedModel, adapter_name: str):
        self._averaged = averaged
        self._surgeon = Surgeon(Adapter(averaged.module, adapter_name))

    def follow(self, plan: RankPlan, step: int, staged: Sequence[Staged], transaction: Transaction) -> None:
        layout, added = self._surgeon.layout, {s.swap.site.name: s.added for s in staged}
        ops = {name: tuple(_without_gates(ops, layout[name].rank)) for name, ops in plan.ops.items()}
        resizing = RankPlan({name: of for name, of in ops.items() if of}, plan.reason)
        self._surgeon.apply(resizing, step, transaction, added)

    def set_capacity(self, capacities: Mapping[str, int], transaction: Transaction) -> None:
        self._surgeon.set_capacity(capacities, transaction)

    def set_masked_ranks(self, ranks: Mapping[str, int], transaction: Transaction) -> None:
        self._surgeon.set_masked_ranks(ranks, transaction)

    def start(self, adapter: Adapter) -> None:
        """Start the average anew where the model has got other ranks, as from a checkpoint that was loaded."""
        layout = self._surgeon.layout
        ranks = {name: site.capacity for name, site in adapter.sites.items()}
        if ranks == {name: site.capacity for name, site in self._surgeon.adapter.sites.items()}:
            return
        if self._averaged.n_averaged > 0:
            warnings.warn("the model has other ranks than its average by now, which starts anew", stacklevel=2)
        ops = {name: ops_to(rank, layout[name].rank, first(range(layout[name].rank))) for name, rank in ranks.items()}
        self._surgeon.apply(RankPlan(ops, "start"))
        self._averaged.n_averaged.zero_()
        for name, site in self._surgeon.adapter.sites.items():
            for role, p in site.tensors().items():
                p.data.copy_(adapter.sites[name].tensors()[role].detach())


def _without_gates(ops: Sequence[Op], rank: int) -> Iterator[Op]:
    """The ops that do to plain factors of that rank what `ops` do to gated ones: directions that are opened become new
    ones in the places of old ones."""
    for op in ops:
        if isinstance(op, Open):
            yield Grow(len(op.idx))
            yield Keep(tuple(rank + op.idx.index(i) if i in op.idx else i for i in range(rank)))
        elif not isinstance(op, Train | Share):
            yield op
        rank = op.rank_after(rank)


@contextmanager
def _without_our_hooks(model: nn.Module) -> Iterator[None]:
    """Take our hooks off the model for the block, so that a copy made in it has none."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if any(map(ours, hooks.values())):
                    taken.append((hooks, dict(hooks)))
                    for key in [key for key, hook in hooks.items() if ours(hook)]:
                        del hooks[key]
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)
