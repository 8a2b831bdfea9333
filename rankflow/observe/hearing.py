"""Note which modules of an adapter a gradient reaches. One that none reaches has no importance; frozen ones are left
alone.

A vision tower on batches of text, experts to whom nobody is routed, an encoder that is not called: they train, and have
no gradient, or one of zeros where others (`zero_grad(set_to_none=False)`, processes that add up) have written that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from rankflow.lora.adapter import Adapter
from rankflow.lora.dtensor import part
from rankflow.lora.site import Site
from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout
from rankflow.policies.observation import Observation, Signal

_SILENCE: Mapping[Signal, Callable[[Site, Tensor], Tensor]] = {  # of a module, and what another has of the signal
    Signal.GRAD_A: lambda site, other: torch.zeros_like(site.a().detach()),
    Signal.GRAD_B: lambda site, other: torch.zeros_like(site.b().detach()),
    Signal.SKETCH: lambda site, other: other.new_zeros(other.shape[-2], site.slot().in_features),
    **dict.fromkeys(
        (Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED, Signal.WEIGHT_SCORE, Signal.PATH_SCORE),
        lambda site, other: other.new_zeros(()),
    ),
}


class Hearing:
    """The modules that a gradient has reached since the run began.

    Most steps only look at which have one. Whether it is 0 throughout is asked where somebody listens or decides, and
    of those alone of which it is not known that they were ever reached: a step on which nothing happens costs nothing.
    """

    def __init__(self, adapter: Adapter):
        self.reached: frozenset[str] = frozenset()
        self._adapter = adapter
        self._had: frozenset[str] = frozenset()  # a gradient, on a step that did not look at what is in it

    @torch.no_grad()
    def listen(self, closely: bool) -> None:
        """Note which gradients are there. `closely` also reads whether they are zero, which waits for the device."""
        found: dict[str, list[Tensor]] = {}
        for name, site in self._adapter.sites.items():
            if name in self.reached or (name in self._had and not closely) or not (site.present and site.trainable):
                continue
            if gradients := [p.grad for p in (site.A, site.B) if p.grad is not None]:
                found[name] = gradients
        if not closely:
            self._had |= found.keys()
            return
        # one that has none now, and had one before, was reached then; zeros that are always there tell nothing
        self.reached |= self._had - found.keys()
        self._had &= found.keys()
        if found:
            flags = [_nonzero(gradients) for gradients in found.values()]
            known = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
            self.reached |= {name for name, yes in zip(found, known, strict=True) if yes}
            self._had -= self.reached

    def state_dict(self) -> dict[str, list[str]]:
        return {"reached": sorted(self.reached), "had": sorted(self._had)}

    def load_state_dict(self, state: Mapping[str, Iterable[str]], transaction: Transaction) -> None:
        transaction.keep(self, "reached", "_had")
        self.reached, self._had = frozenset(state.get("reached", ())), frozenset(state.get("had", ()))

    def unheard(self, layout: Layout) -> frozenset[str]:
        """Return the modules in the adapter that train and that no gradient has reached; none until one has reached any
        module."""
        training = {name for name, slot in layout.items() if slot.rank > 0 and slot.trainable}
        return frozenset(training - self.reached) if self.reached else frozenset()

    def with_silence(self, observed: Observation) -> Observation:
        """`observed`, with gradients of zero for modules that train and that no backward pass has reached this step, as
        if zeros had come: what is averaged over steps then counts those without a gradient too."""
        samples = {s: t for (_, s), t in observed.measured().items() if s in _SILENCE}
        silent: dict[tuple[str, Signal], Tensor] = {}
        for name, record in observed.items():
            site = self._adapter.sites[name]
            missing = [signal for signal in samples if signal not in record]
            if missing and site.present and site.trainable:
                silent |= {(name, s): _SILENCE[s](site, samples[s]).to(site.A.device) for s in missing}
        return observed.replaced(silent) if silent else observed


def _nonzero(gradients: Iterable[Tensor]) -> Tensor:
    parts = [part(g.coalesce().values() if g.is_sparse else g) for g in gradients]
    return torch.stack([g.any() for g in parts]).any()
