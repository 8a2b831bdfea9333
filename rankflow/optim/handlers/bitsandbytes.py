"""Moments as bitsandbytes stores them: 8-bit codes in blocks of 256 entries with the largest magnitude of each block,
or 32 bits for small parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankflow.linalg.decompose import Factor
from rankflow.optim.handler import Handler, State
from rankflow.optim.moments import Moments, View

_BLOCK = 256

# By the algorithm a class runs, whatever it is called: AdamW, AdamW8bit, PagedAdamW32bit and so on are all `adam`
_FORMS: dict[str, dict[str, Any]] = {
    "adam": {"first": "state1", "second": "state2", "betas": True},
    "lion": {"first": "state1"},
    "momentum": {"first": "state1"},
    "rmsprop": {"second": "state1"},
    "adagrad": {"second": "state1"},
}


@dataclass(frozen=True)
class BlockwiseHandler(Handler):
    """Read codes as numbers and write numbers as codes, in the form that bitsandbytes would choose for the new size.

    Rounding lets no |m| / sqrt(v) that was below 1 rise above it: the smallest code of a second moment is 0, and a
    first one over nothing would be a step of any size.
    """

    smallest: float = float("inf")  # entries of the smallest parameter whose state is kept in 8 bits
    overridden: Callable[[Tensor], bool] = lambda p: False

    def refusal(self, p: Tensor) -> str | None:
        if self.overridden(p):
            return "GlobalOptimManager overrides its settings, by identity; give settings to the optimizer instead"
        return None

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        blocks = -(-shape.numel() // _BLOCK)
        shapes: dict[str, tuple[int, ...]] = {}
        for key in self.keys:
            codes, largest = _beside(key)
            shapes |= {key: tuple(shape), codes: (256,), largest: (blocks,)}
        return shapes

    def load(self, factor: Factor, state: State, group: State, canonical: View) -> Moments:
        numbers = {key: _numbers(state, key) for key in self.keys if key in state}
        return super().load(factor, {**state, **numbers}, group, canonical)

    def store(self, moments: Moments, state: State, group: State, raw: View) -> dict[str, Any]:
        beside = {key for moment in self.keys for key in _beside(moment)}
        new = super().store(moments, {k: v for k, v in state.items() if k not in beside}, group, raw)
        exact = {key: new[key].float() for key in sorted(self.keys)}
        if all(t.numel() < self.smallest for t in exact.values()):
            return {**new, **exact}
        least = None
        for key, t in exact.items():  # the first moment comes first
            codes = _codes(state, key, signed=key == "state1", device=t.device)
            new |= _quantised(t if least is None else torch.maximum(t, least), key, codes)
            if least is not None:
                _raise(new, key, least)
            elif self.first is not None and self.second is not None:
                least = self._least(exact[self.first], _numbers(new, self.first), exact[self.second], moments.bias)
        return new

    def _least(self, m: Tensor, coded: Tensor, v: Tensor, bias: tuple[float, float]) -> Tensor:
        """Return the least value that `v` may have as a code, when `m` is `coded`."""
        before, after = (bias[1] * (t / bias[0]).square() for t in (m, coded))
        return torch.where(before <= v, after, torch.minimum(after, v))


def blockwise_handler(optimizer: Optimizer) -> Handler | None:
    """Return the handler of an optimizer of bitsandbytes, or None if its steps depend on whole parameters (LAMB, LARS)
    or it keeps more than moments (AdEMAMix)."""
    form = _FORMS.get(getattr(optimizer, "optimizer_name", ""))
    if form is None:
        return None
    settings: Any = getattr(optimizer, "args")  # noqa: B009, torch's class has none
    eight = settings.optim_bits == 8
    overrides: Mapping[int, Any] = getattr(optimizer, "mng").pid2config  # noqa: B009
    return BlockwiseHandler(
        **form,
        elementwise=not eight,  # what an entry's neighbours are decides how finely it is kept
        smallest=settings.min_8bit_size if eight else float("inf"),
        overridden=lambda p: id(p) in overrides,
    )


def _beside(key: str) -> tuple[str, str]:
    """Return the keys of the values of the codes of `key`, and of the largest magnitude of each block."""
    return f"qmap{key[-1]}", f"absmax{key[-1]}"


def _numbers(state: State, key: str) -> Tensor:
    if state[key].dtype != torch.uint8:
        return state[key]
    from bitsandbytes.functional import dequantize_blockwise

    codes, largest = (state[k] for k in _beside(key))
    return dequantize_blockwise(state[key], absmax=largest, code=codes, blocksize=_BLOCK)


def _quantised(t: Tensor, key: str, codes: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_blockwise

    quantised, how = quantize_blockwise(t, code=codes, blocksize=_BLOCK)
    return dict(zip((key, *_beside(key)), (quantised, codes, how.absmax), strict=True))


def _raise(state: dict[str, Any], key: str, least: Tensor) -> None:
    """Raise every number at `key` that is below `least` to the next code that is not; blocks stay as they are."""
    codes, largest = (state[k] for k in _beside(key))
    scale = largest.repeat_interleave(_BLOCK)[: least.numel()].view_as(least)
    up = torch.bucketize(least / scale.clamp(min=torch.finfo(scale.dtype).tiny), codes).clamp(max=255)
    state[key] = torch.where(_numbers(state, key) < least, up.to(torch.uint8), state[key])


def _codes(state: State, key: str, *, signed: bool, device: torch.device) -> Tensor:
    """The 256 values of codes, ascending: those there are, or bitsandbytes' own where the state was in 32 bits."""
    held = state.get(_beside(key)[0])
    return held if held is not None else _own_codes(signed).to(device)


@cache
def _own_codes(signed: bool) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed)


HANDLERS = {"bitsandbytes.*": blockwise_handler}
