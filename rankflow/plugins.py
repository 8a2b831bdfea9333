"""What other people's packages add to rankflow, by name: policies, optimizers, formats and engines.

A package declares what it adds in its own pyproject.toml, and once it is installed rankflow finds it by that name:

    [project.entry-points."rankflow.policies"]
    my_policy = "my_package.my_module:MyPolicy"

The groups are `rankflow.policies`, `rankflow.optimizers`, `rankflow.formats` and `rankflow.engines`. Nothing of a
package is imported before something asks for what it added, so that a broken one is in nobody's way.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from rankflow.errors import ConfigError, first_line

_REGISTERED: dict[str, dict[str, Any]] = {}  # group -> name -> what was registered in this process


class Plugins:
    """What packages and scripts have added to one group.

    Args:
        group: of the entry points, `rankflow.policies` say.
        shipped: gives the names that rankflow itself has, which nobody else may take.
        check: is called with the name and what was found under it, and raises ConfigError if that is not what the
            group is made of.
    """

    def __init__(
        self,
        group: str,
        shipped: Callable[[], Collection[str]],
        check: Callable[[str, Any], None] = lambda name, found: None,
    ):
        self.group = group
        self._shipped = shipped
        self._check = check
        self._registered = _REGISTERED.setdefault(group, {})

    def names(self) -> list[str]:
        """All names that were added, in order of the alphabet; nothing is imported."""
        return sorted({*self._registered, *_installed(self.group)} - set(self._shipped()))

    def load(self, name: str) -> Any:
        """What was added under `name`.

        Raises:
            ConfigError: there is no such name, the package that has it cannot be imported, or has something else there.
        """
        if name in self._registered:
            return self._registered[name]
        self.refuse_clash(name)
        found = _installed(self.group).get(name, ())
        if not found:
            raise ConfigError(f"{self.group}: nothing is called {name!r}; known: {', '.join(self.names())}")
        [declared] = found
        try:
            value = declared.load()
        except Exception as e:  # of a stranger's module, anything
            raise ConfigError(
                f"{self.group}: {name} is {_where(declared)}, which cannot be imported: {type(e).__name__}: "
                f"{first_line(e)}; repair or uninstall the package"
            ) from e
        try:
            self._check(name, value)
        except ConfigError as e:
            raise ConfigError(f"{self.group}: {name} is {_where(declared)}: {e}") from None
        return value

    def register(self, name: str, value: Any) -> None:
        """Add something for as long as this process lives; a name that was registered before gets the new meaning.

        Raises:
            ConfigError: the name is taken by rankflow itself or an installed package, is no name, or the value is not
                what the group is made of.
        """
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise ConfigError(f"{self.group}: {name!r} is no name; it takes letters, digits and underscores")
        if name in self._shipped():
            raise ConfigError(f"{self.group}: rankflow itself has {name!r}; register yours under another name")
        if found := _installed(self.group).get(name):
            raise ConfigError(f"{self.group}: {name} is {_where(found[0])} already; register yours under another name")
        self._check(name, value)
        self._registered[name] = value

    def refuse_clash(self, name: str) -> None:
        """
        Raises:
            ConfigError: more than one has this name: rankflow itself and a package, or two packages.
        """
        found = _installed(self.group).get(name, ())
        if len(found) + (name in self._shipped()) > 1:
            who = [*(["rankflow's own"] if name in self._shipped() else []), *map(_where, found)]
            raise ConfigError(
                f"{self.group}: {name!r} is {' and '.join(who)}; which of them is meant nobody can tell, so uninstall "
                "one of the packages"
            )


def files_of(package: ModuleType) -> Iterator[ModuleType]:
    """The modules of one of rankflow's own folders, imported, in order of the alphabet."""
    for file in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{file.name}")


def name_of(group: str, value: Any) -> str | None:
    """The name that `value`, a class or function, was added to the group under; None if it was not. Imports nothing."""
    for name, registered in _REGISTERED.get(group, {}).items():
        if registered is value:
            return name
    at, installed = f"{value.__module__}:{value.__qualname__}", _installed(group)
    return next((name for name, found in installed.items() if at in [declared.value for declared in found]), None)


def snake_case(name: str) -> str:
    """`my_policy` of `MyPolicy`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def import_plugin(module: str) -> None:
    """Import the module of that name, which registers what it has to add. It may lie in the working directory.

    Raises:
        ConfigError: it cannot be imported.
    """
    if module.endswith(".py") or os.sep in module:
        raise ConfigError(f"plugin {module}: give a module's name, as `import` takes it, not a path")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides an installed module
    try:
        importlib.import_module(module)
    except Exception as e:  # of a stranger's module, anything
        raise ConfigError(f"plugin {module} cannot be imported: {type(e).__name__}: {first_line(e)}") from e


def _installed(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by name: more than one where several packages have it."""
    return _declared(group, tuple(sys.path))


@cache
def _declared(group: str, path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """`path` is where packages are looked for, which takes a while and changes seldom."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for declared in entry_points(group=group):
        found[declared.name] = (*found.get(declared.name, ()), declared)
    return found


def _where(declared: EntryPoint) -> str:
    package = f" of package {declared.dist.name} {declared.dist.version}" if declared.dist is not None else ""
    return f"{declared.value}{package}"
