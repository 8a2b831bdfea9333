"""Whether ranks that change are about to turn `torch.compile` off, of which torch itself says a word in its log only.

torch keeps what it compiles by code object, a version for every combination of shapes that the code meets (and of
whatever else it depends on). Modules of one class have one code object, so a compiled model has a version for each
combination of all its ranks, and layers compiled one by one share versions where their ranks agree. Beyond
`torch._dynamo.config.recompile_limit` versions of a code object, shapes that are new run eagerly.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from rankflow.lora.adapter import Adapter

Shapes = frozenset[tuple[object, ...]]


class Recompiles:
    """Watches the code of modules that hold adapted ones, from when it is made. Does not import `torch._dynamo`.

    Code counts as compiled if its versions have become more since, or if `model`, what was attached to, shows it: it
    holds or is what `torch.compile` gives, or has layers that were compiled in place. Versions that
    `isolate_recompiles` keeps apart are counted together, which errs towards warning.
    """

    def __init__(self, model: nn.Module, adapter: Adapter):
        self._model = model
        self._adapter = adapter
        self._warned = False
        self._met = {id(code): shapes for code, shapes, _, _ in self._codes()}
        self._before = {id(code): versions(code) or 0 for code, _, _, _ in self._codes()}

    def look(self, decisions: int) -> None:
        """Ranks have changed, and as many more `decisions` could make shapes that were not there before: warn, once, if
        that can come to more versions than torch makes."""
        if self._warned or "torch._dynamo" not in sys.modules:
            return
        for code, shapes, compiled, of in self._codes():
            met = self._met.get(id(code), frozenset())
            self._met[id(code)] = met | shapes
            new = len(shapes - met)
            have = versions(code)
            if have is None:
                have = len(met)
            else:
                before = self._before[id(code)] = min(have, self._before.get(id(code), 0))
                compiled = compiled or have > before
            if not (compiled and new):
                continue
            soon = have + math.ceil(new * max(1.0, have / max(1, len(met))))
            if soon + new * decisions > limit():
                self._warned = True
                self._warn(of, have, soon, new * decisions)
                return

    def _warn(self, of: str, have: int, soon: int, later: int) -> None:
        further = f", and the decisions to come up to {later} more" if later else ""
        warnings.warn(
            f"{of} is under torch.compile and was compiled {have} times so far; these ranks make that {soon}{further}, "
            f"but torch compiles it {limit()} times at most and then runs new shapes eagerly, without an error. Let "
            "ranks come back to shapes that are compiled already (rank_buckets, and tie for the modules of a layer), "
            "keep shapes as they are (mode: mask), decide less often, or raise torch._dynamo.config.recompile_limit",
            stacklevel=6,
        )

    def _codes(self) -> Iterator[tuple[CodeType, Shapes, bool, str]]:
        """Code that may run adapted modules, the combinations of shapes it meets now, whether it is known to be
        compiled, and whose it is."""
        modules = dict(self._model.named_modules())
        layers = {id(site.layer): site for site in self._adapter.sites.values()}
        held: dict[str, list[tuple[object, ...]]] = {}
        for name, module in modules.items():
            if (site := layers.get(id(module))) is not None:
                parts = name.split(".") if name else []
                for i in range(len(parts) + 1):
                    shape = (site.A.shape, site.B.shape, site.A.requires_grad) if site.placed else None
                    held.setdefault(".".join(parts[:i]), []).append((".".join(parts[i:]), shape))
        found: dict[int, tuple[CodeType, set[tuple[object, ...]], list[bool], str]] = {}
        wrapper = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
        for name, holding in held.items():
            module = modules[name]
            within = modules.get(name.rpartition(".")[0]) if name else None
            shown = module._compiled_call_impl is not None or isinstance(within, wrapper)
            for code in _codes_of(module):
                _, shapes, marks, _ = found.setdefault(id(code), (code, set(), [], f"{type(module).__name__}.forward"))
                shapes.add(tuple(holding))
                marks.append(shown)
        for code, shapes, marks, of in found.values():
            yield code, frozenset(shapes), any(marks), of


def _codes_of(module: nn.Module) -> Iterator[CodeType]:
    """Of its forward, and of what decorators have made of that."""
    function: Any = module.forward
    while function is not None:
        function = getattr(function, "__func__", function)
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


def versions(code: CodeType) -> int | None:
    """How many compiled versions of `code` there are; None where this torch does not tell."""
    try:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list  # is there without torch._dynamo
    except ImportError:
        return None
    return len(_debug_get_cache_entry_list(code))


def limit() -> int:
    """How many versions of one code object torch makes; `torch._dynamo` has been imported."""
    config: Any = sys.modules["torch._dynamo"].config
    own = config.recompile_limit if hasattr(config, "recompile_limit") else config.cache_size_limit
    total = "accumulated_recompile_limit"
    return min(own, getattr(config, total) if hasattr(config, total) else config.accumulated_cache_size_limit)
