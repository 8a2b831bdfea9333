"""Training state that says which rankflow wrote it, and whether it is whole.

It travels inside whatever file people save it in, so it carries its own checksum: one byte changed anywhere, in a
number or in a tensor, and it is refused instead of trained on.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, uint8

from rankflow import __version__
from rankflow.errors import CheckpointError
from rankflow.policies.lifecycle import Lifecycle

FORMAT = 2  # of the training state; goes up whenever an older rankflow could not read it


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """A snapshot of `state` (JSON values and tensors, which are copied to the CPU), its origin and its checksum."""
    sealed = _copied({"format": FORMAT, "rankflow": __version__, **state})
    return {**sealed, "checksum": _checksum(sealed)}


def check_seal(state: Any) -> dict[str, Any]:
    """`state`, if `seal` made it, in this format, and nothing in it has changed since; on whatever device it is now.

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
    """
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
    """The same whether the state was kept as JSON or as Python objects: lists and tuples are one."""
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
