"""Training of gates beside the factors: their parameters, gradients and Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankflow.gating.state import GateState
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.policies.gate import Gate

Params = dict[str, nn.Parameter]
Noise = dict[str, dict[str, Tensor]]


class GateTraining:
    """Parameters of the gates of one adapter, and Adam on them at the learning rates of the factors' optimizer."""

    def __init__(self, adapter: Adapter, optimizer_state: OptimizerState | None, seed: int):
        self.seed = seed
        self._adapter = adapter
        self._optimizer_state = optimizer_state
        self.gate: Gate | None = None
        self.theta: dict[str, Params] = {}
        self.adam: torch.optim.Adam | None = None
        self.rates: list[tuple[int, str]] = []  # of each of Adam's groups: which group it follows, and its key
        self.gradients: dict[str, Tensor] = {}  # dL/d value, by module
        self.steps = 0  # of the factors' optimizer

    @property
    def trained_on(self) -> str:
        return self.gate.trained_on if self.gate is not None else "nothing"

    @property
    def scope(self) -> str | None:
        return self.gate.scope if self.gate is not None else None

    def keep(self, transaction: Transaction) -> None:
        """Undo with `transaction` what is replaced here from now on; not updates of parameters in place."""
        transaction.keep(self, "gate", "theta", "adam", "rates", "gradients", "steps")

    def clear(self) -> None:
        """Forget the gates and what they have learnt."""
        self.gate, self.adam = None, None
        self.theta, self.gradients, self.rates = {}, {}, []

    def collect(
        self,
        drawn: Sequence[tuple[Noise | None, Noise]],
        loss_scale: float,
        average: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        """Make gradients of the parameters from those of draws, `average` them over processes, add the penalty's."""
        assert self.gate is not None
        everything = [p for theta in self.theta.values() for p in theta.values()]
        for p in everything:
            p.grad = None
        reached = False
        for noise, draws in drawn:
            used = [(n, k) for n, draw in draws.items() for k, leaf in draw.items() if leaf.grad is not None]
            if not used:
                continue
            with torch.enable_grad():
                made = self.gate.draw(self.theta, noise)
            reached = True
            if not (used := [(n, k) for n, k in used if made[n][k].requires_grad]):  # what depends on no parameter
                continue
            outputs = [made[n][k] for n, k in used]
            given = [_of(draws[n][k].grad, made[n][k]) / loss_scale for n, k in used]
            found = torch.autograd.grad(outputs, everything, given, allow_unused=True)
            for p, g in zip(everything, found, strict=True):
                if g is not None:
                    g = torch.where(g.isfinite(), g, 0.0)  # a step that the factors survive must not lose the gates
                    p.grad = g if p.grad is None else p.grad + g
        average(everything)
        self._fill_silence()
        self.gradients = {n: t["value"].grad for n, t in self.theta.items() if _graded(t.get("value"))}  # type: ignore[misc]
        if reached:
            self._add_penalty(everything)

    def _fill_silence(self) -> None:
        """Give modules that train and got no gradient one of zeros, if any other has one.

        What shrinks and penalises gates then holds for them too. Frozen modules are no part of training.
        """
        if not any(_graded(p) for theta in self.theta.values() for p in theta.values()):
            return
        for name, theta in self.theta.items():
            if self._adapter.sites[name].trainable and not any(_graded(p) for p in theta.values()):
                for p in theta.values():
                    p.grad = torch.zeros_like(p)

    def _add_penalty(self, everything: Sequence[nn.Parameter]) -> None:
        assert self.gate is not None
        with torch.enable_grad():
            term = self.gate.penalty(self.theta, self.steps + 1)
        if term is None or not term.requires_grad:
            return
        for p, g in zip(everything, torch.autograd.grad(term, everything, allow_unused=True), strict=True):
            if g is not None and p.grad is not None:  # those of frozen modules have none
                p.grad = p.grad + g

    def update(self, step: int) -> None:
        """Take a step of Adam at the rates that the factors have, then the proximal step."""
        assert self.gate is not None
        assert self.adam is not None
        for group, (followed, key) in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = self.gate.rate(key, self._lr(followed))
        trained = {name: theta for name, theta in self.theta.items() if any(_graded(p) for p in theta.values())}
        for theta in trained.values():
            for key, p in theta.items():
                if not self.gate.trains(key, step):
                    p.grad = None
        self.adam.step()
        with torch.no_grad():
            for name, theta in trained.items():
                lr = self.gate.rate("value", self._lr(self._followed(name)))
                for key, t in self.gate.prox(theta, lr, step).items():
                    theta[key].copy_(t)
        self.adam.zero_grad()

    def take_over(self, theta: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over parameters and, where given, Adam's state of them."""
        assert self.gate is not None
        self.theta = {name: {key: nn.Parameter(t) for key, t in of.items()} for name, of in theta.items()}
        groups: dict[tuple[int, str], list[nn.Parameter]] = {}
        for name, params in self.theta.items():
            followed = self._followed(name)
            for key, p in params.items():
                groups.setdefault((followed, key), []).append(p)
        gate = self.gate
        settings: dict[str, Any] = {"betas": gate.betas, "eps": gate.eps, "weight_decay": gate.weight_decay}
        self.adam = torch.optim.Adam([{"params": ps} for ps in groups.values()], lr=0.0, foreach=True, **settings)
        self.rates = list(groups)
        for name, params in self.theta.items():
            for key, p in params.items():
                if entries := state.get(name, {}).get(key):
                    self.adam.state[p] = dict(entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters, and Adam's state of them."""
        assert self.adam is not None
        adam = self.adam.state
        return {
            "theta": {n: {k: p.detach() for k, p in of.items()} for n, of in self.theta.items()},
            "adam": {n: {k: dict(adam[p]) for k, p in of.items() if p in adam} for n, of in self.theta.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of what `state_dict` gave, on the devices of the factors."""
        to = {name: self._adapter.sites[name].A.device for name in state["theta"]}
        theta = {n: {k: t.to(to[n], copy=True) for k, t in of.items()} for n, of in state["theta"].items()}
        adam = {
            n: {
                k: {e: t.clone() if e == "step" else t.to(to[n], copy=True) for e, t in entries.items()}
                for k, entries in of.items()
            }
            for n, of in state["adam"].items()
        }
        self.take_over(theta, adam)

    def _followed(self, name: str) -> int:
        """The place of the optimizer's group that holds the module's A, else its B; loading a state makes new group
        dicts. Of a module that is in none, whose gate does not learn either, the first."""
        assert self._optimizer_state is not None
        site, groups = self._adapter.sites[name], self._optimizer_state.optimizer.param_groups
        places = ((i, p) for p in (site.A, site.B) for i, g in enumerate(groups) if any(p is q for q in g["params"]))
        return next((i for i, _ in places), 0)

    def _lr(self, followed: int) -> float:
        assert self._optimizer_state is not None
        return float(self._optimizer_state.optimizer.param_groups[followed]["lr"])

    def learnt(self, name: str) -> GateState:
        """What the module's gate has learnt, in the tensors it is in."""
        assert self.gate is not None
        assert self.adam is not None
        params = self.theta.get(name, {})
        theta = {key: p.detach() for key, p in params.items()}
        return GateState(self.gate, theta, {key: self.adam.state.get(p, {}) for key, p in params.items()})

    def resume(self, learnt: Mapping[str, GateState]) -> None:
        """Take over what gates have learnt."""
        self.take_over({n: of.theta for n, of in learnt.items()}, {n: of.adam for n, of in learnt.items()})


def _of(gradient: Tensor | None, made: Tensor) -> Tensor:
    """The gradient of what was made, of a draw that may be padded to the capacity (`GatedForward`)."""
    assert gradient is not None
    return gradient if gradient.shape == made.shape else gradient[: len(made)]


def _graded(p: nn.Parameter | None) -> bool:
    return p is not None and p.grad is not None
