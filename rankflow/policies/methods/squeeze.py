"""Squeeze: ranks come down by the best low-rank approximation of what each module has learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rankflow.errors import ConfigError
from rankflow.linalg.decompose import MetricName
from rankflow.linalg.spectrum import Gauge, Spectrum
from rankflow.plans.allocate import allocate, allocation_margin
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout
from rankflow.plans.limits import units
from rankflow.plans.ops import Op
from rankflow.plans.plan import Carry, RankPlan
from rankflow.plans.schedule import curve
from rankflow.plans.shrink import best_cut, ops_to
from rankflow.policies._shrinking import Lowering, Shape
from rankflow.policies.base import State
from rankflow.policies.metrics import averages_of, metric_of_each, spectrum_in
from rankflow.policies.observation import Observation, Signal


@dataclass(frozen=True, kw_only=True)
class Squeeze(Lowering):
    """LoRA-Squeeze (arXiv 2602.10993): train at a high rank, then keep DeltaW's leading singular directions only.

    With events over a stretch of the run it is In-Squeeze, ranks coming down in stages, which are of equal length if
    `when` is left out: from 16 to 4 a third of the run each at 16, 8 and 4. With one event some way before the end it
    is Cont-Squeeze; with one at the end (`when: {start: 100%}`), Post-Squeeze. At every event the total follows `shape`
    from what it was when the phase began to the budget; modules whose rank stays are not touched. Instead of a budget,
    `energy` keeps that share of every module's squared singular values, spread over the events so that all cuts
    together keep it. Modules below their minimum rank are grown to it.

    When to use: the rank that is served is known, and training can afford more at first. Start at two to four times the
    budget, with about half the learning rate that a LoRA of the budget's rank would take. It also ends a lifecycle that
    grew.

    Differs:
    - the ladder halves, as no source that we could read says which ranks the paper's stages have, and there is no least
      length of a stage, where one of its variants has 200 steps;
    - `allocate: global` gives a rank where it keeps most energy of all modules together; the paper has one rank for
      all, which is `uniform`: ranks as equal as the budget and the present ranks allow;
    - besides the norm of DeltaW (`weights`) it can keep what the data make of it: the layer's output (`outputs`) or,
      to first order, the loss (`loss`), from running averages over the `window` steps before each event. What was
      measured before an earlier event counts on, for the directions that came of it, and fades with `memory`. A module
      with a direction measured over fewer tokens than it has directions is cut by its weights, and with a global
      budget all are then, as energies in different metrics have different units;
    - the SVD is that of the r x r core, exact, not a randomised one of DeltaW;
    - optimizer state is carried through the cut; the paper leaves open what becomes of it;
    - cut factors stay next to the old ones (`gauge: nearest`), for an optimizer that steps entry by entry.
    """

    metric: Annotated[
        MetricName, Field(description="what a cut preserves best: the weights, the layer's outputs, or the loss")
    ] = "weights"
    shape: Shape = "halving"
    allocate: Annotated[
        Literal["global", "uniform"],
        Field(description="who gives up rank: whoever loses least energy, or all alike"),
    ] = "global"
    energy: Annotated[
        float | None, Field(gt=0, lt=1, description="instead of a budget: share of its energy every module keeps")
    ] = None
    optimizer: Annotated[
        Carry, Field(description="optimizer state of squeezed modules: carried through the cut, or started afresh")
    ] = "carry"
    rewarm: Annotated[
        NonNegativeInt, Field(description="with reset: steps over which updates of squeezed modules ramp up again")
    ] = 50
    gauge: Annotated[
        Gauge,
        Field(
            description="factors after a cut: nearest to the old ones; or sorted by singular value, with |A| to |B| "
            "kept as it was or balanced"
        ),
    ] = "nearest"
    window: Annotated[
        PositiveInt, Field(description="steps before each event over which outputs and loss are measured")
    ] = 20
    memory: Annotated[
        PositiveInt, Field(description="measured steps that outputs and loss are averaged over, older ones fading away")
    ] = 20

    needs: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.A, Signal.B, Signal.MEAN_ZZ, Signal.MEAN_DD, Signal.MEASURED}
    )
    source: ClassVar[str] = "LoRA-Squeeze, arXiv 2602.10993"

    def check(self, layout: Layout) -> None:
        if (self.budget is None) == (self.energy is None):
            raise ConfigError("squeeze needs a budget, e.g. budget: {mean_rank: 4}, or params.energy, and not both")
        super().check(layout)

    # -- what it listens to -----------------------------------------------------------------------------------------

    @property
    def decay(self) -> float:
        return 1 - 1 / self.memory

    def listen(self, step: int) -> frozenset[Signal]:
        due = self.when.next(step - 1)
        signals: set[Signal] = set()
        averages = averages_of(self.metric)
        if due is not None and averages and due - step < self.window:
            signals = {*averages, Signal.MEASURED}
        return frozenset(signals | {Signal.A, Signal.B} if step == due else signals)

    # -- what it does -----------------------------------------------------------------------------------------------

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        target = self.target(state, step)
        idle = self._share(step) == 1 if target is None else target.spent(layout) <= target.amount
        if idle and all(slot.allows(slot.rank) for slot in layout.values()):
            return RankPlan(reason=f"the adapter is within {target or 'the energy to be kept'} already")
        present = [name for name, slot in layout.items() if slot.rank > 0]
        silent = set(present) & obs.unheard if averages_of(self.metric) else set()
        metrics, unmeasured = metric_of_each(
            self.metric,
            obs,
            {name: layout[name].rank for name in present if name not in silent},
            shared=target is not None and self.allocate == "global",
        )
        metrics |= dict.fromkeys(silent, "weights")
        spectra = {
            name: spectrum_in(metrics[name], obs[name][Signal.A], obs[name][Signal.B], layout[name].scaling, obs[name])
            for name in present
        }
        gains = {n: [0.0] * len(s.gains) if n in silent else s.gains.tolist() for n, s in spectra.items()}
        ranks = self._by_energy(spectra, layout, step) if target is None else self._by_budget(gains, layout, target)
        ops: dict[str, Sequence[Op]] = {}
        for name, rank in ranks.items():
            shrink = best_cut(partial(spectra.__getitem__, name), metrics.get(name, "weights"), self.gauge)
            if change := ops_to(rank, layout[name].rank, shrink):
                ops[name] = change
        left = f"energy {self._share(step):.4g}"
        if target is not None:
            left = target.unit(target.spent(layout.with_ranks(ranks)))
        reason = [f"{len(ops)} of {len(layout)} modules change, for {left}"]
        if total := math.fsum(map(math.fsum, gains.values())):
            lost = math.fsum(spectra[n].error(ranks[n]) ** 2 for n in ops if n in spectra and n not in silent)
            reason.append(f"{1 - lost / total:.3%} of the energy stays")
        if silent:
            reason.append(f"{len(silent)} modules that no gradient reaches count for nothing")
        if unmeasured:
            fallen = sum(metric == "weights" for name, metric in metrics.items() if name not in silent)
            reason.append(f"{fallen} modules by weights, as {unmeasured[0]} was not measured enough")
        rewarm = self.rewarm if self.optimizer == "reset" else 0
        margin = None
        if target is not None and self.allocate == "global":
            margin = allocation_margin(gains, ranks, layout, target)
        return RankPlan(ops, "; ".join(reason), state=self.optimizer, rewarm=rewarm, margin=margin)

    def _share(self, step: int) -> float:
        """The share of its energy that a module keeps at `step`; over all events they multiply to `energy`."""
        if self.energy is None:
            return 1.0
        before = self.when.progress(step - self.when.events.step)
        kept = curve(self.shape, 1.0, self.energy, before) if before > 0 else 1.0
        return curve(self.shape, 1.0, self.energy, self.when.progress(step)) / kept

    def _by_budget(self, gains: Mapping[str, Sequence[float]], layout: Layout, target: Budget) -> dict[str, int]:
        if self.allocate == "uniform":
            gains = {name: [0.0] * len(of) for name, of in gains.items()}
        return allocate(gains, layout, target)

    def _by_energy(self, spectra: Mapping[str, Spectrum], layout: Layout, step: int) -> dict[str, int]:
        """The smallest allowed ranks that keep the share due at `step`; what has no energy yet is left to learn."""
        ranks, share = layout.ranks, self._share(step)
        for unit in units(layout):
            known = [spectra[name] for name in unit.names if name in spectra]
            wanted = unit.rank
            if share < 1 and any(float(s.gains.sum()) > 0 for s in known):
                wanted = max(s.rank_for(share) for s in known)
            low, high = unit.span
            rank = next(unit.ranks(wanted, unit.rank), max(low, min(high, unit.rank)))
            ranks |= dict.fromkeys(unit.names, rank)
        return ranks
