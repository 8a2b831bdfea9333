"""What a rank policy is: a frozen dataclass of settings with pure functions from what was observed to a plan.

A policy never holds a module, a Parameter or an optimizer. Its fields are the keys of its YAML `params`, its state is
a dict of tensors that checkpoints itself, and one file under `rankflow/policies/methods/` is all a new one needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget, check_reachable
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import SETTLING, When
from rankflow.plugins import name_of, snake_case
from rankflow.policies.gate import Gate
from rankflow.policies.observation import Observation, Signal, Study

GROUP = "rankflow.policies"  # of entry points, by which policies of installed packages are found
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies. Subclasses add fields (their YAML `params`) and at least `decide`.

    Budget and cadence arrive resolved: steps for percentages, rank or parameter totals for shares.

    What every policy owes, and `tests/contracts/test_policies.py` holds each one in `methods/` to:
    - the same input gives the same plan, and is left as it is: state, observations and layout are never written to;
    - state is tensors that go through a file at any step;
    - plans keep to the limits, buckets and ties of the slots, from whatever ranks `check` does not refuse; limits allow
      rank 0 only where they say so, and a plan that would leave nothing is changed to leave one direction;
    - it listens to no more than `needs` says, and to nothing after its last event;
    - a budget is met by the last event (`meets_budget`), is a bound (`takes_budget`), or is refused;
    - an empty plan says why in its `reason`; scores that are all alike or all 0 end in a plan or in a reason.
    """

    budget: Budget | None = None
    when: When = field(default_factory=When)

    needs: ClassVar[frozenset[Signal]] = frozenset()  # all it may ever ask for; `listen` says what and when
    held_out: ClassVar[bool] = False  # whether it learns from a part of the training data that the factors never see
    source: ClassVar[str] = ""  # the paper or rule, one line, for `rankflow policies`
    grows: ClassVar[bool] = True  # whether any module may come to a rank above the one it has
    resizes: ClassVar[bool] = True  # whether it may change factors; else it freezes some at most
    lowers: ClassVar[bool] = True  # whether any may come to one below
    takes_budget: ClassVar[bool] = False  # whether it keeps to a budget; one that does not is refused it
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
        """The factor in [0, 1] by which earlier steps count less with every step that listens to the averaged
        signals."""
        return 1.0

    @property
    def penalty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(A ``[*e, r, in]``, B ``[*e, out, r]``) -> scalar; its mean over the modules is added to the loss."""
        return None

    @property
    def settling(self) -> float:
        """The share of a phase at the end of the run in which nothing is decided unless `when.stop` says so."""
        return SETTLING if self.resizes else 0.0

    def in_run(self, total_steps: int, trains_more: bool) -> Policy:
        """Return the policy for a run of so many steps, of a model in which more than the adapter trains or not."""
        return self

    def changes(self, layout: Layout) -> int:
        """Return how many changes of rank the phase comes to from `layout`, if every rank is to be trained for equally
        long; 0: as many as there are due steps."""
        return 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the person who starts the run, about what the settings come to in it."""
        return ()

    @property
    def name(self) -> str:
        """What it is called in YAML: its file's name if it is shipped, the name it was installed or registered under,
        or else that of its class in snake case."""
        package, _, module = type(self).__module__.rpartition(".")
        if package == "rankflow.policies.methods":
            return module
        return name_of(GROUP, type(self)) or snake_case(type(self).__name__)

    @property
    def beyond_ranks(self) -> bool:
        """Whether decisions change something even if every rank stays, such as other directions in place of the old
        ones."""
        return False

    def stuck(self, layout: Layout) -> str | None:
        """Return why these settings leave no decision that can change anything, or None. What budget and limits rule
        out is known without it (`rankflow.policies.idleness`)."""
        return None

    def check(self, layout: Layout) -> None:
        """Refuse settings under which the policy cannot do from `layout` what it is for. One that asks for more calls
        this, too.

        Raises:
            ConfigError: a budget that the policy does not keep to, or that limits keep every total above or below.
        """
        if self.budget is None:
            return
        if not self.takes_budget:
            raise ConfigError(f"{self.name} keeps to no budget, so {self.budget} means nothing to it; leave it out")
        check_reachable(layout, self.budget)

    def held_total(self, layout: Layout) -> Budget:
        """Return the budget of a policy that moves rank between modules, or the total rank that there is.

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

    def check_start(self, factors: Observation) -> None:
        """Refuse an adapter from whose factors (`A` and `B`, computed when read) the phase cannot begin.

        Raises:
            PlanError: it adds something to the model already, and only a fresh one will do.
        """

    def listen(self, step: int) -> frozenset[Signal]:
        """Return the signals to take on the step whose optimizer update is the `step`-th. Nothing listens on other
        steps."""
        return self.needs if self.when.due(step) else frozenset()

    def init(self, layout: Layout) -> State:
        return {}

    def enter(self, state: State, layout: Layout) -> RankPlan:
        """Return what is to change when the phase begins, before its first step and under its gate."""
        return RankPlan()

    def leave(self, state: State, layout: Layout) -> RankPlan:
        """Return what is to change when the phase ends, before its gate is folded. It is not called when a run is given
        up."""
        return RankPlan()

    def heard(self, state: State, obs: Observation, step: int) -> tuple[State, str | None]:
        """State after `observe`, and None; or, if something of what was observed is not finite, the state as it was and
        what that is. So `observe` and `decide` need not look: they are never shown an infinity or a NaN."""
        bad = obs.non_finite()
        return (state, bad) if bad else (self.observe(state, obs, step), None)

    def observe(self, state: State, obs: Observation, step: int) -> State:
        return state

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        """Return what is to change after optimizer step `step`; an empty plan changes nothing."""
        raise NotImplementedError

    def decided(self, state: State, plan: RankPlan, layout: Layout, step: int) -> State:
        """Return the state after `plan` was applied; `layout` is the layout after it."""
        return state
