"""What a run will take in memory and in messages between processes, by the layout an adapter has or would have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from rankflow.errors import ConfigError, first_line
from rankflow.formats.io.pretrained import build, load_config
from rankflow.lora.adapter import Adapter
from rankflow.observe.averages import AVERAGED, sources
from rankflow.plans.allocate import even
from rankflow.plans.layout import Layout, Slot
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import Phase
from rankflow.policies.observation import Signal

_WIDE = 8  # bytes of a number that is summed up: statistics, and all that processes tell one another
_MOMENTS = 2  # of Adam and AdamW, in the dtype of the factors

# Numbers that one module's signal holds; what is read off the factors when asked for takes no room.
_NUMBERS: Mapping[Signal, Callable[[Slot, int], int]] = {
    Signal.GRAD_A: lambda slot, q: slot.experts * slot.rank * slot.in_features,
    Signal.GRAD_B: lambda slot, q: slot.experts * slot.rank * slot.out_features,
    Signal.DELTA_SCORE: lambda slot, q: 1,
    Signal.DELTA_SCORE_SAMPLED: lambda slot, q: 1,
    Signal.PATH_SCORE: lambda slot, q: 1,
    Signal.WEIGHT_SCORE: lambda slot, q: 1,
    Signal.TOKENS: lambda slot, q: 1,
    Signal.INPUT_ENERGY: lambda slot, q: 1,
    Signal.S_A: lambda slot, q: slot.experts * slot.rank**2,
    Signal.S_B: lambda slot, q: slot.experts * slot.rank**2,
    Signal.SKETCH: lambda slot, q: q * slot.in_features,
    Signal.INPUT_SAMPLE: lambda slot, q: 16 * slot.in_features,  # of each batch
    Signal.INPUTS: lambda slot, q: min(q, slot.in_features) * slot.in_features,
    Signal.GATE_GRAD: lambda slot, q: slot.rank,
    Signal.MEAN_ZZ: lambda slot, q: slot.experts * slot.rank**2,
    Signal.MEAN_DD: lambda slot, q: slot.experts * slot.rank**2,
    Signal.MEASURED: lambda slot, q: slot.rank,
}
_ROWS = frozenset({Signal.SKETCH, Signal.INPUTS})  # which plans hand on, for new directions to come from
_OWN = frozenset({Signal.INPUTS, Signal.INPUT_ENERGY, Signal.INPUT_SAMPLE})  # which no process tells another


@dataclass(frozen=True)
class Cost:
    """In bytes, for one process.

    `step` is what its gradients add to every optimizer step when they are reduced; `listen` what a step adds that the
    policy listens to, and `resize` the most that one decision sends: every module in another basis, at the ranks of
    `layout`, from those before, and what new directions come from.
    """

    when: str
    layout: Layout
    adapter: int
    optimizer: int
    statistics: int
    step: int
    listen: int
    resize: int


def foretell(layout: Layout, phases: Sequence[Phase], *, sketch_rows: int = 16) -> list[Cost]:
    """At the start and at the end of each phase, budgets spread evenly over modules; gradients take as much memory as
    the adapter does. What comes back from activations, as while a step is listened to, is not in it."""
    first = phases[0]
    found = [_cost("at the start", layout, layout, first.policy, sketch_rows)]
    for phase in phases:
        before = layout
        if phase.policy.budget is not None:
            layout = layout.with_ranks(even(layout, phase.policy.budget))
        found.append(_cost(f"after {phase.name}", before, layout, phase.policy, sketch_rows))
    return found


def _cost(when: str, before: Layout, layout: Layout, policy: Policy, sketch_rows: int) -> Cost:
    events = policy.when.events
    asked = [(study.signals, study.components) for study in policy.studies]
    asked += [(policy.listen(events[0]), sketch_rows)] if events else []
    heard = [(sources(signals), q) for signals, q in asked]
    state = sum(t.numel() * t.element_size() for t in policy.init(layout).values())
    basis = sum(slot.experts * before[name].rank * slot.rank for name, slot in layout.items())
    return Cost(
        when,
        layout,
        adapter=layout.bytes,
        optimizer=_MOMENTS * layout.bytes,
        statistics=state + _bytes(layout, heard) + _bytes(layout, asked, AVERAGED),
        step=layout.bytes,
        listen=_bytes(layout, heard, frozenset(Signal) - _OWN),
        resize=_WIDE * 2 * basis + _bytes(layout, heard, _ROWS),
    )


def _bytes(layout: Layout, heard: Iterable[tuple[Collection[Signal], int]], among: Collection[Signal] = Signal) -> int:
    wanted = [(_NUMBERS[s], q) for signals, q in heard for s in signals if s in _NUMBERS and s in among]
    return _WIDE * sum(numbers(slot, q) for numbers, q in wanted for slot in layout.values() if slot.rank)


def blank_layout(folder: Path, target_modules: Sequence[str] | None, rank: int) -> Layout:
    """Return the layout that a new adapter would have on a model, from the model's config alone. No weight is read or
    made.

    `target_modules` are PEFT's, all linears if None; every module starts at `rank`.

    Raises:
        ConfigError: the folder's config names no architecture that transformers has, or PEFT finds nothing to adapt.
    """
    config = load_config(folder, what="transformers model", local_files_only=True)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it has since renamed
        model = build(config, folder)
        wanted = list(target_modules) if target_modules else "all-linear"
        try:
            return Adapter(get_peft_model(model, LoraConfig(r=rank, target_modules=wanted))).layout()  # type: ignore[arg-type]
        except ValueError as e:
            raise ConfigError(f"{folder}: PEFT cannot adapt {target_modules or 'it'}: {first_line(e)}") from None
