"""What a rank policy is: a frozen dataclass of settings with pure functions from what was observed to a plan.

A policy never holds a module, a Parameter or an optimizer. Its fields are the keys of its YAML `params`, its state is
a dict of tensors that checkpoints itself, and one file under `rankflow/policies/methods/` is all a new one needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from rankflow.errors import ConfigError, RankFlowError
from rankflow.plans.budget import Budget, check_reachable, even
from rankflow.plans.limits import Limits, allowed_ranks
from rankflow.plans.plan import Layout, RankPlan
from rankflow.plans.schedule import StepLike, When, resolve_step
from rankflow.policies.gate import Gate

State = dict[str, Tensor]
Mode = Literal[
    "resize", "mask"
]  # new tensors with every decision, or room for all of them (see `rankflow.lora.capacity`)


class Signal(str, Enum):
    """What can be observed of a module; shapes are those of the flattened factors (``[experts, ...]`` in front for
    expert tensors), values detached, on the module's device.

    Taken in the backward pass, loss scale undone; over the micro-batches of one optimizer step they add up as `.grad`
    does, so with a loss divided by the accumulation steps they are averages.
    """

    A = "A"  # [r, in]
    B = "B"  # [out, r]
    GRAD_A = "grad_A"  # [r, in], before clipping
    GRAD_B = "grad_B"  # [out, r], before clipping
    DELTA_SCORE = "delta_score"  # [], sum |DeltaW * dL/dDeltaW| / sqrt(out * in)
    DELTA_SCORE_SAMPLED = "delta_score_sampled"  # [], the same from a seeded subset of output rows
    SINGULAR_VALUES = "singular_values"  # [r], of DeltaW, descending, float64
    S_A = "S_A"  # [r, r], sum of z z^T over tokens, float64
    S_B = "S_B"  # [r, r], sum of d d^T over tokens, float64
    TOKENS = "tokens"  # [], tokens that went into S_A and S_B
    SKETCH = "sketch"  # [q, in], random rows of dL/dDeltaW
    GATE = "gate"  # [r] or [1], what the phase's gate multiplies directions or the module by; without noise
    GATE_OPEN = "gate_open"  # the same shape, bool: which are on
    GATE_SCORE = "gate_score"  # the same shape, what they rank by where some have to go
    GATE_GRAD = "gate_grad"  # the same shape, gradient of the gate's parameter `value`
    WEIGHT_SCORE = "weight_score"  # [], mean |W0 * dL/dDeltaW| over a seeded subset of output rows
    INPUTS = "inputs"  # [<= q, in], S V^T of the module's inputs about their mean, float64; no average
    INPUT_ENERGY = "input_energy"  # [], sum of all squared singular values of those inputs, float64; no average
    PATH_SCORE = "path_score"  # [], sum |DeltaW * dL/dDeltaW|, with the gradient averaged over a batch's `points` first
    # Exponential averages over the steps that listen to one of them (see `Policy.decay`), carried through every resize:
    MEAN_ZZ = "mean_zz"  # [r, r], of z z^T over tokens, float64
    MEAN_DD = "mean_dd"  # [r, r], of d d^T over tokens, of the loss summed over tokens, float64
    MEASURED = "measured"  # [r], tokens that the averages of each direction rest on, 0 for a new one, float64


GATE_SIGNALS = frozenset({Signal.GATE, Signal.GATE_OPEN, Signal.GATE_SCORE, Signal.GATE_GRAD})

Lazy = Tensor | Callable[[], Tensor]


class Observation(Mapping[str, Mapping[Signal, Tensor]]):
    """Module -> signal -> tensor for one optimizer step (or one `Study`). Callables are computed when first read.

    `unheard` are modules in the adapter that train and that no gradient has reached in the whole run, where others had
    one: by it they have no importance, unlike those that are frozen, of which nothing is known. On a step that missed a
    module that trains, signals that are made of gradients are 0.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, Mapping[Signal, Lazy]] | None = None,
        study: str | None = None,
        unheard: frozenset[str] = frozenset(),
    ):
        self.step = step
        self.study = study
        self.unheard = unheard
        self._values = {name: _Record(name, signals) for name, signals in (values or {}).items()}

    def __getitem__(self, name: str) -> Mapping[Signal, Tensor]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def only(self, wanted: frozenset[Signal], more: Mapping[str, Mapping[Signal, Tensor]]) -> Observation:
        """The `wanted` signals of this one and of `more`; callables stay uncalled."""
        values: dict[str, dict[Signal, Lazy]] = {}
        for name, record in self._values.items():
            values[name] = {s: partial(record.__getitem__, s) for s in record if s in wanted}
            values[name] |= {s: value for s, value in more.get(name, {}).items() if s in wanted}
        return Observation(self.step, values, self.study, self.unheard)

    def measured(self) -> dict[tuple[str, Signal], Tensor]:
        """What was taken from passes over data, by (module, signal); not what is computed when read."""
        return {
            (n, s): v for n, record in self._values.items() for s, v in record.given.items() if isinstance(v, Tensor)
        }

    def replaced(self, values: Mapping[tuple[str, Signal], Tensor]) -> Observation:
        """The same but for these."""
        merged: dict[str, dict[Signal, Lazy]] = {n: dict(record.given) for n, record in self._values.items()}
        for (name, signal), value in values.items():
            merged.setdefault(name, {})[signal] = value
        return Observation(self.step, merged, self.study, self.unheard)

    def but_unheard(self, unheard: frozenset[str]) -> Observation:
        """The same, and which modules no gradient reaches."""
        values: dict[str, Mapping[Signal, Lazy]] = {name: record.given for name, record in self._values.items()}
        return Observation(self.step, values, self.study, unheard)

    def gather(self, signal: Signal) -> dict[str, Tensor]:
        """One signal of every module that has it."""
        return {name: record[signal] for name, record in self._values.items() if signal in record}


