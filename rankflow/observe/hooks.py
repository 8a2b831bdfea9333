"""The hooks of one module: records put on the autograd tape in forward, signals summed in backward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.linalg.pca import Principal
from rankflow.lora.base_weight import base_weight
from rankflow.lora.site import Site
from rankflow.observe.contractions import (
    Contract,
    RandomProjection,
    conv_contraction,
    delta_score,
    embedding_contraction,
    gram,
    integrated,
    linear_contraction,
    touched_columns,
)
from rankflow.policies.observation import Signal

GRAMS = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})
DELTA = frozenset(
    {Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED, Signal.SKETCH, Signal.WEIGHT_SCORE, Signal.PATH_SCORE}
)
PRINCIPAL = frozenset({Signal.INPUTS, Signal.INPUT_ENERGY})
INPUT = PRINCIPAL | {Signal.INPUT_SAMPLE}
_SAMPLE = 16  # inputs that `input_sample` takes from each pass of a module
_GRADIENT = {"A": Signal.GRAD_A, "B": Signal.GRAD_B}


class Recorder:
    """The hooks of one module, and the sums of what they heard.

    The sum of `WEIGHT_SCORE` is that of the gradient itself, rows of it: it becomes a score in `heard`, when all of it
    is there, since |W0 * mean G| is not the mean of |W0 * G|.
    """

    def __init__(self, site: Site, adapter: str, signals: frozenset[Signal], mask: Mask, draws: RandomProjection):
        self.site = site
        self.sums: dict[Signal, Tensor] = {}
        self.trained = False  # a gradient reached A or B
        self._adapter = adapter
        self._signals = signals
        self._mask = mask
        self._draws = draws
        self._raw: Tensor | None = None  # lora_dropout's input, on its way to lora_A
        self._x: Tensor | None = None  # lora_A's input, on its way to lora_B
        self._given: Tensor | None = None  # the module's input before dropout, likewise
        self._inputs: Principal | None = None
        self._sample: list[Tensor] = []
        self._channels = 1 if site.kind == "conv" else -1
        self._passes: list[tuple[Tensor, Tensor, float]] = []  # (g, x, scaling in force) of this batch

    def install(self, handles: list[Any]) -> None:
        """Put the hooks on; `handles` has each as soon as it is on, so that they come off wherever this ends."""
        for factor, parameter in (("A", self.site.A), ("B", self.site.B)):
            if parameter.requires_grad and not self.site.sharded:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._accumulated, factor)))
        layer: Any = self.site.layer
        if self.site.kind == "embedding":
            if self._signals & (GRAMS | DELTA):
                handles.append(layer.register_forward_hook(self._on_embedding))
            return
        if self._signals & (GRAMS | INPUT):
            handles.append(layer.lora_dropout[self._adapter].register_forward_pre_hook(self._on_dropout))
        if self._signals & (GRAMS | DELTA | INPUT):
            handles.append(layer.lora_A[self._adapter].register_forward_hook(self._on_down))
        if self._signals & (DELTA | INPUT):
            handles.append(layer.lora_B[self._adapter].register_forward_hook(self._on_up))

    # -- gradients of the factors -----------------------------------------------------------------------------------

    def _accumulated(self, factor: str, parameter: Tensor) -> None:
        self.trained = self.trained or parameter.grad is not None
        if _GRADIENT[factor] in self._signals and parameter.grad is not None:
            self.sums[_GRADIENT[factor]] = self._canonical(factor, parameter.grad).clone()

    def take_gradients(self) -> None:
        """Take `.grad`, the mean over processes, of factors in shards, on which no hook is called."""
        for factor, parameter in (("A", self.site.A), ("B", self.site.B)):
            if parameter.requires_grad:
                self._accumulated(factor, parameter)

    def add_gradient(self, factor: str, gradient: Tensor) -> None:
        self.trained = True
        if _GRADIENT[factor] in self._signals:
            self._add(_GRADIENT[factor], self._canonical(factor, gradient))

    def _canonical(self, factor: str, t: Tensor) -> Tensor:
        return self.site.a(t.detach()) if factor == "A" else self.site.b(t.detach())

    def _add(self, signal: Signal, value: Tensor) -> None:
        self.sums[signal] = self.sums[signal] + value if signal in self.sums else value

    def heard(self) -> dict[Signal, Tensor]:
        """Return all signals that were heard."""
        found = dict(self.sums)
        if Signal.WEIGHT_SCORE in found:
            gradient = found[Signal.WEIGHT_SCORE]
            weight = base_weight(self.site)
            rows = self._draws.rows(len(weight), gradient.device).to(weight.device)
            found[Signal.WEIGHT_SCORE] = (_working(weight[rows]).to(gradient.device) * gradient).abs().mean()
        if self._inputs is not None:
            found |= {Signal.INPUTS: self._inputs.rows, Signal.INPUT_ENERGY: self._inputs.energy}
        if self._sample:
            found[Signal.INPUT_SAMPLE] = torch.cat(self._sample)
        return {signal: value for signal, value in found.items() if signal in self._signals}

    # -- in forward: put records on the tape ------------------------------------------------------------------------

    def _on_dropout(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._raw = args[0] if torch.is_grad_enabled() else None

    def _on_down(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        raw, self._raw = self._raw, None
        if self._signals & DELTA:
            self._x = args[0]
        if self._signals & INPUT and self.site.kind == "linear":
            self._given = args[0] if raw is None else raw
        if not self._signals & GRAMS:
            return None
        z = output
        if raw is not None and raw is not args[0]:
            with torch.no_grad():
                z = module.forward(raw)  # noise in z from dropout would change the small eigenvalues of z z^T
        return _Tap.apply(output, partial(self._take_grams, self._mask.tokens), z)

    def _on_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, given = self._x, self._given
        self._x = self._given = None
        if x is not None:
            output = _Tap.apply(output, self._take_delta, x)
        if given is not None:
            output = _Tap.apply(output, partial(self._take_inputs, self._mask.tokens), given)
        return output

    def _on_embedding(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        applied = self._adapter in layer.active_adapters and not layer.disable_adapters and not layer.merged
        if applied and torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(partial(self._take_embedding, self._mask.tokens, args[0]))

    # -- in backward ------------------------------------------------------------------------------------------------

    def _take_embedding(self, mask: Tensor | None, ids: Tensor, dy: Tensor) -> None:
        """Make an embedding's signals from ids and dL/dy, as it has no modules for A and B that could be tapped."""
        with _aside(dy):
            A, B = _working(self.site.shown("A")), _working(self.site.shown("B"))
            extra = self.site.layer._get_embed_scale()  # some models scale embeddings inside the layer
            g = _working(dy) * self.site.scaling * (1.0 if extra is None else extra.to(dy.device))
            if self._signals & DELTA:
                self._take_delta(g, ids)
            if self._signals & GRAMS:
                self._take_grams(mask, g @ B, F.embedding(ids, A.T))

    def _take_delta(self, g: Tensor, x: Tensor) -> None:
        if Signal.PATH_SCORE in self._signals:
            self._passes.append((g.detach().movedim(self._channels, 0), x.detach(), self.site.scaling))
        if not self._signals & DELTA - {Signal.PATH_SCORE}:
            return
        with _aside(g):
            g = _working(g).movedim(self._channels, 0)
            A, B = _working(self.site.shown("A")), _working(self.site.shown("B"))
            contract = self._contraction(x)
            if Signal.SKETCH in self._signals:
                mixed = torch.tensordot(self._draws.omega(g), g, dims=1)
                self._add(Signal.SKETCH, contract(mixed) / self.site.scaling)
            if Signal.WEIGHT_SCORE in self._signals:
                rows = self._draws.rows(len(B), g.device)
                self._add(Signal.WEIGHT_SCORE, contract(g[rows]) / self.site.scaling)
            norm = math.sqrt(B.shape[0] * A.shape[1])
            if self.site.kind == "embedding":
                A, contract = touched_columns(x, A)
            if Signal.DELTA_SCORE in self._signals:
                self._add(Signal.DELTA_SCORE, delta_score(A, B, g, contract) / norm)
            if Signal.DELTA_SCORE_SAMPLED in self._signals:
                rows = self._draws.rows(len(B), g.device)
                scale = len(B) / len(rows) / norm
                self._add(Signal.DELTA_SCORE_SAMPLED, delta_score(A, B, g, contract, rows) * scale)

    def end_batch(self) -> None:
        """Score the integrated passes of a batch, and drop what they left."""
        passes, self._passes = self._passes, []
        if not passes:
            return
        with _aside(passes[0][0]):
            # DeltaW is that of the module's own scaling, each g that of the scaling in force at its pass
            A, B = _working(self.site.shown("A")), self.site.scaling * _working(self.site.shown("B"))
            gradients = [_working(g) / scaling for g, _, scaling in passes]
            inputs = [x for _, x, _ in passes]
            if self.site.kind == "embedding":  # all passes look at the same few columns
                A, contract = touched_columns(torch.cat([ids.flatten() for ids in inputs]), A)
                terms = [(torch.cat([g.flatten(1) for g in gradients], 1), contract)]
            else:
                terms = list(zip(gradients, map(self._contraction, inputs), strict=True))
            rows = torch.arange(len(B), device=B.device)
            self._add(Signal.PATH_SCORE, delta_score(A, B, rows, integrated(terms)))

    def _contraction(self, x: Tensor) -> Contract:
        if self.site.kind == "embedding":
            return embedding_contraction(x, self.site.a().shape[1])
        if self.site.kind == "conv":
            return conv_contraction(self.site.layer.lora_A[self._adapter], _working(x))
        return linear_contraction(_working(x))

    def _take_inputs(self, mask: Tensor | None, g: Tensor, x: Tensor) -> None:
        with _aside(g):
            seen = None if mask is None or mask.shape != x.shape[:-1] else mask.to(x.device).flatten()
            rows = x.reshape(-1, x.shape[-1])
            if Signal.INPUT_SAMPLE in self._signals:
                shown = rows if seen is None else rows[seen.bool()]
                self._sample.append(self._draws.some(shown, _SAMPLE, len(self._sample)).float())
            if not self._signals & PRINCIPAL:
                return
            if self._inputs is None:
                self._inputs = Principal.empty(self._draws.sketch_rows, x.shape[-1], x.device)
            self._inputs = self._inputs.add(rows, seen)

    def _take_grams(self, mask: Tensor | None, d: Tensor, z: Tensor) -> None:
        with _aside(d):
            if mask is not None and (self.site.kind == "conv" or mask.shape != z.shape[:-1]):
                mask = None
            z, d = (t.movedim(self._channels, -1).flatten(0, -2)[:, : self.site.rank] for t in (z, d))
            tokens = torch.full((), len(z), dtype=torch.float64, device=z.device)
            if mask is not None:
                hidden = mask.to(z.device).reshape(-1, 1) == 0
                z, d, tokens = z.masked_fill(hidden, 0), d.masked_fill(hidden, 0), tokens - hidden.sum()
            if Signal.S_A in self._signals:
                self._add(Signal.S_A, gram(z))
            if Signal.S_B in self._signals:
                self._add(Signal.S_B, gram(d))
            if Signal.TOKENS in self._signals:
                self._add(Signal.TOKENS, tokens)


