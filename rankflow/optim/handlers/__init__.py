"""One file an optimizer family: what it handles, and how it carries its state through a change of rank.

A file has `HANDLERS`, a mapping from classes to handlers, and nothing else has to know of it. `torch.optim.Adam` is the
class `Adam` of torch.optim or of a module in it, `Lion` one of any package, and `bitsandbytes.*` all of a package. A
handler is a `Handler`; a function that makes one from the optimizer, None if its state cannot be carried; or `Refused`.

Packages add their own under the entry-point group `rankflow.optimizers`, an entry for each such mapping.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch.optim import Optimizer

from rankflow.errors import ConfigError, OptimizerError
from rankflow.optim.handler import Handler, Refused
from rankflow.plugins import Plugins

Handles = Handler | Refused | Callable[[Optimizer], Handler | None]


class Registered(NamedTuple):
    """What handles the optimizers that `classes` names."""

    classes: str
    handler: Handles

    @property
    def anybodys(self) -> bool:
        """Whether any package may have such a class, so that nobody can know what else it does."""
        return "." not in self.classes

    def names(self, cls: type) -> bool:
        """Whether `cls` is one of them."""
        package, _, name = self.classes.rpartition(".")
        within = f"{cls.__module__}.".startswith(f"{package}.") or not package
        return within and name in ("*", cls.__qualname__.rpartition(".")[2])


def find_handler(optimizer: Optimizer) -> Handler | None:
    """Return the handler of the optimizer's class, or of its nearest known ancestor.

    Raises:
        OptimizerError: an optimizer that a resize would break.
        ConfigError: an installed package's handlers cannot be had.
    """
    for cls in type(optimizer).__mro__:
        if (found := registered(cls)) is None:
            continue
        if isinstance(found.handler, Refused):
            name = cls.__qualname__
            raise OptimizerError(f"{name} cannot follow a resize: {found.handler.why}. Use torch.optim.AdamW")
        return found.handler if isinstance(found.handler, Handler) else found.handler(optimizer)
    return None


def registered(cls: type) -> Registered | None:
    """What handles optimizers of exactly this class: a file here that names it, else a package, else anybody's name."""
    shipped = [r for file in files() for r in _registered(importlib.import_module(f"{__name__}.{file}").HANDLERS)]
    added = (r for name in PLUGINS.names() for r in _registered(PLUGINS.load(name)))
    named, anybodys = ([r for r in shipped if r.anybodys == so] for so in (False, True))
    return next((r for r in chain(named, added, anybodys) if r.names(cls)), None)


def _registered(handlers: Mapping[str, Handles]) -> list[Registered]:
    return [Registered(*item) for item in handlers.items()]


def files() -> list[str]:
    """The families that have a file in this folder."""
    return [file.name for file in pkgutil.iter_modules(__path__)]


def _check(name: str, handlers: Any) -> None:
    fits = isinstance(handlers, Mapping) and all(
        isinstance(classes, str) and (isinstance(value, Handler | Refused) or callable(value))
        for classes, value in handlers.items()
    )
    if not fits:
        raise ConfigError("it is no mapping from names of classes to handlers (rankflow.optim.handlers)")


PLUGINS = Plugins("rankflow.optimizers", files, _check)
