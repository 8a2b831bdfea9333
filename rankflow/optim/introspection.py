"""Look into an optimizer: the one inside wrappers, and what it keeps that no handler carries through a resize."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.errors import OptimizerError
from rankflow.optim.handler import Handler
from rankflow.optim.handlers import find_handler, registered


def innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer that really steps, inside wrappers such as accelerate's, which show its state as theirs.

    Raises:
        OptimizerError: a wrapper that keeps state of its own, or something that torch's class has not made: nobody
            could tell when it steps.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        if getattr(optimizer, "state", inner.state) is not inner.state:
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps state of its own around {type(inner).__name__}, which a resize "
                f"would leave behind; train with {type(inner).__name__} itself"
            )
        optimizer = inner
    made = ("param_groups", "state", "_optimizer_step_pre_hooks")
    if not isinstance(optimizer, Optimizer) or not all(hasattr(optimizer, name) for name in made):
        raise OptimizerError(
            f"{type(optimizer).__name__} is not an optimizer that torch.optim.Optimizer.__init__ has made, so rankflow "
            "cannot tell when it steps and what it keeps. Let it call super().__init__(params, defaults), or hand over "
            "the optimizer inside it"
        )
    return optimizer


# -- optimizers of classes that nobody knows to the letter ------------------------------------------------------------


def unknown_state(optimizer: Optimizer, handler: Handler | None, like: nn.Parameter) -> str | None:
    """Return what `optimizer` will keep for a parameter such as `like` and `handler` does not carry, or None.

    Classes that are known to the letter are believed; of others a copy takes some steps, on a small matrix of its own.

    Raises:
        OptimizerError: parameters, or what belongs to them, are kept where a resize cannot replace them.
    """
    if _known_to_the_letter(optimizer):
        return None
    title = type(optimizer).__name__
    if (where := next(_holders(optimizer), None)) is not None:
        raise OptimizerError(
            f"{title} keeps parameters outside of its groups and state, in {where!r}, which a resize would leave "
            "behind; use an optimizer of torch.optim, such as AdamW"
        )
    try:
        state, elsewhere = _kept_after_steps(optimizer, like)
    except Exception as e:
        return f"what a step without a closure on a dense matrix does not show ({' '.join(str(e).split())[:200]})"
    if elsewhere:
        raise OptimizerError(
            f"{title} keeps what belongs to parameters outside of its state, in {elsewhere[0]!r}, which a resize would "
            "leave behind; let it keep that in self.state[p], or use an optimizer of torch.optim, such as AdamW"
        )
    carried = handler.keys if handler is not None else set()
    return next((repr(k) for k, value in state.items() if k not in carried and not is_scalar(value)), None)


def is_scalar(value: Any) -> bool:
    """Return whether a resize leaves this entry of an optimizer's state as it is."""
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _known_to_the_letter(optimizer: Optimizer) -> bool:
    cls = type(optimizer)
    for ancestor in cls.__mro__:
        if (found := registered(ancestor)) is None:
            continue
        if not isinstance(found.handler, Handler):
            return ancestor is cls and find_handler(optimizer) is not None
        methods = [n for n in dir(ancestor) if not n.startswith("__") and callable(getattr(ancestor, n))]
        same = (inspect.unwrap(getattr(cls, n)) is inspect.unwrap(getattr(ancestor, n)) for n in methods)
        return not found.anybodys and all(same)
    return False


def _holders(optimizer: Optimizer) -> Iterator[str]:
    """Yield the attributes, beside groups and state, through which the optimizer reaches parameters."""
    for name, value in _own(optimizer).items():
        if any(isinstance(v, nn.Parameter | nn.Module | Optimizer) for v in _leaves(value)):
            yield name


def _own(optimizer: Optimizer) -> dict[str, Any]:
    return {name: value for name, value in vars(optimizer).items() if name not in ("param_groups", "state")}


def _kept_after_steps(optimizer: Optimizer, like: nn.Parameter) -> tuple[dict[Any, Any], list[str]]:
    """What a copy of `optimizer` keeps for a small matrix after some steps on it, as state or on the matrix itself, and
    attributes that have come to hold tensors; nothing of the original moves."""
    p = nn.Parameter(torch.zeros(4, 4, dtype=like.dtype, device=like.device))
    group = next(g for g in optimizer.param_groups if any(q is like for q in g["params"]))
    settings = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    names = {"param_names": ["p"]} if "param_names" in group else {}
    copied = object.__new__(type(optimizer))
    own = {k: _copied(v) for k, v in _own(optimizer).items()}
    own.pop("step", None)  # a scheduler's, bound to the original
    hooks = {name: OrderedDict() for name in own if name.startswith("_optimizer_")}
    vars(copied).update(own | hooks, state=defaultdict(dict), param_groups=[{**settings, **names, "params": [p]}])
    before = {name: _tensors(value) for name, value in own.items()}
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(_STEPS):
            p.grad = torch.ones_like(p)
            type(optimizer).step(copied)  # type: ignore[call-arg]
    state = {k: v for key, kept in copied.state.items() for k, v in (kept.items() if key is p else [(key, kept)])}
    elsewhere = [name for name, value in _own(copied).items() if _tensors(value) > before.get(name, 0)]
    return {**vars(p), **state}, elsewhere


_STEPS = 12  # some keep more only from their fifth or tenth step on, such as weights to look back at


def _copied(value: Any) -> Any:
    """Return `value` with its containers and tensors copied, and all else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if not isinstance(value, dict | list):
        return copy.copy(value) if isinstance(value, set) else value
    new = copy.copy(value)  # of its own class
    for key, v in list(value.items() if isinstance(value, dict) else enumerate(value)):
        new[key] = _copied(v)
    return new


def _tensors(value: Any) -> int:
    return sum(isinstance(v, Tensor) and v.numel() > 1 for v in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested containers hold, keys included."""
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set):
        for v in value:
            yield from _leaves(v)
    else:
        yield value
