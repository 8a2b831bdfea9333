"""Gates on a live adapter: installs them, trains them beside the factors, takes them through resizes, folds them.

A forward pass uses *draws*: leaf tensors made from a gate's parameters (and noise) beforehand. Their gradients are
handed on to the parameters when the micro-batches of a step are done, so that gradient checkpointing of either kind,
several forwards before one backward and noise that differs between micro-batches all come out right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.errors import OptimizerError, PlanError
from rankflow.gating.parametrize import fit, gated, unfit
from rankflow.gating.state import GateState
from rankflow.linalg.decompose import Factor
from rankflow.linalg.random import keyed_generator
from rankflow.lora.adapter import Adapter
from rankflow.lora.site import Site
from rankflow.lora.transaction import Transaction
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.plans.layout import Slot
from rankflow.plans.ops import Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.policies.gate import Gate
from rankflow.policies.observation import Lazy, Signal

Params = dict[str, nn.Parameter]
Noise = dict[str, dict[str, Tensor]]
_FACTORS: tuple[Factor, Factor] = ("A", "B")
_KEPT = ("gate", "_theta", "_adam", "_rates", "_gradient", "_stored", "_step", "_micro")  # what draws are made from


class Gates:
    """The gates of one adapter; none until `install`, none again after `fold`.

    The controller calls `collect` when gradients are ready and `step` after each real optimizer step.

    Args:
        adapter: whose modules are gated.
        optimizer_state: the optimizer of the factors, whose learning rates gates follow.
        seed: of initial values and noise, together with step and module.
    """

    def __init__(self, adapter: Adapter, optimizer_state: OptimizerState | None, seed: int = 0):
        self.seed = seed
        self.gate: Gate | None = None
        self._adapter = adapter
        self._optimizer_state = optimizer_state
        self._theta: dict[str, Params] = {}
        self._adam: torch.optim.Adam | None = None
        self._rates: list[tuple[int, str]] = []  # of each of Adam's groups: which group it follows, and its key
        self._live: Noise = {}  # what forwards read now; the dicts are those that the fitted factors hold
        self._still: Noise = {}  # the last ones without noise: what is saved and merged
        self._drawn: list[tuple[Noise | None, Noise]] = []  # (noise, leaves) of every draw since the last step
        self._gradient: dict[str, Tensor] = {}
        self._step = 0  # optimizer steps done
        self._micro = 0  # noisy draws since the last step
        self._noisy = False
        self._hook: Any = None
        self._stored: dict[str, dict[str, Tensor]] = {}  # of the gates folded last
        self.average_gradients: Callable[[Sequence[nn.Parameter]], None] = lambda parameters: None  # over processes

    def __bool__(self) -> bool:
        return self.gate is not None

    @property
    def trained_on(self) -> str:
        return self.gate.trained_on if self.gate is not None else "nothing"

    @property
    def scope(self) -> str | None:
        return self.gate.scope if self.gate is not None else None

    # -- coming and going -------------------------------------------------------------------------------------------

    def install(self, gate: Gate, step: int = 0, transaction: Transaction | None = None) -> None:
        """Put every module that is in the adapter under `gate`, with fresh parameters."""
        if self._optimizer_state is None:
            raise OptimizerError("gates are trained beside the factors and need their optimizer")
        if any(group["lr"] is None for group in self._optimizer_state.optimizer.param_groups):
            raise OptimizerError(
                "gates follow the optimizer's learning rate and it has none of its own (Adafactor with relative_step); "
                "give it a learning rate"
            )
        with Transaction(transaction) as transaction:
            self._remember(transaction)
            self.gate, self._step = gate, step
            self._train(
                {n: self._fresh(n, site, site.slot()) for n, site in self._adapter.sites.items() if site.present}, {}
            )
            self._refit()

    def fold(self, transaction: Transaction | None = None) -> dict[str, dict[str, float]]:
        """Write what the gates make of the factors into them, and take the gates off; what they report, by module.

        The function stays. So does the direction of the optimizer's next step of each entry: with A' = diag(v) A the
        gradient of A' is that of A over v, and moments follow it. What a gate closed has an A of 0 from then on.
        """
        if self.gate is None:
            return {}
        reports = {name: dict(self.gate.report(theta)) for name, theta in self._theta.items()}
        stored = self.stored()
        with Transaction(transaction) as transaction, torch.no_grad():
            self._remember(transaction)
            self._draw(None)  # the last forward may have been one with noise
            for name in self._theta:
                site = self._adapter.sites[name]
                self._fold_site(transaction, site, self.gate.value(self._live[name])[: site.rank])
            self.remove()
            self._stored = stored
        return {name: report for name, report in reports.items() if report}

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """The form in which gates want the factors kept (see `Gate.stored`), by module: of the gates that are there,
        else of those that were folded last."""
        if self.gate is None:
            return self._stored
        with torch.no_grad():
            forms = {n: self.gate.stored(t, *self._factors(n)) for n, t in self._theta.items()}
        return {name: form for name, form in forms.items() if form}

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A module's factors without the gate, canonical."""
        site = self._adapter.sites[name]
        return site.a().detach(), site.b().detach()

    def remove(self) -> None:
        """Take the gates off; factors stay as they are without them."""
        self.gate, self._adam = None, None
        self._theta, self._gradient, self._rates = {}, {}, []
        self._refit()

    def _remember(self, transaction: Transaction, values: Callable[[], None] = lambda: None) -> None:
        """What follows is undone with `transaction`; of updates of parameters in place that is for `values` to do."""
        self.follow(transaction)
        transaction.undo(values)
        transaction.keep(self, *_KEPT)

    def follow(self, transaction: Transaction) -> None:
        """Put factors under the gates there are then, once what is written to `transaction` from here on is undone."""
        transaction.undo(self._refit)

    def _fold_site(self, transaction: Transaction, site: Site, value: Tensor) -> None:
        for factor, (module, name) in site.holders.items():
            p = module._parameters[name]
            assert p is not None
            new, old = gated(module, name).detach().clone(), p.detach().clone()
            if torch.equal(new, old):
                continue
            transaction.write(lambda p=p, new=new: p.data.copy_(new), lambda p=p, old=old: p.data.copy_(old))
            if factor == "A" and self._optimizer_state is not None:
                self._optimizer_state.rescale(transaction, site, value)

    def _fresh(self, name: str, site: Site, slot: Slot) -> dict[str, Tensor]:
        assert self.gate is not None
        made = self.gate.init(slot, keyed_generator(self.seed, self._step, name, "gate"))
        made = {key: t.float().to(site.A.device) for key, t in made.items()}
        return {**made, **self.gate.calibrate(made, *self._factors(name))}

    # -- what forwards see ------------------------------------------------------------------------------------------

    def _refit(self) -> None:
        """Let exactly the modules that have a gate be under it, in deterministic state, and noise come to forwards."""
        self._live, self._still, self._drawn = {n: {} for n in self._theta}, {n: {} for n in self._theta}, []
        for name, site in self._adapter.sites.items():
            if self.gate is not None and name in self._theta:
                fit(site, self.gate, self._live[name], self._still[name])
            elif site.has_factors or site.kind == "embedding":
                for module, key in site.holders.values():
                    unfit(module, key)
        noisy = self.gate is not None and type(self.gate).noise is not Gate.noise
        if noisy and self._hook is None:
            # Noise must be there before the forward that uses it, and not be drawn again when a checkpoint recomputes.
            # A compiled forward must not take the hook into its graph
            before: Any = torch.compiler.disable(self._before_forward)
            self._hook = self._adapter.model.register_forward_pre_hook(before)
        elif not noisy and self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.gate is not None:
            self._draw(None)

    def _draw(self, noise: Noise | None, *, outer: bool = False) -> None:
        assert self.gate is not None
        wanted = self.gate.trained_on == ("outer" if outer else "inner")
        with torch.no_grad():
            made = self.gate.draw(self._theta, noise)
        for name, draw in made.items():
            draw = self._padded(name, draw)
            trained = wanted and self._adapter.sites[name].trainable
            leaves = {key: t.detach().clone().requires_grad_(trained) for key, t in draw.items()}
            for current in (self._live[name], *([self._still[name]] if noise is None else [])):
                current.clear()
                current.update(leaves)
        if wanted:
            self._drawn.append((noise, {name: dict(draw) for name, draw in self._live.items()}))
        self._noisy = noise is not None

    def _padded(self, name: str, draw: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`draw` for as many directions as the capacity of the factors: values beyond the rank are 0."""
        site = self._adapter.sites[name]
        if self.scope != "component" or not site.masked:
            return draw
        return {**draw, "value": F.pad(draw["value"], (0, site.capacity - site.rank))}

    def _drop_noise(self) -> None:
        """Deterministic draws of the parameters as they are now, where there may be others."""
        if self._noisy or self.trained_on != "nothing":
            self._draw(None)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        assert self.gate is not None
        if module.training and torch.is_grad_enabled() and self.gate.noisy(self._step + 1) and not self._merged():
            noise = {}
            for name, theta in self._theta.items():
                random = keyed_generator(self.seed, self._step, self._micro, name, "noise")
                made = self.gate.noise(theta, random)
                noise[name] = {k: t.to(self._adapter.sites[name].A.device) for k, t in made.items()}
            self._micro += 1
            self._draw(noise)
        elif self._noisy:
            self._draw(None)

    def fall_silent(self) -> None:
        """Nobody trains them any more: forwards see them as they are, without noise, and are not noted."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._draw(None)
        self._drawn = []

    def _merged(self) -> bool:
        """Whether the base weights hold the adapter: taking it out again needs the very factors that went in."""
        return any(getattr(site.layer, "merged", False) for site in self._adapter.sites.values() if site.present)

    def values(self) -> dict[str, Tensor]:
        """Deterministic v of every module, ``[r]`` or ``[1]``."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            made = self.gate.draw(self._theta, None)
            return {name: self.gate.value(draw).detach().clone() for name, draw in made.items()}

    def opened(self) -> dict[str, Tensor]:
        """Which of them are on, bool."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            return {name: self.gate.open(theta) for name, theta in self._theta.items()}

    def scores(self) -> dict[str, Tensor]:
        """What they rank by."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            return {name: self.gate.score(theta) for name, theta in self._theta.items()}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """dL/d value of the modules that the last collected step reached, loss scale undone."""
        return self._gradient

    def signals(self, wanted: frozenset[Signal], names: Iterable[str]) -> dict[str, dict[Signal, Lazy]]:
        """What gates say of the modules `names`: values as they are when read, by when there may be gates, and
        `gradients` as they are now."""
        readers = {Signal.GATE: self.values, Signal.GATE_OPEN: self.opened, Signal.GATE_SCORE: self.scores}
        readers = {signal: cache(read) for signal, read in readers.items() if signal in wanted}
        found: dict[str, dict[Signal, Lazy]] = {
            name: {signal: lambda read=read, name=name: read()[name] for signal, read in readers.items()}
            for name in names
        }
        if Signal.GATE_GRAD in wanted:
            for name in found.keys() & self._gradient.keys():
                found[name][Signal.GATE_GRAD] = self._gradient[name]
        return found

    # -- training ---------------------------------------------------------------------------------------------------

    def collect(self, loss_scale: float = 1.0) -> None:
        """Backward is done: make gradients of the parameters from those of the draws, and forget the draws."""
        if self.gate is None:
            return
        drawn, self._drawn = self._drawn, []
        everything = [p for theta in self._theta.values() for p in theta.values()]
        for p in everything:
            p.grad = None
        reached = False
        for noise, draws in drawn:
            used = [(n, k) for n, draw in draws.items() for k, leaf in draw.items() if leaf.grad is not None]
            if not used:
                continue
            with torch.enable_grad():
                made = self.gate.draw(self._theta, noise)
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
        self.average_gradients(everything)
        self._fill_silence()
        self._gradient = {n: t["value"].grad for n, t in self._theta.items() if _graded(t.get("value"))}  # type: ignore[misc]
        if reached:
            self._add_penalty(everything)
        self._drop_noise()

    def _fill_silence(self) -> None:
        """Modules that train and that no gradient reached have one of zeros, where others have one: what shrinks and
        penalises gates holds for them too, and nothing holds against it. Frozen ones are no part of training."""
        if not any(_graded(p) for theta in self._theta.values() for p in theta.values()):
            return
        for name, theta in self._theta.items():
            if self._adapter.sites[name].trainable and not any(_graded(p) for p in theta.values()):
                for p in theta.values():
                    p.grad = torch.zeros_like(p)

    def _add_penalty(self, everything: Sequence[nn.Parameter]) -> None:
        assert self.gate is not None
        with torch.enable_grad():
            term = self.gate.penalty(self._theta, self._step + 1)
        if term is None or not term.requires_grad:
            return
        for p, g in zip(everything, torch.autograd.grad(term, everything, allow_unused=True), strict=True):
            if g is not None and p.grad is not None:  # those of frozen modules have none
                p.grad = p.grad + g

    def step(self) -> None:
        """The factors' optimizer has stepped: so do gates that are trained with it, then their proximal step."""
        self._step += 1
        self._micro = 0
        if self.gate is not None:
            if self.gate.trained_on == "inner":
                self._update(self._step)
            self._drop_noise()

    def outer_step(self, loss: Callable[[], Tensor], step: int, transaction: Transaction | None = None) -> Tensor:
        """One update of gates that are trained on held-out data; of the factors nothing changes, not even `.grad`."""
        assert self.gate is not None
        if transaction is not None:
            before = {name: self._learnt(name).copy() for name in self._theta}
            self._remember(transaction, lambda: self._resume(before))
        self._drawn = []
        self._draw(None, outer=True)
        leaves = [leaf for draw in self._live.values() for leaf in draw.values() if leaf.requires_grad]
        with torch.enable_grad():
            value = loss()
            for leaf, g in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
                leaf.grad = g
        self.collect()
        self._update(step)
        self._draw(None)
        return value.detach()

    def _update(self, step: int) -> None:
        assert self.gate is not None
        assert self._adam is not None
        for group, (followed, key) in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = self.gate.rate(key, self._lr(followed))
        trained = {name: theta for name, theta in self._theta.items() if any(_graded(p) for p in theta.values())}
        for theta in trained.values():
            for key, p in theta.items():
                if not self.gate.trains(key, step):
                    p.grad = None
        self._adam.step()
        with torch.no_grad():
            for name, theta in trained.items():
                lr = self.gate.rate("value", self._lr(self._followed(name)))
                for key, t in self.gate.prox(theta, lr, step).items():
                    theta[key].copy_(t)
        self._adam.zero_grad()

    def _train(self, theta: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over parameters and, where given, Adam's state of them."""
        assert self.gate is not None
        self._theta = {name: {key: nn.Parameter(t) for key, t in of.items()} for name, of in theta.items()}
        groups: dict[tuple[int, str], list[nn.Parameter]] = {}
        for name, params in self._theta.items():
            followed = self._followed(name)
            for key, p in params.items():
                groups.setdefault((followed, key), []).append(p)
        gate = self.gate
        settings: dict[str, Any] = {"betas": gate.betas, "eps": gate.eps, "weight_decay": gate.weight_decay}
        self._adam = torch.optim.Adam([{"params": ps} for ps in groups.values()], lr=0.0, foreach=True, **settings)
        self._rates = list(groups)
        for name, params in self._theta.items():
            for key, p in params.items():
                if entries := state.get(name, {}).get(key):
                    self._adam.state[p] = dict(entries)

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

    # -- resizes ----------------------------------------------------------------------------------------------------

    def check(self, plan: RankPlan) -> None:
        """Raise PlanError if `plan` mixes directions that have gates of their own, or opens gates that it cannot."""
        opens = self.gate is not None and self.scope == "component" and "value" in self.gate.per_direction
        for name, ops in plan.ops.items():
            for op in ops:
                if isinstance(op, Refactor) and name in self._theta and not op.diagonal:
                    raise PlanError(
                        f"{name}: plan mixes the directions of a module under a gate; only Keep, Grow, Open, Drop and "
                        "a diagonal Refactor fit there. Let the phase that has the gate end first: its gates are "
                        "folded then"
                    )
                if isinstance(op, Open) and not opens:
                    raise PlanError(
                        f"{name}: plan opens gates, but its phase has none of a value of its own for each direction"
                    )

    def write(self, transaction: Transaction, plan: RankPlan, slots: Mapping[str, Slot]) -> None:
        """Let gates follow a plan whose factors are in place; `slots` are those after it."""
        if self.gate is None:
            return
        learnt = {name: self._learnt(name) for name in self._adapter.sites if name in self._theta or name in plan.ops}
        for name, ops in plan.ops.items():
            learnt[name] = learnt[name].through(ops, partial(self._directions, name, slots[name]))
        learnt = {name: of for name, of in learnt.items() if slots[name].rank}
        transaction.keep(self, "_theta", "_adam", "_rates")  # `_train` makes new ones
        self._resume(learnt)
        self._refit()

    def _resume(self, learnt: Mapping[str, GateState]) -> None:
        self._train({n: of.theta for n, of in learnt.items()}, {n: of.adam for n, of in learnt.items()})

    def _directions(self, name: str, slot: Slot, n: int) -> dict[str, Tensor]:
        """Parameters of `n` new ones."""
        site = self._adapter.sites[name]
        return self._fresh(name, site, replace(slot, rank=n)) if site.present else {}

    def _learnt(self, name: str) -> GateState:
        assert self.gate is not None
        assert self._adam is not None
        params = self._theta.get(name, {})
        theta = {key: p.detach() for key, p in params.items()}
        return GateState(self.gate, theta, {key: self._adam.state.get(p, {}) for key, p in params.items()})

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Parameters, Adam's state of them, and the raw factors: what is saved as an adapter is folded."""
        if self.gate is None or self._adam is None:
            return {}
        adam = self._adam.state
        return {
            "theta": {n: {k: p.detach() for k, p in of.items()} for n, of in self._theta.items()},
            "adam": {n: {k: dict(adam[p]) for k, p in of.items() if p in adam} for n, of in self._theta.items()},
            "raw": {n: {f: getattr(self._adapter.sites[n], f).detach() for f in _FACTORS} for n in self._theta},
        }

    def load_state_dict(self, state: Mapping[str, Any], gate: Gate | None, step: int, transaction: Transaction) -> None:
        """Go on from `state_dict` under `gate`, on an adapter that has the checkpoint's (folded) factors."""
        self._remember(transaction)
        self.remove()
        self._step, self._micro = step, 0
        if gate is None or not state:
            return
        self.install(gate, step, transaction)
        for name, factors in state["raw"].items():
            for factor, raw in factors.items():
                transaction.tensor(getattr(self._adapter.sites[name], factor), raw)
        to = {name: self._adapter.sites[name].A.device for name in state["theta"]}
        theta = {n: {k: t.to(to[n], copy=True) for k, t in of.items()} for n, of in state["theta"].items()}
        adam = {
            n: {
                k: {e: t.clone() if e == "step" else t.to(to[n], copy=True) for e, t in entries.items()}
                for k, entries in of.items()
            }
            for n, of in state["adam"].items()
        }
        self._train(theta, adam)
        self._refit()


def _of(gradient: Tensor | None, made: Tensor) -> Tensor:
    """The gradient of what was made, of a draw that may be padded to the capacity (`Gates._padded`)."""
    assert gradient is not None
    return gradient if gradient.shape == made.shape else gradient[: len(made)]


def _graded(p: nn.Parameter | None) -> bool:
    return p is not None and p.grad is not None
