"""DiffoRA: a relaxed choice of modules, learnt on held-out batches, then made binary: the others leave the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.linalg.decompose import spectrum
from rankflow.plans.allocate import allocate, round_scores
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Unit, units
from rankflow.plans.names import layer_of
from rankflow.plans.ops import Drop, Grow, Op, Share
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import StepLike, resolve_step
from rankflow.plans.shrink import best, direction_sizes, ops_to
from rankflow.policies.base import Policy, State
from rankflow.policies.gate import Draw, Gate, Theta
from rankflow.policies.observation import Observation, Signal

Relax = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class DifforaGate(Gate):
    """m of DeltaW = m * scaling * B A: sigmoid of a logit, or N times its softmax over the N modules of the layer."""

    relax: Relax = "sigmoid"
    first: int = 1  # held-out updates from this optimizer step on ...
    last: int = 0  # ... to this one

    per_direction: ClassVar[frozenset[str]] = frozenset()

    def init(self, slot: Slot, generator: torch.Generator) -> dict[str, Tensor]:
        return {"logit": torch.zeros(1)}

    def draw(self, theta: Mapping[str, Theta], noise: Mapping[str, Draw] | None) -> dict[str, dict[str, Tensor]]:
        if self.relax == "sigmoid":
            return {name: {"value": t["logit"].sigmoid()} for name, t in theta.items()}
        layers: dict[str, list[str]] = {}
        for name in theta:
            layers.setdefault(layer_of(name), []).append(name)
        values: dict[str, Tensor] = {}
        for names in layers.values():
            home = theta[names[0]]["logit"].device
            shares = torch.cat([theta[name]["logit"].to(home) for name in names]).softmax(0) * len(names)
            values |= {name: shares[i : i + 1].to(theta[name]["logit"].device) for i, name in enumerate(names)}
        return {name: {"value": values[name]} for name in theta}

    def draw_one(self, theta: Theta, noise: Draw | None) -> dict[str, Tensor]:
        return {"value": theta["logit"].sigmoid()}

    def open(self, theta: Theta) -> Tensor:
        return torch.ones(1, dtype=torch.bool)  # which modules leave is decided over all of them

    def outer(self, step: int) -> bool:
        return self.first <= step <= self.last


@dataclass(frozen=True, kw_only=True)
class Diffora(Policy):
    """Reconstruction of DiffoRA (arXiv 2502.08905): which modules get an adapter is searched by gradient descent.

    Every module's update is multiplied by m, whose logit is trained on held-out batches of the training data while A
    and B are trained on the rest, one update of each in turn (first-order DARTS). At the phase's last due step the
    modules of greatest m stay, `ratio` of them in every layer or of all; the others leave the adapter. The earlier due
    steps only note how far the choice has come.

    When to use: the question is which modules need an adapter at all, and a part of the training data can be held out.

    Differs: neither the paper's equations nor code were at hand; the relaxation, the alternation and the choice are
    those of DARTS, and every default is ours,
    - selected modules go on with what they have learnt (m becomes part of A when the phase ends), where the paper
      trains anew; `restart: true` starts them afresh, on the training data without the held-out part;
    - unselected modules get nothing (`share: drop`). The paper shares weights among them: with `share: share` those of
      one layer that are alike in shape, rank and scaling train one new pair of factors, of which each holds a copy, so
      that the adapter stays a plain LoRA; one that has none of its kind, or is tied, still leaves. A module that a
      later phase resizes, or puts under a gate, goes on alone. Clipping by norm sees every copy;
    - with a budget the modules that stay share it evenly, and copies count; else they keep their rank.
    """

    relax: Annotated[
        Relax, Field(description="m: sigmoid of each logit, or softmax over the modules of a layer times their number")
    ] = "sigmoid"
    keep: Annotated[
        Literal["per_layer", "global"], Field(description="choose in every layer, or among all modules together")
    ] = "per_layer"
    ratio: Annotated[float, Field(gt=0, le=1, description="share of the modules that stay, rounded up")] = 0.5
    share: Annotated[
        Literal["drop", "share"],
        Field(description="unselected modules leave, or train one pair of factors per layer and shape together"),
    ] = "drop"
    compare: Annotated[
        Literal["gate", "update"], Field(description="modules by m, or by m times the norm of their update")
    ] = "gate"
    warmup: Annotated[
        StepLike, Field(description="step from which logits are trained; before it they have no gradient to speak of")
    ] = "10%"
    gate_lr: Annotated[float, Field(gt=0, description="learning rate of the logits")] = 1e-2
    restart: Annotated[bool, Field(description="whether selected modules start afresh after the choice")] = False

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.A, Signal.B, Signal.GATE})
    held_out: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = True
    source: ClassVar[str] = "DiffoRA, arXiv 2502.08905 (reconstruction)"

    @property
    def gate(self) -> Gate:
        events = self.when.events
        warm = resolve_step(self.warmup, self.when.run or 0, what="diffora.warmup")
        return DifforaGate(
            scope="module",
            trained_on="outer",
            lr=self.gate_lr,
            betas=(0.5, 0.999),
            weight_decay=1e-3,
            relax=self.relax,
            first=warm + 1,
            last=events[-1] if events else 0,
        )

    def check(self, layout: Layout) -> None:
        self.require_events()
        if resolve_step(self.warmup, self.when.run or 0, what="diffora.warmup") >= self.when.events[-1]:
            raise ConfigError(
                "diffora: warmup lasts until the choice is made; lower it, or let the last event be later"
            )
        super().check(layout)

    def stuck(self, layout: Layout) -> str | None:
        open_to_all = (
            self._seats(members) == len(members) or all(unit.span[0] > 0 for unit in members)
            for members in self._competitions(layout)
        )
        if self.budget is None and not self.restart and all(open_to_all):
            return "every module stays: limits with min: 0, and a ratio that leaves some out, let modules leave"
        return None

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        values = {name: float(m) for name, m in obs.gather(Signal.GATE).items()}
        sizes = {
            name: direction_sizes(obs[name][Signal.A], obs[name][Signal.B], layout[name].scaling) for name in values
        }
        spread = f"m from {min(values.values()):.3f} to {max(values.values()):.3f}, entropy {_entropy(values):.3f}"
        if step < self.when.events[-1]:
            return RankPlan(reason=f"still searching: {spread}")
        chosen = self._choose(self._scores(values, obs, layout), layout)
        shared = self._shared(chosen, layout) if self.share == "share" else {}
        ranks = self._ranks(chosen, shared, layout)
        ops = {}
        for name, slot in layout.items():
            if name in shared and ranks[name] > 0:
                ops[name] = [Drop(), Grow(ranks[name]), Share(shared[name])]
            else:
                ops[name] = self._ops(name, slot, ranks[name], sizes)
        stay = sum(ranks[name] > 0 for name in chosen)
        together = f"; {len(shared)} share {len(set(shared.values()))} pairs of factors" if shared else ""
        return RankPlan(ops, f"{stay} of {len(layout)} modules stay ({self.keep}){together}; {spread}")

    def _scores(self, values: Mapping[str, float], obs: Observation, layout: Layout) -> dict[str, float]:
        values = {name: m * (name not in obs.unheard) for name, m in values.items()}
        if self.compare == "gate":
            return round_scores(values)
        norms = {
            name: float(spectrum(obs[name][Signal.A], obs[name][Signal.B], layout[name].scaling).sigma.norm())
            for name in values
        }
        return round_scores({name: values[name] * norms[name] for name in values})

    def _choose(self, scores: Mapping[str, float], layout: Layout) -> set[str]:
        """Modules that stay; of equal scores the earlier. Tied ones are one choice, those that may not leave stay."""
        chosen: set[str] = set()
        for members in self._competitions(layout):
            means = [sum(scores[name] for name in unit.names) / len(unit.names) for unit in members]
            order = sorted(range(len(members)), key=lambda i: (-means[i], i))
            for place, i in enumerate(order):
                if place < self._seats(members) or members[i].span[0] > 0:
                    chosen |= set(members[i].names)
        return chosen

    def _competitions(self, layout: Layout) -> list[list[Unit]]:
        """What is chosen among: the modules of each layer, or all."""
        groups: dict[str, list[Unit]] = {}
        for unit in units(layout):
            if unit.rank > 0:
                groups.setdefault(layer_of(unit.names[0]) if self.keep == "per_layer" else "", []).append(unit)
        return list(groups.values())

    def _seats(self, members: Sequence[Unit]) -> int:
        return math.ceil(self.ratio * len(members))

    def _shared(self, chosen: set[str], layout: Layout) -> dict[str, str]:
        """The group of each module that was not chosen and has company."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, s in layout.items():
            if name not in chosen and s.rank > 0 and s.tie is None:
                kind = (layer_of(name), s.rank, s.in_features, s.out_features, s.scaling, s.kind, s.experts)
                groups.setdefault((*kind, s.min_rank, s.max_rank, s.buckets, s.multiple, s.trainable), []).append(name)
        return {name: names[0] for names in groups.values() if len(names) > 1 for name in names}

    def _ranks(self, chosen: set[str], shared: Mapping[str, str], layout: Layout) -> dict[str, int]:
        stay = [name for name in layout if name in chosen or name in shared]
        if self.budget is None:
            return {name: slot.rank if name in stay else 0 for name, slot in layout.items()}
        tied = Layout({n: replace(s, tie=f"shared by {shared[n]}") if n in shared else s for n, s in layout.items()})
        return allocate({name: [0.0] * layout[name].max_rank for name in stay}, tied, self.budget)

    def _ops(self, name: str, slot: Slot, rank: int, sizes: Mapping[str, Tensor]) -> Sequence[Op]:
        if rank == 0 or (self.restart and slot.rank > 0 and slot.min_rank == 0):
            return [*([Drop()] if slot.rank else []), *([Grow(rank)] if rank else [])]
        return ops_to(rank, slot.rank, best(name, sizes))


def _entropy(values: Mapping[str, float]) -> float:
    """Mean binary entropy in bits: 1 while every m is a half, 0 once all are 0 or 1."""
    inside = [min(max(m, 1e-12), 1 - 1e-12) for m in values.values()]
    return math.fsum(-m * math.log2(m) - (1 - m) * math.log2(1 - m) for m in inside) / len(inside)
