"""Hooks that fill an `Observation`: put on for one optimizer step, taken off when its gradients are there.

What a signal needs of the forward pass rides on the autograd tape, not in a list of ours. So forwards whose
loss is never backwarded vanish with their graph, two forwards before one backward stay apart, and gradient
checkpointing recomputes our records along with its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from rankflow.errors import AdapterError, RankFlowError
from rankflow.linalg.decompose import spectrum
from rankflow.lora.adapter import Adapter
from rankflow.lora.base_weight import check_base_weight
from rankflow.lora.site import Site
from rankflow.observe.compile import stay_eager
from rankflow.observe.contractions import RandomProjection
from rankflow.observe.hooks import DELTA, GRAMS, INPUT, PRINCIPAL, Mask, Recorder
from rankflow.policies.observation import GATE_SIGNALS, Lazy, Observation, Signal

_LAZY: dict[Signal, Callable[[Site], Tensor]] = {
    Signal.A: lambda site: site.a().detach().clone(),
    Signal.B: lambda site: site.b().detach().clone(),
    Signal.SINGULAR_VALUES: lambda site: spectrum(site.a().detach(), site.b().detach(), site.scaling).sigma,
}
GateSignals = Callable[[frozenset[Signal], Iterable[str]], Mapping[str, Mapping[Signal, Lazy]]]  # of these modules
FACTORS = frozenset(_LAZY)  # read from the factors, whenever somebody asks
_TAPPED = GRAMS | DELTA | INPUT
_LOSS_POWER = dict.fromkeys((Signal.S_A, Signal.TOKENS, *INPUT), 0) | {Signal.S_B: 2}  # the others are linear in it


class Probes:
    """Listens to one adapter.

    Hook signals are taken in backward, at every call of a module, and added up as `.grad` is. For delta scores, which
    are not linear, each micro-batch counts by itself, and so does each call of a module that is called twice. A module
    that backward did not reach, or that is frozen with nothing trained below it, has no hook signals in the
    Observation. `weight_score` is that of the gradients' sum, and `inputs` those of all calls. `A`, `B`,
    `singular_values` and the values of gates are those at the time of reading.

    Where the model's own forward gets a 2-D `attention_mask`, tokens it hides are left out of `S_A`, `S_B`, `tokens`
    and `inputs` in every layer whose input has its leading shape; convolutions count every position. With reentrant
    checkpointing and several forwards before one backward, the last mask stands for all. A factor common to all modules
    (loss divided by tokens or by accumulation steps) stays in `S_B`.

    Args:
        adapter: what to listen to.
        gate_signals: gives those of the adapter's gates, by module; they are collected before the probes are.
        seed: of sampled rows and sketches, together with step and module.
        sample_rows: output rows that `delta_score_sampled` and `weight_score` look at; of the latter's the gradient is
            kept, ``[sample_rows, in]`` for every module.
        sketch_rows: q of `sketch` and of `inputs`; a few more than the directions wanted from them.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        gate_signals: GateSignals | None = None,
        seed: int = 0,
        sample_rows: int = 64,
        sketch_rows: int = 16,
    ):
        self.armed = False
        self._gate_signals = gate_signals
        self.seed = seed
        self._adapter = adapter
        self._sizes = (sample_rows, sketch_rows)
        self._step = 0
        self._signals: frozenset[Signal] = frozenset()
        self._recorders: dict[str, Recorder] = {}
        self._handles: list[Any] = []
        self._relax: Callable[[], object] | None = None  # ends what `stay_eager` began

    def check(self, signals: frozenset[Signal]) -> None:
        """Raise AdapterError if a module's kind of layer does not have one of `signals`."""
        for site in self._adapter.sites.values():
            _refuse(site, signals - _LAZY.keys() - GATE_SIGNALS)

    def arm(self, signals: frozenset[Signal], step: int) -> None:
        """Listen to the backward passes before the `step`-th optimizer step. What an earlier call heard is dropped.

        Until `collect` or `disarm`, code under `torch.compile` runs eagerly where signals come from inside the forward:
        a compiled graph would ignore new hooks.

        Raises:
            AdapterError: a module whose kind of layer does not have one of the signals.
        """
        self.disarm()
        self._step, self._signals = step, frozenset(signals)
        hooked = self._signals - _LAZY.keys() - GATE_SIGNALS
        self.check(self._signals)
        sites = {name: site for name, site in self._adapter.sites.items() if site.present}
        self.armed = True
        if not hooked:
            return
        mask = Mask()
        for name, site in sites.items():
            draws = RandomProjection((self.seed, step, name), *self._sizes)
            self._recorders[name] = recorder = Recorder(site, self._adapter.name, hooked, mask, draws)
            recorder.install(self._handles)
        if hooked & (GRAMS | INPUT):
            self._handles.append(self._adapter.model.register_forward_pre_hook(mask.read, with_kwargs=True))
        if hooked & _TAPPED and "torch._dynamo" in sys.modules:  # else nothing can be compiled
            self._relax = stay_eager(self)

    @property
    def on_gradients(self) -> bool:
        """Whether `collect` will look at gradients of the factors themselves."""
        return bool(self._signals & {Signal.GRAD_A, Signal.GRAD_B})

    def add_gradients(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Take the factors' gradients from `torch.autograd.grad`, which fills no `.grad` and calls no hook on it."""
        for recorder in self._recorders.values():
            for factor, parameter in (("A", recorder.site.A), ("B", recorder.site.B)):
                if (gradient := gradients.get(parameter)) is not None:
                    recorder.add_gradient(factor, gradient)

    def end_batch(self) -> None:
        """End a batch: the passes since the last call, or since `arm`, were one, and signals of whole batches are
        taken."""
        for recorder in self._recorders.values():
            recorder.end_batch()

    def collect(self, loss_scale: float = 1.0) -> Observation:
        """Return what was heard since `arm`, and take the hooks off.

        Call it when gradients are ready and before the optimizer steps. `loss_scale` is what the loss was multiplied by
        in backward; whether `.grad` has been unscaled since does not matter.

        Raises:
            RankFlowError: not armed, or gradients came past hooks that heard nothing.
        """
        if not self.armed:
            raise RankFlowError("probes are not armed for this step; call arm() before the forward pass")
        self.end_batch()
        for recorder in self._recorders.values():
            if recorder.site.sharded:
                recorder.take_gradients()
        hooked = self._signals - _LAZY.keys() - GATE_SIGNALS
        heard = {name: recorder.heard() for name, recorder in self._recorders.items()}
        for name, recorder in self._recorders.items():
            absent = {Signal.INPUT_SAMPLE} if recorder.site.kind != "linear" else set()
            silent = sorted(s.value for s in (hooked & _TAPPED) - heard[name].keys() - absent)
            if recorder.trained and silent:
                raise RankFlowError(
                    f"{name}: signal {silent[0]!r} heard no backward pass before step {self._step}, though the module "
                    "got gradients: the forward ran before arm(), or in a compiled graph that was made before it"
                )
        if hooked and not any(heard.values()):
            raise RankFlowError(
                f"{', '.join(sorted(s.value for s in hooked))}: no backward pass reached any of the adapter's modules "
                f"before step {self._step}; the adapter must be active, and before_step() called after backward"
            )
        values: dict[str, dict[Signal, Lazy]] = {}
        for name, site in self._adapter.sites.items():
            if site.present:
                values[name] = {s: partial(read, site) for s, read in _LAZY.items() if s in self._signals}
        for name, found in heard.items():
            for signal, value in found.items():
                power = _LOSS_POWER.get(signal, 1)
                values[name][signal] = value / loss_scale**power if power and loss_scale != 1 else value
        if self._gate_signals is not None and (wanted := self._signals & GATE_SIGNALS):
            for name, read in self._gate_signals(wanted, values).items():
                values[name] |= read
        self.disarm()
        return Observation(self._step, values)

    def disarm(self) -> None:
        """Take all hooks off and forget what was heard."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorders = {}
        if self._relax is not None:
            self._relax()
            self._relax = None
        self.armed = False


def _refuse(site: Site, signals: frozenset[Signal]) -> None:
    inner = sorted(s.value for s in signals & _TAPPED)
    if inner and (site.dora or site.kind not in ("linear", "conv", "embedding")):
        raise AdapterError(
            f"{site.name}: signal {inner[0]!r} does not exist for {'DoRA' if site.dora else site.kind} layers, whose "
            "forward has no activation between A and B; use metric 'weights' or a policy that reads factors and their "
            "gradients only, or keep the module out of the adapter"
        )
    if signals & PRINCIPAL and site.kind != "linear":
        raise AdapterError(
            f"{site.name}: signal 'inputs' does not exist for {site.kind} layers, only for linear ones; use a policy "
            "that does not ask for it, such as gora, or keep the module out of the adapter"
        )
    if Signal.WEIGHT_SCORE in signals:
        check_base_weight(site)
