"""SoRA: a gate on every direction, pulled to zero by a proximal step; what stays at zero is taken out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import direction_sizes, prune
from rankflow.policies._shrinking import Lowering
from rankflow.policies.base import State
from rankflow.policies.gate import Draw, Gate, Theta
from rankflow.policies.observation import Observation, Signal

Prox = Literal["soft", "official"]
Threshold = Literal["lr_scaled", "absolute"]
Sparsify = Literal["linear", "log_linear", "exp_linear"]


@dataclass(frozen=True, kw_only=True)
class SoraGate(Gate):
    """g of DeltaW = scaling * B diag(g) A, with its own Adam and, after each of its steps, a shrinkage towards zero.

    `xi` are the thresholds by step from `begin` on, before the learning rate comes in.
    """

    prox_rule: Prox = "soft"
    threshold: Threshold = "lr_scaled"
    xi: tuple[tuple[int, float], ...] = ((0, 0.0),)  # (from this step on, threshold)
    l1: float = 0.0
    start: Literal["ones", "randn"] = "ones"
    remove_after: int = 0

    per_direction: ClassVar[frozenset[str]] = frozenset({"value", "zero_for"})

    def init(self, slot: Slot, generator: torch.Generator) -> dict[str, Tensor]:
        ones = self.start == "ones"
        value = torch.ones(slot.rank) if ones else torch.randn(slot.rank, generator=generator)
        return {"value": value, "zero_for": torch.zeros(slot.rank)}

    def draw_one(self, theta: Theta, noise: Draw | None) -> dict[str, Tensor]:
        return {"value": theta["value"]}

    def trains(self, key: str, step: int) -> bool:
        return key == "value"

    def penalty(self, theta: Mapping[str, Theta], step: int) -> Tensor | None:
        """l1 times the mean of |g| over all gates."""
        if self.l1 == 0:
            return None
        entries = sum(len(t["value"]) for t in theta.values())
        terms = [t["value"].abs().sum() for t in theta.values()]
        return self.l1 / entries * torch.stack([t.to(terms[0].device) for t in terms]).sum()

    def prox(self, theta: Theta, lr: float, step: int) -> Theta:
        """Soft threshold; `official` first shrinks, then zeroes what is below the threshold by then."""
        xi = max((at for at in self.xi if at[0] <= step), default=self.xi[0])[1]
        xi *= lr if self.threshold == "lr_scaled" else 1.0
        g = theta["value"]
        if self.prox_rule == "soft":
            g = g.sign() * (g.abs() - xi).clamp(min=0)
        else:
            g = torch.where(g > xi, g - xi, torch.where(g < -xi, g + xi, g))
            g = torch.where(g.abs() < xi, 0.0, g)
        return {"value": g, "zero_for": torch.where(g == 0, theta["zero_for"] + 1, 0.0)}

    def open(self, theta: Theta) -> Tensor:
        """False once a gate has been zero for `remove_after` steps; until then it may revive."""
        return (theta["value"] != 0) | (theta["zero_for"] <= self.remove_after)


@dataclass(frozen=True, kw_only=True)
class Sora(Lowering):
    """SoRA (arXiv 2311.11696): gates g trained with an L1 proximal step, g <- T_xi(g - lr * adam(dL/dg)).

    T_xi(v) = sign(v) max(|v| - xi, 0), with xi = lr * lam. Directions whose gate is zero are physically removed at
    due steps. With a budget, the total also comes down along `shape` to it: at every due step the directions of least
    scaling |g| |a| |b| go.

    When to use: directions should be found that are not needed at all, with or without a budget. Start at about twice
    the rank that is expected.

    Differs: from the paper or its released code,
    - `prox: official` is the released operator, which shrinks and then zeroes below xi, so that all of |v| < 2 xi
      dies; `threshold: absolute` is its threshold, which does not follow the learning rate;
    - gates start at 1, so that attaching changes nothing in an adapter that is already trained; the released code
      draws them from a normal distribution (`gate_init: randn`);
    - lam rises within the run (`sparsify`, `max_lam`, `stages`) under the run's own learning-rate schedule; the
      released code trains anew for every lam, with schedulers that have run out;
    - ranks are removed during training, not at the end; `remove_after` leaves a gate that many steps at zero to
      revive. A new direction's gate is as at the start;
    - the L1 term of the loss (`l1`) is off: it penalises the same gates a second time. The released code divides it
      by the number of gates, and so does this;
    - the gates' Adam has torch's eps, 1e-8; the released one is transformers' AdamW, of 1e-6, which holds back gates of
      smaller gradient. Neither decays them;
    - the default lam is ours, for `threshold: lr_scaled`; the released script has an absolute 3e-4 (`threshold:
      absolute`) and an L1 weight of 10;
    - clipping does not see the gates' gradients, which their own Adam normalises; there the norm of all gradients is
      clipped at 0.1, theirs among them;
    - the budget: the paper has none.
    """

    lam: Annotated[float, Field(ge=0, description="strength of the shrinkage; times the learning rate, it is xi")] = 1.0
    prox: Annotated[Prox, Field(description="soft threshold, or the released code's, which zeroes up to 2 xi")] = "soft"
    threshold: Annotated[
        Threshold, Field(description="xi = lr * lam as the paper states it, or xi = lam as the released code has it")
    ] = "lr_scaled"
    sparsify: Annotated[
        Sparsify, Field(description="how lam goes to max_lam over the stages: linear, or linear in its exp or log")
    ] = "linear"
    max_lam: Annotated[float | None, Field(ge=0, description="lam of the last stage; left out: lam stays")] = None
    stages: Annotated[PositiveInt, Field(description="values of lam, each for an equal share of the events")] = 7
    l1: Annotated[float, Field(ge=0, description="weight of mean |g| in the loss")] = 0.0
    gate_init: Annotated[
        Literal["ones", "randn"], Field(description="gates at the start: 1, or normal as in the released code")
    ] = "ones"
    gate_lr: Annotated[
        float | None, Field(gt=0, description="learning rate of the gates; left out: that of the factors")
    ] = None
    remove_after: Annotated[
        NonNegativeInt, Field(description="steps a gate stays at zero before its direction is removed")
    ] = 10

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.GATE, Signal.GATE_OPEN})
    meets_budget: ClassVar[bool] = False
    source: ClassVar[str] = "SoRA, arXiv 2311.11696"

    @property
    def gate(self) -> Gate:
        return SoraGate(
            lr=self.gate_lr,
            prox_rule=self.prox,
            threshold=self.threshold,
            xi=self.lams,
            l1=self.l1,
            start=self.gate_init,
            remove_after=self.remove_after,
        )

    @property
    def lams(self) -> tuple[tuple[int, float], ...]:
        """(step, lam from that step on) of every stage."""
        last, events = self.max_lam, self.when.events
        if last is None or not events:
            return ((0, self.lam),)
        found = []
        for i in range(self.stages):
            t = i / max(1, self.stages - 1)
            if self.sparsify == "linear":
                lam = self.lam + (last - self.lam) * t
            elif self.sparsify == "log_linear":
                lam = math.log(math.exp(self.lam) + (math.exp(last) - math.exp(self.lam)) * t)
            else:
                lam = self.lam * (last / self.lam) ** t
            found.append((0 if i == 0 else events[i * len(events) // self.stages], lam))
        return tuple(found)

    @property
    def settling(self) -> float:
        """None without a budget: directions leave whose gates are closed, to the last step, and that changes nothing
        that the adapter computes."""
        return 0.0 if self.budget is None else super().settling

    @property
    def notes(self) -> tuple[str, ...]:
        begin, end, mass = self.when.at(0), self.when.at(1), self._mass
        if self.gate_init != "ones" or self.budget is not None or mass == 0:
            return ()
        if self.threshold == "lr_scaled" and self.gate_lr is None:
            return (
                f"sora: in these {end - begin} steps shrinkage closes a gate of 1 only at a mean learning rate of "
                f"{1 / mass:.2g} or more; below it, set gate_lr or raise lam",
            )
        taken = self._taken
        if taken is None or taken >= 1:
            return ()
        return (f"sora: {end - begin} steps of shrinkage take {taken:.2g} off a gate of 1, too little to close it",)

    @property
    def _mass(self) -> float:
        """The sum of lam over the steps of the phase."""
        begin, end = self.when.at(0), self.when.at(1)
        ends = [*(at for at, _ in self.lams[1:]), end + 1]
        return sum(lam * max(0, until - max(at, begin + 1)) for (at, lam), until in zip(self.lams, ends, strict=True))

    @property
    def _taken(self) -> float | None:
        """What shrinkage takes off a gate in the phase; None if it depends on the factors' learning rate."""
        if self.threshold == "absolute":
            return self._mass
        return None if self.gate_lr is None and self._mass > 0 else self._mass * (self.gate_lr or 1.0)

    def stuck(self, layout: Layout) -> str | None:
        taken, way = self._taken, self._own_way
        if self.budget is not None or self.gate_init != "ones" or self.l1 > 0 or taken is None or way is None:
            return None
        if taken + way >= 1:
            return None
        own = f", and their own Adam {way:.2g} at most" if way > 0 else ""
        return f"shrinkage takes {taken:.2g} off a gate of 1 in all{own}, too little to close it; raise lam or gate_lr"

    @property
    def _own_way(self) -> float | None:
        """How far Adam can take a gate in the phase, at about gate_lr a step: 0 if nothing shrinks, as then no gate
        gets to zero, and None if it depends on the factors' learning rate."""
        if self._mass == 0:
            return 0.0
        return None if self.gate_lr is None else self.gate_lr * (self.when.at(1) - self.when.at(0))

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if self.sparsify == "exp_linear" and self.max_lam is not None and not (self.lam > 0 and self.max_lam > 0):
            raise ConfigError("sora: sparsify exp_linear goes by factors; lam and max_lam must be positive")

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        values = obs.gather(Signal.GATE)
        sizes = {}
        for name, g in values.items():
            record = obs[name]
            sizes[name] = g.abs().double() * direction_sizes(
                record[Signal.A], record[Signal.B], layout[name].scaling
            ).to(g.device)
        allowed = self.target(state, step)
        ops = prune(sizes, layout, allowed, obs.gather(Signal.GATE_OPEN), obs.unheard)
        shut = sum(int((g == 0).sum()) for g in values.values())
        count = sum(len(g) for g in values.values())
        limit = f", within {allowed}" if allowed is not None else ""
        return RankPlan(ops, f"{shut} of {count} gates are zero; {len(ops)} modules change{limit}")
