"""Run passes over data that a policy asked for, and leave model, optimizer and random state as they were."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset

from rankflow.errors import ConfigError, RankFlowError
from rankflow.linalg.random import own_random_numbers
from rankflow.lora.adapter import Adapter
from rankflow.lora.interrupts import give_way
from rankflow.observe.probes import Probes
from rankflow.policies.observation import Observation, Signal, Study

LossFn = Callable[[nn.Module, Any], Tensor]


def run_study(
    study: Study,
    adapter: Adapter,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> Observation:
    """Run every batch at every point of `study` and average the signals over all passes (but for those of inputs).

    The model is in eval mode and its random numbers are the study's own, keyed by (seed, step, name). Gradients are
    taken with `torch.autograd.grad` into sums of the study's, so no `.grad` is touched and no hook on one is called.
    Afterwards, or after an exception, scalings, modes, gradients and all random state are bit for bit what they were.
    At a point p the adapter's scaling is p times its own, and so is what the signals see of it; `A`, `B` and
    `singular_values` are read afterwards, at its own scaling.

    Args:
        batches: iterated afresh, and no further than `study.batches`; moved to the model's device. It may hold fewer.
        loss_fn: `loss_fn(model, batch)` gives a scalar; `model(**batch).loss` when left out.

    Raises:
        ConfigError: no batch, or points that are not positive.
        RankFlowError: a batch without a loss.
    """
    _check(study)
    probes = Probes(adapter, seed=seed, sample_rows=study.rows, sketch_rows=study.components)
    factors = [p for s in adapter.sites.values() if s.present for p in (s.A, s.B) if study.frozen or p.requires_grad]
    if not factors:
        raise RankFlowError(f"study {study.name!r}: none of the adapter's factors trains, so there is no gradient")
    loss_of = loss_fn if loss_fn is not None else model_loss
    passes = 0
    with ExitStack() as stack:
        stack.enter_context(own_random_numbers(seed, step, study.name))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_training(factors))
        stack.callback(probes.disarm)
        probes.arm(study.signals, step)
        for batch in itertools.islice(batches, study.batches):
            give_way()
            batch = send_to_device(batch, factors[0].device)
            for point in study.points:
                with _scaled(adapter, point):
                    loss = loss_of(model, batch)
                    check_loss(loss, f"study {study.name!r}")
                    gradients = torch.autograd.grad(loss, factors, allow_unused=True)
                probes.add_gradients(dict(zip(factors, gradients, strict=True)))
                passes += 1
            probes.end_batch()
        if passes == 0:
            raise ConfigError(
                f"study {study.name!r} got no batch; give a list or a DataLoader, which can be iterated more than once"
            )
        total = probes.collect()
    return _averaged(total, passes, study)


def check_batches(batches: Any, argument: str, loss_fn: LossFn | None) -> None:
    """Look at a data argument without taking anything from it.

    Raises:
        ConfigError: it is no collection of batches: a dataset of examples, a single batch, empty, not to be iterated;
            or its batches are not what a model takes and there is no `loss_fn` that would.
    """
    loader = "give a list of batches or a DataLoader"
    if isinstance(batches, Dataset) or type(batches).__module__.partition(".")[0] == "datasets":
        raise ConfigError(
            f"{argument} is a dataset of examples ({type(batches).__name__}), not batches of them; give "
            "DataLoader(dataset, batch_size=..., collate_fn=...), with batch_size=None if it holds batches already"
        )
    if isinstance(batches, Mapping | str | bytes):
        raise ConfigError(f"{argument} is a single {type(batches).__name__}, not an iterable of batches; {loader}")
    if not (hasattr(batches, "__iter__") or (hasattr(batches, "__getitem__") and hasattr(batches, "__len__"))):
        raise ConfigError(f"{argument} is {type(batches).__name__}, which cannot be iterated; {loader}")
    if isinstance(batches, list | tuple):
        if not batches:
            raise ConfigError(f"{argument} holds no batch; {loader}")
        if loss_fn is None and (problem := _not_a_batch(batches[0])) is not None:
            raise ConfigError(f"{argument}: {problem}")


def _not_a_batch(first: Any) -> str | None:
    """Return why `model(**first)` would fail, or None if nothing speaks against it."""
    if not isinstance(first, Mapping):
        return f"its first batch is {type(first).__name__}, no dictionary for model(**batch); pass loss_fn as well"
    ids = first.get("input_ids")
    flat = f"input_ids {list(ids.shape)}" if isinstance(ids, Tensor) and ids.ndim < 2 else None
    if flat or not any(isinstance(value, Tensor) for value in first.values()):
        what = flat or f"{', '.join(map(str, first))}, and no tensor"
        return f"its first element is an example ({what}), not a batch; give DataLoader(examples, batch_size=...)"
    return None


def with_a_batch(batches: Iterable[Any], argument: str) -> Iterable[Any]:
    """Return the same batches, after a check that there is one. Of an iterator the first is taken and put back.

    Raises:
        ConfigError: an iterator that has nothing left.
    """
    if not isinstance(batches, Iterator):
        return batches
    with own_random_numbers("first batch", argument):
        first = list(itertools.islice(batches, 1))
    if not first:
        raise ConfigError(
            f"{argument} is an iterator that has no batch left; give a list or a DataLoader, which can be iterated "
            "more than once"
        )
    return itertools.chain(first, batches)


def _check(study: Study) -> None:
    bad = [p for p in study.points if not (math.isfinite(p) and p > 0)]
    if bad or not study.points:
        raise ConfigError(
            f"study {study.name!r}: points {list(study.points)} must be positive numbers, at least one; "
            "at 0 no gradient reaches the adapter"
        )


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def check_loss(loss: Any, what: str) -> None:
    """Raise RankFlowError if `loss` of a batch, in `what`, is not a scalar to take gradients of."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise RankFlowError(
            f"{what}: the loss is {found}, not a scalar with a gradient; "
            "put labels into the batches or pass loss_fn=lambda model, batch: ..."
        )


def _averaged(total: Observation, passes: int, study: Study) -> Observation:
    as_is = {Signal.A, Signal.B, Signal.SINGULAR_VALUES, Signal.INPUTS, Signal.INPUT_ENERGY, Signal.INPUT_SAMPLE}
    values = {}
    for name, record in total.items():
        values[name] = {s: (lambda r=record, s=s: r[s]) if s in as_is else record[s] / passes for s in record}
    return Observation(total.step, values, study.name)


def surroundings(model: nn.Module, adapter: Adapter) -> Callable[[], None]:
    """What puts random states, modes and scalings back to what they are now, should whoever lends them be interrupted
    while they give them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    modes = [(module, module.training) for module in model.modules()]
    scalings = [(site.layer.scaling, dict(site.layer.scaling)) for site in adapter.sites.values()]

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for module, training in modes:
            module.training = training
        for scaling, was in scalings:
            scaling.update(was)

    return put_back


@contextmanager
def _scaled(adapter: Adapter, point: float) -> Iterator[None]:
    """Multiply the adapter's scaling by `point` in the block, then restore it exactly."""
    before = {name: dict(site.layer.scaling) for name, site in adapter.sites.items() if site.present}
    try:
        for name in before:
            adapter.sites[name].layer.scaling[adapter.name] *= point
        yield
    finally:
        for name, scaling in before.items():
            adapter.sites[name].layer.scaling.update(scaling)


@contextmanager
def _training(factors: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let factors that are frozen have gradients in the block."""
    frozen = [p for p in factors if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode in the block, then every module back into its own mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
