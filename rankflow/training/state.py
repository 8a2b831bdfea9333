"""Training state: what a run saves to go on from, and going on from it.

It says which rankflow wrote it, and whether it is whole. It travels inside whatever file people save it in, so it
carries its own checksum: with one byte changed anywhere, in a number or in a tensor, it is refused.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from torch import Tensor, uint8

from rankflow._version import __version__
from rankflow.errors import CheckpointError
from rankflow.lora import site_edits
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan
from rankflow.plans.shrink import first, ops_to
from rankflow.policies.lifecycle import Lifecycle
from rankflow.training.phases import Phases

FORMAT = 2  # of the training state; goes up whenever an older rankflow could not read it


def state_of(phases: Phases) -> dict[str, Any]:
    """Everything that a run needs to go on, beside model and optimizer (`Controller.state_dict`)."""
    if phases.adapter.sharded and phases.gates:
        raise CheckpointError(
            f"gates of {phases.phase.name} hold on to factors that are in shards, and such a state cannot be saved; "
            "save when the phase is over"
        )
    state = {
        "step": phases.step,
        "total_steps": phases.total_steps,
        "phase": phases.index,
        "version": phases.surgeon.version,
        "seed": phases.seed,
        "lifecycle": {"title": str(phases.lifecycle), "settings": phases.lifecycle.settings()},
        "layout": phases.layout.to_json(),
        "first_layout": phases.first_layout.to_json(),
        "ledger": list(phases.ledger.events),
        "ramps": phases.surgeon.ramps.state_dict(),
        "averages": phases.surgeon.averages.state_dict(),
        "held": phases.surgeon.masked_ranks,
        "frozen": sorted(phases.operations.frozen),
        "hearing": phases.hearing.state_dict(),
        "policy": dict(phases.state),
        "gates": phases.gates.state_dict(),
        "held_out": phases.data.held_out.position if phases.data.held_out is not None else None,
    }
    return seal(state)


def go_on(phases: Phases, state: dict[str, Any]) -> None:
    """Take a checkpoint's state over: model and optimizer hold its tensors already.

    Raises:
        CheckpointError: it is of another policy, or live ranks are not its.
    """
    transaction = phases.transaction
    assert transaction is not None
    check_lifecycle(state, phases.lifecycle)
    layout = Layout.from_json(state["layout"])
    phases.surgeon.set_masked_ranks(state.get("held", {}), transaction)
    if (live := phases.adapter.layout().ranks) != layout.ranks:
        wrong = next(n for n in {**layout.ranks, **live} if layout.ranks.get(n) != live.get(n))
        raise CheckpointError(
            f"{wrong}: rank is {live.get(wrong)} but {layout.ranks.get(wrong)} in the checkpoint (step "
            f"{state['step']}); call rankflow.restore(model, checkpoint) before the optimizer is made, and hand "
            "this state to attach(state=...)"
        )
    if state["total_steps"] != phases.total_steps:
        warnings.warn(
            f"the run had {state['total_steps']} steps and now has {phases.total_steps}: percentages in the policy "
            "now mean other steps",
            stacklevel=2,
        )
    transaction.keep(phases, "first_layout", "all", "rewound", "counted")
    phases.first_layout = Layout.from_json(state["first_layout"])
    _, phases.all = phases.lifecycle.resolve(
        phases.total_steps, phases.first_layout, trains_more=phases.data.trains_more
    )
    phases.rewound = int(state["step"]) < phases.step
    phases.step = phases.counted = int(state["step"])
    for seeded in (phases, phases.surgeon, phases.gates, phases.probes, phases.data.held_out):
        if seeded is not None:
            transaction.attr(seeded, "seed", int(state["seed"]))
    phases.index = int(state["phase"])
    phases.state = dict(state["policy"])
    phases.pending = None
    transaction.keep(phases.surgeon, "_layout", "version")
    phases.surgeon.layout = layout
    for name, slot in layout.items():
        site_edits.recall(phases.adapter.sites[name], transaction, slot.scaling)
    phases.operations.freeze(set(state.get("frozen", ())), phases.now)
    phases.hearing.load_state_dict(state.get("hearing", {}), transaction)
    phases.surgeon.version = int(state["version"])
    phases.surgeon.ramps.load_state_dict(state["ramps"], transaction)
    phases.gates.load_state_dict(state["gates"], phases.policy.gate, phases.step, transaction)
    if phases.data.held_out is not None and state["held_out"] is not None:
        transaction.attr(phases.data.held_out, "position", state["held_out"])
    phases.surgeon.averages.load_state_dict(state.get("averages", {}))
    phases.ledger.restore(state["ledger"], phases.step)
    phases.listen()


def reshape(phases: Phases, layout: Layout) -> None:
    """Bring the adapter to the ranks of `layout`. Not an event of the run."""
    assert phases.transaction is not None
    phases.surgeon.listeners.part(phases.transaction)
    least = {name: min(layout[name].rank, slot.rank) for name, slot in phases.layout.items()}
    masked = bool(phases.surgeon.masked_ranks)  # the ranks within the capacities are only known once it is loaded
    wanted = least if masked else layout.ranks
    ops = {name: ops_to(wanted[name], slot.rank, first(range(slot.rank))) for name, slot in phases.layout.items()}
    phases.operations.perform(RankPlan(ops, "reshape", state="reset"), phases.now)
    if masked:
        phases.operations.set_capacity(layout.ranks, phases.now)


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state` (JSON values and tensors, on the CPU) with the version that wrote it and a checksum."""
    sealed = _copied({"format": FORMAT, "rankflow": __version__, **state})
    return {**sealed, "checksum": _checksum(sealed)}