class _Record(Mapping[Signal, Tensor]):
    def __init__(self, name: str, values: Mapping[Signal, Lazy]):
        self._name = name
        self._values: dict[Signal, Lazy] = dict(values)

    @property
    def given(self) -> Mapping[Signal, Lazy]:
        """Tensors, and callables that nobody has asked yet."""
        return self._values

    def __getitem__(self, signal: Signal) -> Tensor:
        try:
            value = self._values[signal]
        except KeyError:
            raise RankFlowError(
                f"{self._name}: signal {signal.value!r} was not observed; a policy must name it in what it listens to"
            ) from None
        if not isinstance(value, Tensor):
            value = self._values[signal] = value()
        return value

    def __contains__(self, signal: object) -> bool:
        return signal in self._values

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Study:
    """Passes over data that a policy asks for and the controller runs, leaving adapter, optimizer and RNG as they were.

    Every batch is run once at each of `points`, a factor on the adapter's scaling; signals are averaged over all
    passes (`inputs` and `input_energy` are those of all of them) and reach `Policy.observe` in an `Observation` whose
    `study` is this name. Only `path_score` looks at the points of a batch together: until the last of them it keeps
    lora_A's inputs and lora_B's output gradients, len(points) * tokens * (in + out) numbers for each module.
    """

    name: str
    signals: frozenset[Signal]
    batches: int = 8
    split: Literal["train", "outer"] = "train"
    points: tuple[float, ...] = (1.0,)
    when: Literal["start", "every"] = "start"  # before the first step, or before every decision
    rows: int = 64  # output rows that sampled scores and `weight_score` look at
    components: int = 16  # q of `sketch` and of `inputs`


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies. Subclasses add fields (their YAML `params`) and at least `decide`.

    Budget and cadence arrive resolved: steps for percentages, rank or parameter totals for shares.
    """

    budget: Budget | None = None
    when: When = field(default_factory=When)

    needs: ClassVar[frozenset[Signal]] = frozenset()  # all it may ever ask for; `listen` says what and when
    held_out: ClassVar[bool] = False  # whether it learns from a part of the training data that the factors never see
    source: ClassVar[str] = ""  # the paper or rule, one line, for `rankflow policies`
    grows: ClassVar[bool] = True  # whether any module may come to a rank above the one it has
    resizes: ClassVar[bool] = True  # whether it may change factors; else it freezes some at most
    lowers: ClassVar[bool] = True  # whether any may come to one below
    meets_budget: ClassVar[bool] = False  # whether it comes to its budget and stays there; else that is but a bound
    first_only: ClassVar[bool] = False  # decides before the first step, so no phase may come before it

    @property
    def studies(self) -> tuple[Study, ...]:
        return ()

    @property
    def gate(self) -> Gate | None:
        """What sits between A and B of every module while this policy is in charge; folded into them afterwards."""
        return None

    @property
    def decay(self) -> float:
        """What earlier steps count for in the averaged signals with every step that listens to them, in [0, 1]."""
        return 1.0

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(A ``[*e, r, in]``, B ``[*e, out, r]``) -> scalar; its mean over the modules is added to the loss."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What somebody who starts this run should be told about how the settings work out in it."""
        return ()

    @property
    def name(self) -> str:
        """What it is called in YAML: the name of its file. One from elsewhere goes by its class."""
        package, _, module = type(self).__module__.rpartition(".")
        return module if package == "rankflow.policies.methods" else type(self).__name__

    @property
    def beyond_ranks(self) -> bool:
        """Whether decisions change something even where every rank stays: other directions for the old ones, say."""
        return False

    def stuck(self, layout: Layout) -> str | None:
        """Why no decision can change anything, where these settings themselves see to that; what budget and limits do
        is known without it (`rankflow.policies.idleness`)."""
        return None

    def check(self, layout: Layout) -> None:
        """Raise ConfigError if the budget cannot be met from `layout` with this cadence and these limits."""

    def held_total(self, layout: Layout) -> Budget:
        """For policies that move rank about: the budget, or what there is.

        Raises:
            ConfigError: limits keep every total above or below it.
        """
        if self.budget is not None:
            check_reachable(layout, self.budget)
            return self.budget
        budget = Budget("total_rank", layout.total_rank)
        check_reachable(layout, budget, f"{self.name} keeps what the adapter has, {budget},")
        return budget

    def require_events(self) -> None:
        """Raise ConfigError if the phase has no step on which to decide."""
        if not self.when.events:
            raise ConfigError(f"{self.name} has no due step in its phase; check when.start, when.every and when.stop")

    def listen(self, step: int) -> frozenset[Signal]:
        """Signals to take on the step whose optimizer update is the `step`-th. Nothing listens on other steps."""
        return self.needs if self.when.due(step) else frozenset()

    def init(self, layout: Layout) -> State:
        return {}

    def enter(self, state: State, layout: Layout) -> RankPlan:
        """What is to change when the phase begins, before its first step and under its gate."""
        return RankPlan()

    def leave(self, state: State, layout: Layout) -> RankPlan:
        """What is to change when the phase ends, before its gate is folded. Not asked for when a run is given up."""
        return RankPlan()

    def observe(self, state: State, obs: Observation, step: int) -> State:
        return state

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        """What is to change after optimizer step `step`; an empty plan for nothing."""
        raise NotImplementedError

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        """State after `plan` was applied and `layout` is what came of it."""
        return state


