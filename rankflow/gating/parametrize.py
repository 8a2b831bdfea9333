"""Show PEFT, wherever it reads a LoRA factor, what a gate makes of it.

The module that holds a factor gets a class of the same name whose `weight` is computed: forward, merging, DoRA's norm
and every kind of layer then see the gated factor, while the Parameter stays where it was, so that `state_dict`,
`named_parameters` and optimizers see the raw one. What is saved as an adapter is the gated one (`save_pretrained`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rankflow.errors import AdapterError
from rankflow.linalg.decompose import Factor
from rankflow.linalg.factor_shapes import canonical_a, canonical_b, stored_b
from rankflow.lora.peft_patches import wrap_merging, wrap_saving
from rankflow.lora.site import Site
from rankflow.policies.gate import Draw, Gate

_FITTED = "_rankflow_fitted"  # attribute of a module that holds factors: parameter name -> Fitted


class Fitted:
    """One factor under a gate. `draw` and `still`, the same without noise, are shared by both factors of a module;
    `draw` is filled anew before forwards."""

    def __init__(self, gate: Gate, factor: Factor, experts: int, draw: dict[str, Tensor], still: dict[str, Tensor]):
        self.gate = gate
        self.factor = factor
        self.experts = experts
        self.draw = draw
        self.still: Draw = still

    def __call__(self, raw: Tensor, draw: Draw | None = None) -> Tensor:
        """The gated factor, in the stored shape of `raw`."""
        draw = self.draw if draw is None else draw
        if self.factor == "A":
            return self.gate.a(draw, canonical_a(raw, self.experts)).reshape(raw.shape)
        return stored_b(self.gate.b(draw, canonical_b(raw, self.experts)), self.experts).reshape(raw.shape)

    def drop_noise(self) -> None:
        """Let forwards read the draw without noise."""
        self.draw.clear()
        self.draw.update(self.still)


class _Gated:
    """A module whose class is replaced by ours while it holds factors under a gate."""


class _GatedWeight(_Gated):
    """The class for `lora_A` and `lora_B` that are a Linear or a convolution."""

    @property
    def weight(self) -> Tensor:
        at: Any = self
        return _through(at.__dict__[_FITTED]["weight"], at._parameters["weight"])


class _GatedEntries(_Gated):
    """For the ParameterDict that holds an embedding's factors, of which some may be under a gate."""

    def __getitem__(self, key: str) -> Tensor:
        at: Any = self
        fitted = at.__dict__[_FITTED].get(key)
        return at._parameters[key] if fitted is None else _through(fitted, at._parameters[key])


def _through(fitted: Fitted, raw: Tensor) -> Tensor:
    """Return a factor as its gate makes it, or the Parameter itself while it is in shards, when no forward runs."""
    return raw if hasattr(raw, "device_mesh") else fitted(raw)


@cache
def _gated(cls: type[nn.Module]) -> Any:
    mixin = _GatedEntries if issubclass(cls, nn.ParameterDict) else _GatedWeight
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def fit(site: Site, gate: Gate, draw: dict[str, Tensor], still: dict[str, Tensor]) -> None:
    """Put a site's factors under `gate`, which reads the two draws; a factor that it leaves alone stays as it is."""
    for factor, (module, name) in site.holders.items():
        if factor == "B" and type(gate).b is Gate.b:
            continue
        fitted = module.__dict__.setdefault(_FITTED, {})
        if not isinstance(module, _Gated):
            module.__class__ = _gated(type(module))
        fitted[name] = Fitted(gate, factor, site.experts, draw, still)
    _still_when_written()


def unfit(module: nn.Module, name: str) -> None:
    """Restore a module that holds a factor to what it was."""
    fitted = module.__dict__.get(_FITTED, {})
    fitted.pop(name, None)
    if not fitted and isinstance(module, _Gated):
        module.__class__ = next(cls for cls in type(module).__mro__ if not issubclass(cls, _Gated))
    if not fitted:
        module.__dict__.pop(_FITTED, None)


def gated(module: nn.Module, name: str, *, still: bool = False, saved: Tensor | None = None) -> Tensor:
    """The factor that `module` holds under `name`, as its gate makes it, `still` without noise; the Parameter itself
    where it has none. Of one that is in shards, what its gate makes of the `saved` one."""
    fitted: Mapping[str, Fitted] = module.__dict__.get(_FITTED, {})
    raw = module._parameters[name]
    assert raw is not None
    if saved is not None and hasattr(raw, "device_mesh"):
        return fitted[name](saved, fitted[name].still)
    return fitted[name](raw, fitted[name].still if still else None) if name in fitted else raw


def refuse_gates(sites: Iterable[Site]) -> None:
    """Raise AdapterError where factors are under a gate, which a change made from outside would no longer fit."""
    for site in sites:
        if site.present and any(name in module.__dict__.get(_FITTED, ()) for module, name in site.holders.values()):
            raise AdapterError(
                f"{site.name} is under the gate of a run that is not over; call its flow.finish() or "
                "flow.detach() first, or rankflow.detach(model) if you do not have it any more"
            )


# -- the same without gates ------------------------------------------------------------------------------------------


@torch.no_grad()
def as_used(model: nn.Module) -> Iterator[Tensor]:
    """Yield `model.parameters()`, with factors under a gate as forwards use them without noise."""
    under = {key: (module, name) for key, module, name in _fitted_parameters(model)}
    for key, p in model.named_parameters():
        yield gated(*under[key], still=True) if key in under else p


@torch.no_grad()
def ungate(model: nn.Module) -> None:
    """Write what gates make of factors into the factors, and take the gates off. This is for copies that no run
    manages."""
    for _, module, name in list(_fitted_parameters(model)):
        raw = module._parameters[name]
        assert raw is not None
        raw.copy_(gated(module, name, still=True))
        unfit(module, name)


# -- saving and merging -----------------------------------------------------------------------------------------------


def _fitted_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for name in module.__dict__.get(_FITTED, ()):
            yield f"{path}.{name}", module, name


@cache
def _still_when_written() -> None:
    """Let adapters be saved and merged as plain LoRA that computes what the gated model does."""
    wrap_saving(_without_gates)
    wrap_merging(_without_noise)


def _without_gates(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """`state`, or the model's own, with factors as their gates make them; None for a model without gates."""
    found = list(_fitted_parameters(model))
    if not found:
        return None
    state = dict(state or model.state_dict())
    with torch.no_grad():
        state |= {
            key: gated(module, name, still=True, saved=state[key]).detach()
            for key, module, name in found
            if key in state
        }
    return state


def _without_noise(model: nn.Module) -> None:
    for _, module, name in _fitted_parameters(model):
        module.__dict__[_FITTED][name].drop_noise()
