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

from rankflow.errors import OptimizerError, PlanError
from rankflow.gating.forward import GatedForward
from rankflow.gating.parametrize import gated
from rankflow.gating.training import GateTraining
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

_FACTORS: tuple[Factor, Factor] = ("A", "B")


class Gates:
    """The gates of one adapter; none until `install`, none again after `fold`.

    The controller calls `collect` when gradients are ready and `step` after each real optimizer step.

    Args:
        adapter: whose modules are gated.
        optimizer_state: the optimizer of the factors, whose learning rates gates follow.
        seed: of initial values and noise, together with step and module.
    """

    def __init__(self, adapter: Adapter, optimizer_state: OptimizerState | None, seed: int = 0):
        self._adapter = adapter
        self._optimizer_state = optimizer_state
        self._training = GateTraining(adapter, optimizer_state, seed)
        self._forward = GatedForward(adapter, self._training)
        self._stored: dict[str, dict[str, Tensor]] = {}  # of the gates folded last
        self.average_gradients: Callable[[Sequence[nn.Parameter]], None] = lambda parameters: None  # over processes

    def __bool__(self) -> bool:
        return self.gate is not None

    @property
    def gate(self) -> Gate | None:
        """The gate that modules are under."""
        return self._training.gate

    @property
    def seed(self) -> int:
        return self._training.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._training.seed = seed

    @property
    def trained_on(self) -> str:
        return self._training.trained_on

    @property
    def scope(self) -> str | None:
        return self._training.scope

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
            self._training.gate, self._training.steps = gate, step
            self._training.take_over(
                {n: self._fresh(n, site, site.slot()) for n, site in self._adapter.sites.items() if site.present}, {}
            )
            self._forward.refit()

    def fold(self, transaction: Transaction | None = None) -> dict[str, dict[str, float]]:
        """Write what the gates make of the factors into the factors, take the gates off, and return their reports by
        module.

        The function stays. So does the direction of the optimizer's next step of each entry: with A' = diag(v) A the
        gradient of A' is that of A over v, and moments follow it. What a gate closed has an A of 0 from then on.
        """
        if self.gate is None:
            return {}
        reports = {name: dict(self.gate.report(theta)) for name, theta in self._training.theta.items()}
        stored = self.stored()
        with Transaction(transaction) as transaction, torch.no_grad():
            self._remember(transaction)
            self._forward.draw(None)  # the last forward may have been one with noise
            for name in self._training.theta:
                site = self._adapter.sites[name]
                self._fold_site(transaction, site, self.gate.value(self._forward.live[name])[: site.rank])
            self.remove()
            self._stored = stored
        return {name: report for name, report in reports.items() if report}

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """The form in which gates want the factors kept (see `Gate.stored`), by module: of the gates that are there,
        else of those that were folded last."""
        if self.gate is None:
            return self._stored
        with torch.no_grad():
            forms = {n: self.gate.stored(t, *self._factors(n)) for n, t in self._training.theta.items()}
        return {name: form for name, form in forms.items() if form}

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a module's factors without the gate, canonical."""
        site = self._adapter.sites[name]
        return site.a().detach(), site.b().detach()

    def remove(self) -> None:
        """Take the gates off; factors stay as they are without them."""
        self._training.clear()
        self._forward.refit()

    def _remember(self, transaction: Transaction, values: Callable[[], None] = lambda: None) -> None:
        """Let `transaction` undo what follows; `values` do that for updates of parameters in place."""
        self.follow(transaction)
        transaction.undo(values)
        self._training.keep(transaction)
        transaction.keep(self._forward, "micro")
        transaction.keep(self, "_stored")

    def follow(self, transaction: Transaction) -> None:
        """Let a rollback of `transaction` put factors under the gates that are there then."""
        transaction.undo(self._forward.refit)

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
        made = self.gate.init(slot, keyed_generator(self.seed, self._training.steps, name, "gate"))
        made = {key: t.float().to(site.A.device) for key, t in made.items()}
        return {**made, **self.gate.calibrate(made, *self._factors(name))}

    # -- what forwards see ------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """Return the deterministic v of every module, ``[r]`` or ``[1]``."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            made = self.gate.draw(self._training.theta, None)
            return {name: self.gate.value(draw).detach().clone() for name, draw in made.items()}

    def opened(self) -> dict[str, Tensor]:
        """Return which of the gates are on, bool."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            return {name: self.gate.open(theta) for name, theta in self._training.theta.items()}

    def scores(self) -> dict[str, Tensor]:
        """Return the scores that gates rank by."""
        if self.gate is None:
            return {}
        with torch.no_grad():
            return {name: self.gate.score(theta) for name, theta in self._training.theta.items()}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Return dL/d value of the modules that the last collected step reached, with the loss scale undone."""
        return self._training.gradients

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
            for name in found.keys() & self._training.gradients.keys():
                found[name][Signal.GATE_GRAD] = self._training.gradients[name]
        return found

    # -- training ---------------------------------------------------------------------------------------------------

    def collect(self, loss_scale: float = 1.0) -> None:
        """Make gradients of the gates' parameters from those of the draws, after backward, and forget the draws."""
        if self.gate is None:
            return
        drawn, self._forward.drawn = self._forward.drawn, []
        self._training.collect(drawn, loss_scale, self.average_gradients)
        self._forward.drop_noise()

    def fall_silent(self) -> None:
        """Stop training the gates: forwards see them as they are, without noise, and are not noted."""
        self._forward.fall_silent()

    def step(self) -> None:
        """Step the gates that are trained with the factors, after the factors' optimizer, then take their proximal
        step."""
        self._training.steps += 1
        self._forward.micro = 0
        if self.gate is not None:
            if self.gate.trained_on == "inner":
                self._training.update(self._training.steps)
            self._forward.drop_noise()

    def outer_step(self, loss: Callable[[], Tensor], step: int, transaction: Transaction | None = None) -> Tensor:
        """Update gates that are trained on held-out data. The factors do not change, nor do their `.grad`."""
        assert self.gate is not None
        if transaction is not None:
            before = {name: self._training.learnt(name).copy() for name in self._training.theta}
            self._remember(transaction, lambda: self._training.resume(before))
        self._forward.drawn = []
        self._forward.draw(None, outer=True)
        leaves = [leaf for draw in self._forward.live.values() for leaf in draw.values() if leaf.requires_grad]
        with torch.enable_grad():
            value = loss()
            for leaf, g in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
                leaf.grad = g
        self.collect()
        self._training.update(step)
        self._forward.draw(None)
        return value.detach()

    # -- resizes ----------------------------------------------------------------------------------------------------

    def check(self, plan: RankPlan) -> None:
        """Raise PlanError if `plan` mixes directions that have gates of their own, or opens gates that it cannot."""
        opens = self.gate is not None and self.scope == "component" and "value" in self.gate.per_direction
        for name, ops in plan.ops.items():
            for op in ops:
                if isinstance(op, Refactor) and name in self._training.theta and not op.diagonal:
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
        """Carry the gates through a plan whose factors are in place; `slots` are those after it."""
        if self.gate is None:
            return
        concerned = {*self._training.theta, *plan.ops}
        learnt = {name: self._training.learnt(name) for name in self._adapter.sites if name in concerned}
        for name, ops in plan.ops.items():
            learnt[name] = learnt[name].through(ops, partial(self._directions, name, slots[name]))
        learnt = {name: of for name, of in learnt.items() if slots[name].rank}
        transaction.keep(self._training, "theta", "adam", "rates")
        self._training.resume(learnt)
        self._forward.refit()

    def _directions(self, name: str, slot: Slot, n: int) -> dict[str, Tensor]:
        """Return the gate's parameters of `n` new directions."""
        site = self._adapter.sites[name]
        return self._fresh(name, site, replace(slot, rank=n)) if site.present else {}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters, Adam's state of them and the raw factors, as the saved adapter has folded ones."""
        if self.gate is None:
            return {}
        raw = {n: {f: getattr(self._adapter.sites[n], f).detach() for f in _FACTORS} for n in self._training.theta}
        return {**self._training.state_dict(), "raw": raw}

    def load_state_dict(self, state: Mapping[str, Any], gate: Gate | None, step: int, transaction: Transaction) -> None:
        """Go on from `state_dict` under `gate`, on an adapter that has the checkpoint's (folded) factors."""
        self._remember(transaction)
        self.remove()
        self._training.steps, self._forward.micro = step, 0
        if gate is None or not state:
            return
        self.install(gate, step, transaction)
        for name, factors in state["raw"].items():
            for factor, raw in factors.items():
                transaction.tensor(getattr(self._adapter.sites[name], factor), raw)
        self._training.load_state_dict(state)
        self._forward.refit()
