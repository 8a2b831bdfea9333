"""Runs in several processes with replicas of the model: process 0 decides, all do the same, and DistributedDataParallel
goes on with the new parameters.

Signals are reduced as gradients are: a process counts as a micro-batch of its own, of a loss divided by their number.
Plans, with their matrices, come from process 0 and every process carries out those, never its own. What is said goes
over a gloo group beside the one for gradients, so that messages are plain CPU tensors whatever the device.

Under FSDP2 the base model is sharded. The adapter may be left out by `ignored_params`: every process has it whole, and
its gradients are reduced here, in one tensor an optimizer step, however many micro-batches. Or it is in shards as well,
with `mode: mask`: FSDP2 reduces its gradients, and its factors are put together for as long as a decision, the end of
a phase or a penalty takes (`rankflow.distributed.fsdp2`), which all processes have to come to.

Scores that are not linear in the gradient (`delta_score`, `weight_score`) are averages of those of the processes, as
they are of micro-batches. What a study sees of inputs (`eva`) is that of process 0's batches alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rankflow.distributed.comm import Wire, grouped, limit
from rankflow.distributed.ddp import rebuild, refuse, sharded
from rankflow.distributed.fsdp2 import Shards, at_rest
from rankflow.distributed.single import SingleProcess, T
from rankflow.errors import ConfigError, DistributedError, PlanError
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.policies.observation import Observation, Signal

_SUMS = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})  # over tokens; all others are averages over batches
_DRIFT = 1e-6  # relative: replicas get the same gradients and have the same bits, but for how their devices add up

Key = tuple[str, Signal]


def processes_of(model: nn.Module, adapter: Adapter, timeout: float | None = None) -> SingleProcess:
    """The processes that train `model`, which may be wrapped: some that wait for the others for `timeout` seconds
    at most (`rankflow.distributed.comm.limit`), or a single process.

    Raises:
        ConfigError: a wrapper owns the adapter's parameters and would undo a resize.
        DistributedError: the others do not come.
    """
    limit(timeout)
    if not grouped() or (dist.get_world_size() == 1 and not adapter.sharded):
        return SingleProcess()
    refuse(model)
    return Replicas(model, adapter, Wire(timeout), Shards(model, adapter) if adapter.sharded else None)


class Replicas(SingleProcess):
    """One process of several, under DistributedDataParallel or with gradients that are reduced here.

    Raises:
        DistributedError: from every call, in every process: one has failed, is gone, or is at another layout.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, wire: Wire, shards: Shards | None = None):
        self._adapter = adapter
        self._wire = wire
        self.leads = wire.rank == 0
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self._hook: Any = None
        self._loose: list[nn.Parameter] | None = None  # looked for again once parameters were replaced
        self._sharded = sharded(model)
        self._shards = shards
        self._others = False  # whether other parameters train now than when a wrapper may have been made
        self._model = model
        if not self._sharded and self._ddp is None:  # the Trainer keeps the wrapper to itself
            self._hook = adapter.model.register_forward_pre_hook(self._find_wrapper)

    def _find_wrapper(self, *_: object) -> None:
        active = DistributedDataParallel._get_active_ddp_module()
        if active is not None or torch.is_grad_enabled():
            self._ddp = active
            self._hook.remove()
            if self._others:
                self.undone()

    def start(self, settings: Mapping[str, str]) -> None:
        said = self._wire.gather("settings", dict(settings))
        for rank, theirs in enumerate(said):
            differ = [key for key in {**said[0], **theirs} if said[0].get(key) != theirs.get(key)]
            if differ:
                named = [
                    f"{key} is {said[0].get(key, 'not there')} in process 0 and {theirs.get(key, 'not there')} in "
                    f"process {rank}"
                    for key in differ[:4]
                ]
                more = f", and {len(differ) - 4} more" if len(differ) > 4 else ""
                raise DistributedError(f"processes do not start alike: {'; '.join(named)}{more}. Give all the same")
        if self._sharded:
            self._start_alike(self._model)

    def come_to(self, about: str) -> None:
        self._wire.about = about

    def attempt(self, work: Callable[[], T]) -> T:
        try:
            done = work()
        except Exception as e:
            self._wire.gather("whether all went well", f"{type(e).__name__}: {e}")
            raise
        for rank, message in enumerate(self._wire.gather("whether all went well", None)):
            if message is not None:
                raise DistributedError(f"process {rank} failed, and all stop with it: {message}")
        return done

    def average(self, observed: Observation) -> Observation:
        mine = observed.measured()
        shapes = self._all_shapes({key: t.shape for key, t in mine.items()})
        order = sorted(shapes, key=lambda key: (key[0], key[1].value))
        device = next(iter(self._adapter.parameters())).device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        flat = [mine[key].to(device).double() if key in mine else nothing.expand(shapes[key]) for key in order]
        summed = (
            self._wire.sum("the sum of signals", torch.cat([t.flatten() for t in flat])) if flat else nothing[None][:0]
        )
        values: dict[Key, Tensor] = {}
        for key, part in zip(order, summed.split([shapes[key].numel() for key in order]), strict=True):
            part = part.reshape(shapes[key]) / self._divisor(key[1])
            values[key] = part.to(mine[key].dtype) if key in mine else part
        return observed.replaced(values)

    def _all_shapes(self, mine: dict[Key, torch.Size]) -> dict[Key, torch.Size]:
        """Shapes of all signals that any process has seen. Mostly all have seen the same, which a few bytes from each
        tell."""
        said = hashlib.sha256(repr(sorted((n, s.value, tuple(shape)) for (n, s), shape in mine.items())).encode())
        if len(set(self._wire.gather("which signals", said.digest()))) == 1:
            return mine
        shapes: dict[Key, torch.Size] = {}
        for theirs in self._wire.gather("shapes of signals", mine):
            for key, shape in theirs.items():
                if shapes.setdefault(key, shape) != shape:
                    raise DistributedError(
                        f"{key[0]}: {key[1].value} has shape {list(shape)} in one process and {list(shapes[key])} in "
                        "another"
                    )
        return shapes

    def _divisor(self, signal: Signal) -> int:
        if signal is Signal.S_B:
            return self._wire.size**2  # of gradients, each of a loss that is one of so many
        return 1 if signal in _SUMS else self._wire.size

    def _start_alike(self, model: nn.Module) -> None:
        """Copy the parameters of process 0 to all, as DistributedDataParallel does when it is made."""
        for p in _loose(model):
            self._wire.give("parameters to start with", p.data)

    def reduce(self, model: nn.Module, *, unscaled: bool) -> None:
        """Average gradients over processes. A parameter without one counts as zero, and no process waits for the
        device."""
        if self._ddp is not None and self._ddp._join_config.enable:
            raise ConfigError(
                "under torch's Join, a process that has no batches left takes no part in decisions, and all others "
                "would wait for it; give every process as many batches, as DistributedSampler and accelerate do"
            )
        if not self._sharded:
            return
        if unscaled:
            raise ConfigError(
                "the loss scaler has looked for infinities in this process's gradients alone; call flow.before_step, "
                "which reduces them over processes, before scaler.unscale_"
            )
        at_rest(model)  # a forward since the last backward has left modules with whole parameters, not the optimizer's
        if self._loose is None:
            self._loose = _loose(model)
        for p in self._loose:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self._loose if p.grad is not None]
        if gradients:
            mean = self._wire.sum("the sum of gradients", torch.cat([g.flatten() for g in gradients])) / self._wire.size
            for g, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                g.copy_(part.view_as(g))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        everything = list(parameters)
        if not everything:
            return
        there = torch.tensor([p.grad is not None for p in everything], device=everything[0].device).double()
        flat = [(p.grad if p.grad is not None else torch.zeros_like(p)).double().flatten() for p in everything]
        summed = self._wire.sum("the sum of gates' gradients", torch.cat([there, *flat]))
        parts = summed[len(there) :].split([p.numel() for p in everything])
        for p, part, known in zip(everything, parts, summed[: len(there)].tolist(), strict=True):
            p.grad = (part / self._wire.size).reshape(p.shape).to(p.dtype) if known else None

    def gathered(self, optimizer: Optimizer | None, transaction: Transaction) -> AbstractContextManager[None]:
        if self._shards is None:
            return nullcontext()
        self._wire.meet("factors that are put together")
        return self._shards.gathered(optimizer, transaction, self.attempt)

    def agree(self, decide: Callable[[], RankPlan], layout: Layout, step: int) -> RankPlan:
        self._same(layout, step)
        message = None
        if self.leads:
            try:
                plan = decide()
                message = (plan.to_json(), plan.pack())
            except Exception as e:  # the others wait, and have to be told
                self._wire.broadcast("the plan", f"{type(e).__name__}: {e}")
                raise
        found = self._wire.broadcast("the plan", message)
        if isinstance(found, str):
            raise PlanError(f"process 0 could not decide: {found}")
        return RankPlan.from_json(*found)

    def resized(self, layout: Layout, step: int, *, replaced: bool) -> None:
        self._same(layout, step)
        if replaced:
            self.undone()

    def undone(self) -> None:
        self._loose = None
        self._others = True
        if self._ddp is not None:
            rebuild(self._ddp)

    def _same(self, layout: Layout, step: int) -> None:
        """Compare step, layout and how large the factors are."""
        norm = torch.stack([p.detach().double().norm().cpu() for p in self._adapter.parameters()]).norm().item()
        said = self._wire.gather("ranks and norms", (step, layout.digest, norm))
        for rank, (theirs, digest, size) in enumerate(said):
            if theirs != said[0][0]:
                raise DistributedError(f"process {rank} is at step {theirs}, process 0 at step {said[0][0]}")
            if digest != said[0][1]:
                raise DistributedError(f"step {step}: ranks of process {rank} are not those of process 0")
            if abs(size - said[0][2]) > _DRIFT * abs(said[0][2]):
                raise DistributedError(
                    f"step {step}: the factors of process {rank} are not those of process 0 (norms {size:.6g} and "
                    f"{said[0][2]:.6g}); gradients are not reduced between them. Wrap the model in "
                    "DistributedDataParallel before training"
                )


def _loose(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that train and are not in shards."""
    return [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
