"""What forwards of an adapter under gates read: leaf tensors made from the gates' parameters, and noise, beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.gating.parametrize import fit, unfit
from rankflow.gating.training import GateTraining, Noise
from rankflow.linalg.random import keyed_generator
from rankflow.lora.adapter import Adapter
from rankflow.policies.gate import Gate


class GatedForward:
    """The draws that forwards of one adapter read, and the hook that brings noise to them."""

    def __init__(self, adapter: Adapter, training: GateTraining):
        self._adapter = adapter
        self._training = training
        self.live: Noise = {}  # what forwards read now; the dicts are those that the fitted factors hold
        self._still: Noise = {}  # the last ones without noise: what is saved and merged
        self.drawn: list[tuple[Noise | None, Noise]] = []  # (noise, leaves) of every draw since the last step
        self.micro = 0  # noisy draws since the last step
        self._noisy = False
        self._hook: Any = None

    def refit(self) -> None:
        """Put exactly the modules that have a gate under it, without noise, and let forwards draw noise."""
        gate, theta = self._training.gate, self._training.theta
        self.live, self._still, self.drawn = {n: {} for n in theta}, {n: {} for n in theta}, []
        for name, site in self._adapter.sites.items():
            if gate is not None and name in theta:
                fit(site, gate, self.live[name], self._still[name])
            elif site.has_factors or site.kind == "embedding":
                for module, key in site.holders.values():
                    unfit(module, key)
        noisy = gate is not None and type(gate).noise is not Gate.noise
        if noisy and self._hook is None:
            # Noise must be there before the forward that uses it, and not be drawn again when a checkpoint recomputes.
            # A compiled forward must not take the hook into its graph
            before: Any = torch.compiler.disable(self._before_forward)
            self._hook = self._adapter.model.register_forward_pre_hook(before)
        elif not noisy and self._hook is not None:
            self._hook.remove()
            self._hook = None
        if gate is not None:
            self.draw(None)

    def draw(self, noise: Noise | None, *, outer: bool = False) -> None:
        """Make the leaves that forwards read, of parameters and `noise`; note them where gates are trained on that."""
        gate = self._training.gate
        assert gate is not None
        wanted = gate.trained_on == ("outer" if outer else "inner")
        with torch.no_grad():
            made = gate.draw(self._training.theta, noise)
        for name, draw in made.items():
            draw = self._padded(name, draw)
            trained = wanted and self._adapter.sites[name].trainable
            leaves = {key: t.detach().clone().requires_grad_(trained) for key, t in draw.items()}
            for current in (self.live[name], *([self._still[name]] if noise is None else [])):
                current.clear()
                current.update(leaves)
        if wanted:
            self.drawn.append((noise, {name: dict(draw) for name, draw in self.live.items()}))
        self._noisy = noise is not None

    def _padded(self, name: str, draw: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`draw` for as many directions as the capacity of the factors: values beyond the rank are 0."""
        site = self._adapter.sites[name]
        if self._training.scope != "component" or not site.masked:
            return draw
        return {**draw, "value": F.pad(draw["value"], (0, site.capacity - site.rank))}

    def drop_noise(self) -> None:
        """Make deterministic draws of the parameters as they are now, if there may be others."""
        if self._noisy or self._training.trained_on != "nothing":
            self.draw(None)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        training, gate = self._training, self._training.gate
        assert gate is not None
        if module.training and torch.is_grad_enabled() and gate.noisy(training.steps + 1) and not self._merged():
            noise = {}
            for name, theta in training.theta.items():
                random = keyed_generator(training.seed, training.steps, self.micro, name, "noise")
                made = gate.noise(theta, random)
                noise[name] = {k: t.to(self._adapter.sites[name].A.device) for k, t in made.items()}
            self.micro += 1
            self.draw(noise)
        elif self._noisy:
            self.draw(None)

    def fall_silent(self) -> None:
        """Stop training the gates: forwards see them as they are, without noise, and are not noted."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.draw(None)
        self.drawn = []

    def _merged(self) -> bool:
        """Return whether the adapter is merged into the base weights; taking it out needs the same factors that went
        in."""
        return any(getattr(site.layer, "merged", False) for site in self._adapter.sites.values() if site.present)
