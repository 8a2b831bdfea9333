"""A LoRA adapter without a model: factors, signals computed from them, and plans applied to them, all in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from rankflow.linalg.random import keyed_generator
from rankflow.observe.averages import Running
from rankflow.plans.last_direction import spare_last
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop, Grow, Keep, Op, Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import direction_sizes
from rankflow.policies.base import Policy, State
from rankflow.policies.gate import Gate
from rankflow.policies.lifecycle import Phase
from rankflow.policies.observation import Observation, Signal, Study

AVERAGED = {Signal.MEAN_ZZ, Signal.MEAN_DD, Signal.MEASURED}
Scores = Callable[[str, int], float]


def random_score(name: str, step: int) -> float:
    """Positive, of a size that belongs to the module."""
    size = float(torch.rand((), generator=keyed_generator("size", name)))
    return (0.1 + size) * (0.5 + float(torch.rand((), generator=keyed_generator("score", name, step))))


class World:
    """Modules ``m0, m1, ...`` of some shapes, each with A ``[r, in]``, B ``[out, r]`` and a weight ``[out, in]``."""

    def __init__(self, ranks: Iterable[int], *, scores: Scores = random_score, zero_b: bool = False, **limits):
        shapes = [(12, 10), (10, 12), (16, 8), (12, 12)]
        self.layout = Layout({f"m{i}": Slot(r, *shapes[i % 4], 0.5 + i % 3, **limits) for i, r in enumerate(ranks)})
        self.scores = scores
        self.gate: Gate | None = None
        self.theta: dict[str, dict[str, Tensor]] = {}
        self.running: dict[str, Running] = {}
        self.decay = 0.95  # of the averages
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.weights: dict[str, Tensor] = {}
        for name, slot in self.layout.items():
            random = keyed_generator("factors", name)
            a = torch.randn(slot.rank, slot.in_features, generator=random, dtype=torch.float64)
            b = torch.randn(slot.out_features, slot.rank, generator=random, dtype=torch.float64)
            decay = 0.6 ** torch.arange(slot.rank, dtype=torch.float64)
            self.factors[name] = (a, torch.zeros_like(b) if zero_b else b * decay)
            self.weights[name] = torch.randn(len(b), a.shape[1], generator=random, dtype=torch.float64)

    def install(self, gate: Gate | None) -> World:
        """Put every module under the gate of a policy, as the controller does when its phase begins."""
        self.fold()
        self.gate = gate
        for name, slot in self.layout.items():
            if gate is not None and slot.rank > 0:
                self.theta[name] = gate.init(slot, keyed_generator("gate", name))
        return self

    def fold(self) -> None:
        for name in self.theta:
            a, b = self.factors[name]
            self.factors[name] = (self.value(name)[:, None].double() * a, b)
        self.gate, self.theta = None, {}

    def value(self, name: str) -> Tensor:
        assert self.gate is not None
        return self.gate.value(self.gate.draw(self.theta, None)[name])

    def delta(self, name: str) -> Tensor:
        a, b = self.factors[name]
        a = self.value(name)[:, None].double() * a if name in self.theta else a
        return self.layout[name].scaling * b @ a

    def signals(self, name: str, step: int) -> dict[Signal, Tensor]:
        a, b = self.factors[name]
        slot = self.layout[name]
        random = keyed_generator("data", name, step)
        x = torch.randn(40, slot.in_features, generator=random, dtype=torch.float64)
        g = torch.randn(40, slot.out_features, generator=random, dtype=torch.float64)
        z, d = x @ a.T, slot.scaling * g @ b
        score = torch.tensor(self.scores(name, step), dtype=torch.float64)
        gated: dict[Signal, Tensor] = {}
        if self.gate is not None:
            value = self.value(name)
            gated = {Signal.GATE: value, Signal.GATE_OPEN: self.gate.open(self.theta[name])}
            gated[Signal.GATE_SCORE] = self.gate.score(self.theta[name])
            gated[Signal.GATE_GRAD] = torch.randn(value.shape, generator=random)
        _, sigma, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        return {
            **gated,
            Signal.A: a.clone(),
            Signal.B: b.clone(),
            Signal.DELTA_SCORE: score,
            Signal.DELTA_SCORE_SAMPLED: score,
            Signal.S_A: z.T @ z,
            Signal.S_B: d.T @ d,
            Signal.TOKENS: torch.tensor(40.0),
            Signal.GRAD_A: (b.T @ g.T @ x) * slot.scaling,
            Signal.GRAD_B: (g.T @ x @ a.T) * slot.scaling,
            Signal.SKETCH: torch.randn(4, slot.in_features, generator=random, dtype=torch.float64),
            Signal.WEIGHT_SCORE: score * (self.weights[name] * (g.T @ x)).abs().mean(),
            Signal.INPUTS: score * sigma[:, None] * directions,
            Signal.INPUT_ENERGY: (score * sigma).square().sum(),
            Signal.PATH_SCORE: score,
        }

    def hear(self, step: int) -> None:
        """Let a step count in the averages, as the controller does once on each that listens to them."""
        for name, slot in self.layout.items():
            if slot.rank > 0:
                sums = self.signals(name, step)
                running = self.running.get(name, Running.empty(slot.rank))
                self.running[name] = running.add(sums[Signal.S_A], sums[Signal.S_B], sums[Signal.TOKENS], self.decay)

    def observe(self, wanted: frozenset[Signal], step: int, study: str | None = None) -> Observation:
        if wanted & AVERAGED:
            self.hear(step)
        return self.offer(wanted, step, study)

    def study(self, study: Study, step: int) -> Observation:
        return self.observe(study.signals, step, study.name)

    def offer(self, wanted: frozenset[Signal], step: int, study: str | None = None) -> Observation:
        """What there is to see, without another step in the averages."""
        values = {}
        for name, slot in self.layout.items():
            if slot.rank > 0:
                averages = self.running[name].tensors() if name in self.running else {}
                all_of_it = self.signals(name, step) | {Signal(key): t for key, t in averages.items()}
                values[name] = {s: v for s, v in all_of_it.items() if s in wanted}
        return Observation(step, values, study)

    def sizes(self, name: str) -> Tensor:
        return direction_sizes(*self.factors[name], self.layout[name].scaling)

    def apply(self, plan: RankPlan) -> None:
        after = plan.apply_to(self.layout)
        for name, ops in plan.ops.items():
            a, b = self.factors[name]
            for op in ops:
                if isinstance(op, Refactor):
                    a, b = op.N @ a, b @ op.M
                elif isinstance(op, Keep):
                    a, b = a[list(op.idx)], b[:, list(op.idx)]
                elif isinstance(op, Grow):
                    new = torch.randn(op.n, a.shape[1], generator=keyed_generator(name, len(a)), dtype=torch.float64)
                    a, b = torch.cat([a, new]), torch.cat([b, b.new_zeros(len(b), op.n)], 1)
                elif isinstance(op, Open):
                    value, opened = self.value(name), torch.tensor([i in op.idx for i in range(len(a))])
                    b = b * torch.where(opened, value.double() / value.new_tensor(op.to).double(), 1.0)
                elif isinstance(op, Drop):
                    a, b = a[:0], b[:, :0]
                if self.gate is not None:
                    self._follow(self.gate, name, op)
            self.factors[name] = (a, b)
            if name in self.running:
                self.running[name] = self.running[name].after(ops)
            assert len(a) == b.shape[1] == after[name].rank
        self.layout = after

    def _follow(self, gate: Gate, name: str, op: Op) -> None:
        if isinstance(op, Drop):
            self.theta.pop(name)
        elif isinstance(op, Grow):
            new = gate.init(replace(self.layout[name], rank=op.n), keyed_generator("gate", name))
            old = self.theta.get(name)
            if old is None:
                self.theta[name] = new
            elif gate.scope == "component":
                self.theta[name] = {k: torch.cat([t, new[k]]) if k in gate.per_direction else t for k, t in old.items()}
        elif isinstance(op, Keep) and gate.scope == "component":
            kept = {k: t[list(op.idx)] for k, t in self.theta[name].items() if k in gate.per_direction}
            self.theta[name] = {**self.theta[name], **kept}
        elif isinstance(op, Open):
            value = self.theta[name]["value"].index_fill(0, torch.tensor(op.idx), op.to)
            self.theta[name] = {**self.theta[name], "value": value}
        assert not isinstance(op, Refactor) or op.diagonal, "directions under a gate do not mix"

    def train(self, step: int) -> None:
        """Nothing is learnt here, but no direction that trains stays at zero, and gates wander."""
        for name, theta in self.theta.items():
            assert self.gate is not None
            for key, t in theta.items():
                noise = torch.randn(t.shape, generator=keyed_generator("gates", name, key, step))
                if self.gate.trained_on != "nothing" and self.gate.trains(key, step):
                    theta[key] = t + 0.1 * noise
            theta.update(self.gate.prox(theta, 0.1, step))
        for name, (a, b) in self.factors.items():
            if not self.layout[name].trainable:
                continue
            noise = torch.randn(b.shape, generator=keyed_generator("train", name, step), dtype=torch.float64)
            self.factors[name] = (a, b + 0.05 * noise)


def occasions(
    world: World, policy: Policy, steps: range, *, learns: bool = True
) -> Iterator[tuple[int, Observation, bool]]:
    """Step, what the controller shows the policy then (nothing where it does not listen), and whether it asks for a
    plan next, in the order of a phase that takes these steps. After each the world learns."""
    start, every = ([s for s in policy.studies if s.when == when] for when in ("start", "every"))
    for study in start:
        yield steps.start - 1, world.study(study, steps.start - 1), study is start[-1]
    for step in steps:
        due = policy.when.due(step)
        heard = world.observe(policy.listen(step), step) if policy.listen(step) else Observation(step)
        if heard or due:
            yield step, heard, due and not every
        for study in every if due else ():
            yield step, world.study(study, step), study is every[-1]
        if learns:
            world.train(step)


def enter(world: World, policy: Policy) -> State:
    """What the controller does when a phase begins; the policy's first state."""
    world.install(policy.gate)
    state = policy.init(world.layout)
    if plan := policy.enter(state, world.layout):
        world.apply(plan)
        state = policy.decided(state, plan, world.layout, 0)
    return state


def run(world: World, policy: Policy, steps: range, *, through_disk: bool = False) -> list[RankPlan]:
    """What the controller does, in short; the plans that were made."""
    state = enter(world, policy)
    plans = []
    for step, obs, asked in occasions(world, policy, steps):
        state = policy.observe(state, obs, step) if obs else state
        if asked:
            plan, _ = spare_last(policy.decide(state, obs, world.layout, step), world.layout, world.layout, world.sizes)
            world.apply(plan)
            state = policy.decided(state, plan, world.layout, step)
            plans.append(plan)
        if through_disk:
            state = reloaded(state)
    world.apply(policy.leave(state, world.layout))
    return plans


def run_phases(world: World, phases: Iterable[Phase], total_steps: int) -> dict[str, list[RankPlan]]:
    plans = {}
    for phase in phases:
        plans[phase.name] = run(world, phase.policy, range(max(1, phase.begin), min(phase.end, total_steps + 1)))
        budget = phase.policy.budget
        assert budget is None or budget.spent(world.layout) == budget.amount, f"{phase.name} missed its budget"
    return plans


def reloaded(state: State) -> State:
    return load(save({key: value.contiguous() for key, value in state.items()})) if state else {}