class _Tap(torch.autograd.Function):
    """Identity; in backward it hands `sink` the gradient, and the tensors it kept on the tape."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sink: Callable[..., None], *kept: Tensor) -> Tensor:
        ctx.sink = sink
        ctx.save_for_backward(*kept)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: checkpointing refuses to recompute for a second look
        ctx.sink(*gradients, *kept)
        return (*gradients, None, *[None] * len(kept))


class Mask:
    """The attention mask of the training forward now under way."""

    tokens: Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation between a forward and its backward, which may still recompute
        found = kwargs.get("attention_mask")
        for arg in args:
            if found is None and isinstance(arg, Mapping):
                found = arg.get("attention_mask")
        if found is None and args:
            inner: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
            names = list(inspect.signature(inner.forward).parameters)[: len(args)]
            found = args[names.index("attention_mask")] if "attention_mask" in names else None
        self.tokens = found if isinstance(found, Tensor) and found.dim() == 2 else None


def _working(t: Tensor) -> Tensor:
    """Return `t` in float32 or wider, as half precision would lose sums over many tokens."""
    return t if t.dtype == torch.float64 else t.float()


@contextmanager
def _aside(like: Tensor) -> Iterator[None]:
    """Turn off gradients and autocast, so that sums keep the precision that they are given in."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield
