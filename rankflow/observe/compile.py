"""Keep scored steps eager under `torch.compile`, and warn of ranks that change more often than it compiles."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn

# -- scored steps -----------------------------------------------------------------------------------------------------

_listeners: set[int] = set()
_stance: list[Any] = []  # the one that the first listener set, until the last has left


def stay_eager(listener: object) -> weakref.finalize:
    """Make compiled code run eagerly until what is returned is called, or `listener` is gone.

    A compiled graph would ignore the hooks of who listens. Listeners come and go in any order; after the last one the
    stance is again what it was before the first.
    """
    leave = weakref.finalize(listener, _leave, id(listener))  # first: whatever interrupts the rest is undone by it
    if not _listeners:
        _stance.append(torch.compiler.set_stance("force_eager"))
    _listeners.add(id(listener))
    return leave


def _leave(listener: int) -> None:
    _listeners.discard(listener)
    if not _listeners and _stance:
        _stance.pop().__exit__(None, None, None)


# -- ranks that change ------------------------------------------------------------------------------------------------


def compiled_modules(model: nn.Module) -> int:
    """How many modules of one class are compiled, each by itself, in `model` or as it; 0 where it is not compiled.

    Modules of one class share what torch compiles of their code, and the limit on it.
    """
    wrapper = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None or isinstance(m, wrapper)]
    return max(Counter(type(m) for m in compiled).values(), default=0)


def warn_of_recompiles(compiled: int, decisions: int) -> None:
    """Warn if `decisions` on ranks can bring `compiled` modules of one class more shapes than torch compiles.

    It compiles code anew for each combination of shapes, up to `torch._dynamo.config.recompile_limit` times. Then new
    shapes run eagerly, and only torch's log says so.
    """
    if not (compiled and decisions):
        return
    if 1 + compiled * decisions > (limit := recompile_limit()):
        warnings.warn(
            f"the model is under torch.compile, and {decisions} decisions may change its ranks. torch compiles the "
            f"same code for at most {limit} combinations of shapes and then runs new ones eagerly, without an error. "
            "Let ranks come back to shapes that are compiled already (rank_buckets, and tie for the modules of a "
            "layer), keep shapes as they are (mode: mask), decide less often, or raise "
            "torch._dynamo.config.recompile_limit",
            stacklevel=4,
        )


def recompile_limit() -> int:
    """How many versions of one code object torch makes."""
    from torch._dynamo import config  # takes a while, and is there if anything is compiled

    return int(getattr(config, "recompile_limit", None) or config.cache_size_limit)
