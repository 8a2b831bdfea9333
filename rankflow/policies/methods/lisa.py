"""LISA: a few layers train at a time, drawn anew every so many steps; the others are frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from rankflow.errors import ConfigError
from rankflow.linalg.random import keyed_generator
from rankflow.plans.layout import Layout
from rankflow.plans.limits import matching
from rankflow.plans.names import layer_of
from rankflow.plans.ops import Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Lisa(Policy):
    """LISA (arXiv 2403.17919) on the modules of a LoRA adapter: a few layers train, drawn anew at each event.

    `active` layers are drawn uniformly, without replacement; all others are frozen until they are drawn again.
    A layer is all modules whose names agree up to the last of their parts that is a number (`model.layers.3` of
    `model.layers.3.mlp.up_proj`); a module without one is a layer by itself. No rank changes. A frozen module stays bit
    for bit, weight decay included, and its optimizer state waits for it. What was frozen before the phase stays so.

    When to use: ranks have to stay, as with an adapter that PiSSA started, and training is to touch a few layers at a
    time.

    Differs:
    - LISA trains the full weights of the layers it draws; here only their LoRA factors train, so its saving of memory
      is not to be had;
    - embedding and head, which LISA always trains, are layers like others unless `always` names them;
    - up to the first event, the first step of a run at the earliest, all layers train.
    """

    when: When = field(default_factory=lambda: When(start=1, every=20))

    active: Annotated[PositiveInt, Field(description="layers that train at a time")] = 2
    group: Annotated[
        Literal["layer", "module"],
        Field(description="what is drawn: all modules of a layer together, or each module by itself"),
    ] = "layer"
    always: Annotated[
        tuple[str, ...],
        Field(strict=False, description="globs, or `re:` and regular expressions: modules that train at all times"),
    ] = ()
    seed: Annotated[NonNegativeInt, Field(description="of the draws, together with the step")] = 0

    grows: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    lowers: ClassVar[bool] = False
    source: ClassVar[str] = "LISA, arXiv 2403.17919, on LoRA modules"

    def check(self, layout: Layout) -> None:
        super().check(layout)
        self.require_events()
        errors: list[str] = []
        for pattern in self.always:
            matching(pattern, layout, errors)
        if errors:
            raise ConfigError("\n".join(f"lisa: always: {e}" for e in errors))
        if (there := len(self._layers(self.init(layout), layout))) <= self.active:
            raise ConfigError(
                f"lisa trains {self.active} of {there} {self.group}s, so none would ever rest; lower active"
                + (" or use group: module" if self.group == "layer" else "")
            )

    def init(self, layout: Layout) -> State:
        """`free`: which modules may train, bool ``[modules]``."""
        return {"free": torch.tensor([slot.trainable for slot in layout.values()])}

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        layers = self._layers(state, layout)
        order = torch.randperm(len(layers), generator=keyed_generator(self.seed, "lisa", step)).tolist()
        drawn = [list(layers)[i] for i in sorted(order[: self.active])]
        ops = {
            name: (Train(layer in drawn),)
            for layer, names in layers.items()
            for name in names
            if layout[name].trainable != (layer in drawn)
        }
        if not ops:
            return RankPlan(reason=f"{', '.join(drawn)} train on")
        return RankPlan(ops, f"{', '.join(drawn)} train, of {len(layers)} {self.group}s")

    def _layers(self, state: State, layout: Layout) -> dict[str, list[str]]:
        """What can be drawn -> its modules."""
        spared = {name for pattern in self.always for name in matching(pattern, layout, [])}
        layers: dict[str, list[str]] = {}
        for (name, slot), free in zip(layout.items(), state["free"].tolist(), strict=True):
            if free and slot.rank > 0 and name not in spared:
                layers.setdefault(layer_of(name) if self.group == "layer" else name, []).append(name)
        return layers
