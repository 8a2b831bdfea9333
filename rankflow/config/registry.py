"""Policies by name: those shipped, those of installed packages, and those that a script has registered."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints, overload

import pydantic
from pydantic import BaseModel, ConfigDict, create_model
from pydantic.errors import PydanticUserError

import rankflow.policies.methods
from rankflow.errors import ConfigError, first_line
from rankflow.plugins import Plugins, snake_case
from rankflow.policies.base import GROUP, Policy

P = TypeVar("P", bound=type[Policy])


class Strict(BaseModel):
    """A mapping of a policy file: no key that is not known, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@cache
def shipped_policies() -> frozenset[str]:
    """Names of the policies that rankflow has itself: one file each."""
    return frozenset(module.name for module in pkgutil.iter_modules(rankflow.policies.methods.__path__))


def shipped() -> dict[str, Path]:
    """The policy files that come with rankflow, by name: from the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).parents[1] / "policy_files"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def policy_names() -> list[str]:
    """The policies there are; nothing of other people's is imported."""
    return sorted({*shipped_policies(), *PLUGINS.names()})


def policy_class(name: str) -> type[Policy]:
    """The policy of that name.

    Raises:
        ConfigError: nothing has that name, more than one has, or what has it is broken.
    """
    PLUGINS.refuse_clash(name)
    return shipped_policy(name) if name in shipped_policies() else PLUGINS.load(name)


@cache
def shipped_policy(name: str) -> type[Policy]:
    """The one policy in the file of that name.

    Raises:
        ConfigError: a file that does not define exactly one.
    """
    module = importlib.import_module(f"rankflow.policies.methods.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(f"policies/{name}.py defines {len(found)} policies; it must define exactly one")
    return found[0]


@overload
def register_policy(policy: P, name: str | None = None) -> P: ...
@overload
def register_policy(*, name: str | None = None) -> Callable[[P], P]: ...
def register_policy(policy: Any = None, name: str | None = None) -> Any:
    """Make a policy of your own known by name in this process: to policy files, mappings, `rankflow policies` and all
    else that takes a policy's name. Its fields become the `params` of its YAML, as strictly checked as shipped ones.

    Also a decorator, `@register_policy` or `@register_policy(name="my_policy")`. Registering a name again, as a
    notebook does, gives it the new meaning.

    Args:
        policy: a frozen dataclass derived from `Policy`.
        name: what YAML calls it; the class's name in snake case if left out.

    Returns:
        The policy, as it was.

    Raises:
        ConfigError: the name is an installed package's or rankflow's own, a policy's or a shipped policy file's; or
            this is no policy.
    """
    if policy is None:
        return lambda decorated: register_policy(decorated, name)
    PLUGINS.register(name or snake_case(getattr(policy, "__name__", type(policy).__name__)), policy)
    return policy


@cache
def params_model(cls: type[Policy]) -> type[Strict]:
    """The model of a policy's `params`: its own fields, their annotations and defaults.

    Raises:
        ConfigError: a field has a type that no policy file can hold.
    """
    try:
        hints = get_type_hints(cls, include_extras=True)
        own = {f.name: (hints[f.name], _default(f)) for f in fields(cls) if f.name not in ("budget", "when")}
        doc = f"Settings of {cls.__name__}."
        return create_model(f"{cls.__name__}Params", __base__=Strict, __doc__=doc, **own)  # type: ignore[call-overload]
    except (PydanticUserError, NameError, TypeError) as e:
        raise ConfigError(f"a field of {cls.__name__} cannot stand in a policy file: {first_line(e)}") from e


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return pydantic.Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def _check(name: str, policy: Any) -> None:
    if not (isinstance(policy, type) and issubclass(policy, Policy) and policy is not Policy):
        raise ConfigError(f"{policy!r} is no class derived from rankflow.Policy")
    if "__dataclass_params__" not in vars(policy):
        raise ConfigError(f"{policy.__name__} is no dataclass; put @dataclass(frozen=True, kw_only=True) above it")
    params_model(policy)


PLUGINS = Plugins(GROUP, lambda: {*shipped_policies(), *shipped()}, _check)
