"""Compare a saved adapter with its base model's weights, which are read one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankflow.analysis.intruders import Intruders, check_intruder_options, intruders
from rankflow.errors import ConfigError
from rankflow.formats.base import SavedAdapter
from rankflow.formats.io.models import open_model, weight_of
from rankflow.formats.io.tensors import all_finite
from rankflow.formats.open import uses_base
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.linalg.parallel import Progress

_KINDS = ("linear", "conv")


@dataclass(frozen=True)
class AgainstBase:
    """Module -> its intruder dimensions; `notes` say which modules are not among them, and what is not certain."""

    found: dict[str, Intruders]
    notes: tuple[str, ...]


def compare(
    adapter: SavedAdapter, base: Path, *, top_k: int = 10, epsilon: float = 0.5, progress: Progress | None = None
) -> AgainstBase:
    """Intruder dimensions of every module that has a matrix of its own in the base.

    Raises:
        ConfigError: an option out of range, DoRA, or no model as the base, or another one.
        AdapterError: a file that is damaged.
    """
    check_intruder_options(top_k, epsilon)
    config = adapter.config if isinstance(adapter, PeftAdapter) else {}
    if config.get("use_dora"):
        raise ConfigError(f"{adapter.path}: DoRA rescales W0 + DeltaW; intruders are counted for LoRA without it")
    try:
        weights = open_model(base)
    except ConfigError as e:
        if uses_base(adapter.path):  # which may have been given for its shapes alone
            return AgainstBase({}, (f"intruders were not looked for: {e}",))
        raise
    there = {
        name: W0
        for name, slot in adapter.layout.items()
        if slot.kind in _KINDS and (W0 := weight_of(weights, name)) is not None
    }
    if not there:
        raise ConfigError(f"{base}: has none of the adapter's modules; give the base that it was trained on")
    found, quantised = {}, []
    for done, (name, W0) in enumerate(there.items(), 1):
        if progress is not None:
            progress(done, len(there))
        if not W0.is_floating_point() or W0.itemsize < 2:
            quantised.append(name)
            continue
        if not all_finite(W0):
            raise ConfigError(f"{base}: the weight of {name} has NaN or infinite values; download the model again")
        a, b = adapter.factors(name)
        if _too_large(W0, a, adapter.layout[name].scaling * b):
            raise ConfigError(f"{base}: {name} has values in it or in {adapter.path} too large to be compared with")
        W0 = _oriented(W0, (len(b), a.shape[-1]), bool(config.get("fan_in_fan_out")), f"{base}: {name}")
        found[name] = intruders(W0, a, b, adapter.layout[name].scaling, top_k=top_k, epsilon=epsilon)
    undecided = [name for name, i in found.items() if i.undecided]
    return AgainstBase(
        found,
        (
            *_said("have no matrix in the base to compare with", [n for n in adapter.layout if n not in there]),
            *_said("have a quantised weight in the base, which is not looked at", quantised),
            *_said("have directions that are intruders or not by estimate only", undecided),
        ),
    )


def _too_large(W0: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether sums of squares of W0 or B A may be above what is computed in can hold."""
    most = torch.finfo(torch.float64 if W0.dtype == torch.float64 else torch.float32).max
    sizes = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (W0, a, b)]
    return not max(sizes[0], sizes[1] * sizes[2], *sizes) < math.sqrt(most) / 4


def _oriented(W0: Tensor, shape: tuple[int, int], turned: bool, what: str) -> Tensor:
    """The weight as ``[out, in]``; transformers' Conv1D has it the other way round."""
    W0 = W0.flatten(1) if W0.ndim > 2 else W0.mT if turned and W0.ndim == 2 else W0
    if tuple(W0.shape) != shape:
        raise ConfigError(
            f"{what} is {list(W0.shape)} and the adapter's is {list(shape)}; give the base that it was trained on"
        )
    return W0


def _said(what: str, names: Sequence[str]) -> list[str]:
    few = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
    return [f"{len(names)} modules {what}: {few}"] if names else []
