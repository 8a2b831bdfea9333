"""Finding who still holds parameters that a resize has replaced, and hooks that are on old ones alone."""

from __future__ import annotations

import gc
import types
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rankflow.lora.transaction import Transaction
from rankflow.optim.optimizer_state import Swap

Watched = Sequence[tuple[str, "weakref.ref[nn.Parameter]"]]
_ROLES = {"A", "B", "bias", "magnitude"}
_SAMPLE = 8  # parameters that holders are looked for of: a list of old ones mostly holds them all
# Local variables and graphs of a loss that somebody keeps are no lists that are used again.
_PASSING = (
    types.FrameType,
    types.GeneratorType,
    types.CoroutineType,
    types.CellType,
    types.TracebackType,
    torch.Tensor,
    torch._C._FunctionBase,
)


class Holders:
    """Warns, once, of whoever holds parameters that were replaced, and once of hooks that went with them. Holds none
    itself, and does nothing on steps after which none were."""

    def __init__(self) -> None:
        self._watched: Watched = ()
        self._hooked: Watched = ()  # new ones, in the place of some that had hooks
        self._warned = False
        self._warned_of_hooks = False

    def watch(self, transaction: Transaction, swaps: Iterable[Swap]) -> None:
        """Remember the parameters that these swaps have replaced."""
        old = [
            (swap.site.name, weakref.ref(p))
            for swap in swaps
            for role, p in swap.old.items()
            if p is not swap.new.get(role)
        ]
        hooked = [
            (swap.site.name, weakref.ref(p))
            for swap in swaps
            for role, p in swap.new.items()
            if role in swap.old and p is not swap.old[role] and _has_hooks(swap.old[role])
        ]
        transaction.attr(self, "_watched", (*self._watched, *old))
        transaction.attr(self, "_hooked", (*self._hooked, *hooked))

    def look(self) -> None:
        """Warn of those who still hold replaced parameters. To be called a step later, when the graph of the step
        before is gone, and before gradients are clipped."""
        hooked, self._hooked = self._hooked, ()
        bare = [name for name, ref in hooked if (p := ref()) is not None and not _has_hooks(p)]
        if bare and not self._warned_of_hooks:
            self._warned_of_hooks = True
            warnings.warn(
                f"hooks on parameters of {_some(bare)} that a resize has replaced (register_hook, "
                "register_post_accumulate_grad_hook) are not called any more: put them on the new ones in a "
                "callback registered with on_resize, of the flow or of RankFlowCallback",
                stacklevel=3,
            )
        if not self._watched:
            return
        watched, self._watched = self._watched, ()
        if self._warned or _holder(watched) is None:
            return
        gc.collect()  # cycles that nobody holds any more look like holders
        if (holder := _holder(watched)) is not None:
            self._warned = True
            names = _some(name for name, ref in watched if ref() is not None)
            warnings.warn(
                f"{holder} still holds parameters of {names} that a resize has replaced: "
                "clipping, averaging or stepping them does nothing any more. Ask model.parameters() or "
                "flow.parameters() for them each time, or register a callback with on_resize, of the flow or of "
                "RankFlowCallback, to put the new ones in their place; delete what is not used again",
                stacklevel=3,
            )


def ours(hook: Any) -> bool:
    """Return whether a hook belongs to a run."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("rankflow.")


def _has_hooks(p: nn.Parameter) -> bool:
    hooks = (*(p._backward_hooks or {}).values(), *(p._post_accumulate_grad_hooks or {}).values())
    return not all(map(ours, hooks))


def _some(names: Iterable[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def _holder(watched: Watched) -> str | None:
    """The type of an object that holds some of them, in words; None where only local variables and graphs do."""
    alive = [p for _, ref in watched if (p := ref()) is not None][:_SAMPLE]
    p = None  # else the last is held by this very frame
    if not alive:
        return None
    for holder in gc.get_referrers(*alive):
        if isinstance(holder, types.CellType) and (function := _closed_over_by(holder)) is not None:
            return f"the function {function.__qualname__}"
        if holder is not alive and not isinstance(holder, _PASSING) and not _known(holder):
            size = f" of {len(holder)}" if isinstance(holder, list | tuple | set | dict) else ""
            return f"a {type(holder).__name__}{size}"
    return None


def _closed_over_by(cell: types.CellType) -> types.FunctionType | None:
    """The function that closes over the variable; None where only a frame has it, which shared it with functions that
    are gone."""
    closures = [c for c in gc.get_referrers(cell) if isinstance(c, tuple)]
    holders = gc.get_referrers(*closures) if closures else ()
    return next((f for f in holders if isinstance(f, types.FunctionType)), None)


def _known(holder: Any) -> bool:
    """Whether it is the variables of a script or a notebook, whose loops leave one behind, or what callbacks were
    handed, which the traceback of a failed step may keep."""
    if not isinstance(holder, dict):
        return False
    return ("__name__" in holder and "__builtins__" in holder) or holder.keys() <= _ROLES