def check_seal(state: Any) -> dict[str, Any]:
    """Return `state` if `seal` made it in this format and nothing in it has changed since, on whatever device it is
    now.

    Raises:
        CheckpointError: it is something else, of another format, or damaged.
    """
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError("this is not the training state of a rankflow run; give what flow.state_dict() returned")
    written = state["format"]
    if written != FORMAT:
        by = f"written by rankflow {state.get('rankflow', '0.1 or older')}, format {written!r}"
        here = f"this is rankflow {__version__}, which reads format {FORMAT}"
        if isinstance(written, int) and written > FORMAT:
            raise CheckpointError(f"training state {by}; {here}: upgrade it (pip install -U rankflow-lora)")
        raise CheckpointError(
            f"training state {by}; {here}: go on with that rankflow, or begin a new run from the adapter"
        )
    if state.get("checksum") != _checksum({key: value for key, value in state.items() if key != "checksum"}):
        raise CheckpointError(
            "training state is damaged: it is not what its checksum says; go on from an earlier checkpoint"
        )
    return state


def check_lifecycle(state: dict[str, Any], lifecycle: Lifecycle) -> None:
    """Check that `state` was saved under the policy and the settings of `lifecycle`.

    Raises:
        CheckpointError: `state` was come to under another policy than `lifecycle`, or under other settings of it.
    """
    title, saved, own = state["lifecycle"]["title"], state["lifecycle"]["settings"], lifecycle.settings()
    if own == saved:
        return
    differ = [key for key in {**saved, **own} if saved.get(key) != own.get(key)]
    named = [f"{key} is {saved.get(key, 'not there')} there and {own.get(key, 'not there')} here" for key in differ]
    named = next(([line] for line in named if ".policy is" in line), named)  # all else follows from that
    raise CheckpointError(
        f"the checkpoint (step {state['step']}) was made under the policy {title}, and this run has {lifecycle}: "
        f"{', '.join(named[:4])}; go on under the checkpoint's policy, or begin a new run from its adapter, without "
        "its state"
    )


def _checksum(state: dict[str, Any]) -> str:
    """A hash that is the same whether the state was kept as JSON or as Python objects: lists and tuples count as
    equal."""
    try:
        text = json.dumps(state, default=_fingerprint)
    except (TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"training state is damaged: it holds what no run has ({e})") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(value: Any) -> list[Any]:
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__}")
    raw = value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data
    return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _copied(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(of) for of in value]
    return value