def _flat(place: str, value: Any) -> dict[str, str]:
    if not is_dataclass(value):
        return {place: re.sub(r" at 0x[0-9a-f]+", "", str(value))}  # of a function in a policy of the user's own
    return {k: v for f in fields(value) for k, v in _flat(f"{place}.{f.name}", getattr(value, f.name)).items()}


@dataclass(frozen=True)
class Phase:
    """One policy from step `begin` on, up to but without step `end`."""

    policy: Policy
    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Lifecycle:
    """Phases in order, and the limits that hold throughout. A single policy is a lifecycle of one phase.

    `mode` says how ranks change: `resize` makes new tensors, `mask` writes into tensors with room for the largest.

    Before `resolve`, ends are `until` values as written (steps or percentages).
    """

    policies: tuple[tuple[str, Policy, StepLike | None], ...]  # (name, policy, until)
    limits: Limits = field(default_factory=Limits)
    mode: Mode = "resize"
    source: str = ""  # where it was read from, for messages

    @property
    def resizes(self) -> bool:
        """Whether any phase may change factors."""
        return any(policy.resizes for _, policy, _ in self.policies)

    def settings(self) -> dict[str, str]:
        """Everything that is set, by place: two lifecycles that do the same have the same settings."""
        found: dict[str, str] = {} if self.mode == "resize" else {"mode": self.mode}
        for i, (name, policy, until) in enumerate(self.policies):
            found |= {f"phases[{i}].policy": name, f"phases[{i}].until": str(until), **_flat(f"phases[{i}]", policy)}
        return found | _flat("limits", self.limits)

    def __str__(self) -> str:
        names = " -> ".join(name for name, _, _ in self.policies)
        return f"{names} ({self.source})" if self.source else names

    def resolve(self, total_steps: int, layout: Layout) -> tuple[Layout, tuple[Phase, ...]]:
        """Layout with limits in its slots, and phases in steps with budgets in whole units.

        Raises:
            ConfigError: phases out of order, limits that match nothing, or a budget that cannot be met.
        """
        if total_steps < 1:
            raise ConfigError(f"total_steps is {total_steps}; a run has at least one step")
        layout = self.limits.apply(layout)
        phases: list[Phase] = []
        begin, expected = 0, layout
        for i, (name, policy, until) in enumerate(self.policies):
            last = i == len(self.policies) - 1
            end = total_steps + 1 if until is None else resolve_step(until, total_steps, what=f"phases[{i}].until")
            if until is None and not last:
                raise ConfigError(f"phases[{i}] ({name}): only the last phase may leave out `until`")
            if policy.first_only and i > 0:
                raise ConfigError(f"phases[{i}] ({name}): decides before the first step; put it first, or leave it out")
            if end <= begin:
                raise ConfigError(f"phases[{i}] ({name}): ends at step {end} but begins at step {begin}")
            policy = replace(
                policy,
                when=policy.when.resolve(total_steps, begin, end),
                budget=policy.budget.resolve(layout) if policy.budget is not None else None,
            )
            try:
                policy.check(expected)
                if policy.budget is not None:  # which module will have what is not known yet; how much there is, is
                    expected = expected.with_ranks(even(expected, policy.budget))
                elif policy.lowers:  # by how much is not known; it brings ranks within limits
                    expected = expected.with_ranks(allowed_ranks(expected, expected.ranks))
            except ConfigError as e:
                raise ConfigError(f"phases[{i}] ({name}): {e}") from None
            phases.append(Phase(policy, name, begin, end))
            begin = end
        return layout, tuple(phases)
