"""Read policy files: YAML becomes a `Lifecycle`. All mistakes are reported at once, each with its place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rankflow.config import registry, schema
from rankflow.config.messages import explain, nearest
from rankflow.config.registry import shipped
from rankflow.config.yaml import read_yaml
from rankflow.errors import ConfigError, naming
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import Lifecycle

PolicyLike = str | os.PathLike[str] | Mapping[str, Any] | Policy | Lifecycle

T = TypeVar("T")


def load_policy(policy: PolicyLike) -> Lifecycle:
    """A lifecycle from the path of a policy file, the name of a shipped one or of a policy that was installed or
    registered (with the settings it has by itself), a mapping of the shape of a file, or an object.

    Raises:
        ConfigError: no such file or name, or everything that is wrong in it, one line each.
    """
    if isinstance(policy, Lifecycle):
        for name, member, _ in policy.policies:
            _check_object(name, member)
        return policy
    if isinstance(policy, Policy):
        return load_policy(Lifecycle(((policy.name, policy, None),), source=policy.name))
    if isinstance(policy, Mapping):
        return _parse(dict(policy), "policy mapping")
    if not isinstance(policy, str | os.PathLike):
        raise ConfigError(f"a policy is a path, a shipped name, a mapping or a Policy, not {type(policy).__name__}")
    if str(policy) in registry.policy_names() and str(policy) not in shipped() and not Path(policy).is_file():
        return _parse({"policy": str(policy)}, str(policy))
    path = _find(policy)
    return _parse(read_yaml(path), str(path))


@dataclass(frozen=True)
class Setting:
    name: str
    type: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Description:
    """A policy as `rankflow policies` shows it."""

    name: str
    source: str
    summary: str
    settings: tuple[Setting, ...]
    broken: bool = False


def describe() -> list[Description]:
    """Every policy, with its settings, their types, defaults and meanings; a broken one's summary is why it is so."""
    return [_described(name) for name in registry.policy_names()]


def _described(name: str) -> Description:
    try:
        cls = registry.policy_class(name)
    except ConfigError as e:
        return Description(name, "", str(e), (), broken=True)
    hints, model = get_type_hints(cls, include_extras=True), registry.params_model(cls).model_fields
    settings = tuple(
        Setting(name, _type_name(hints[name]), field.get_default(call_default_factory=True), field.description or "")
        for name, field in model.items()
    )
    return Description(name, cls.source, (cls.__doc__ or "").strip().partition("\n")[0], settings)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _type_name(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    return "null" if hint is NoneType else getattr(hint, "__name__", str(hint))


# -- files ----------------------------------------------------------------------------------------------------------


def _find(policy: str | os.PathLike[str]) -> Path:
    path = Path(policy)
    known, names = shipped(), [*shipped(), *registry.policy_names()]
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        hint = f"; a policy of that name is shipped: use {path.stem!r}" if path.stem in known else ""
        raise ConfigError(f"{path}: no such file{hint}")
    if str(policy) not in known:
        raise ConfigError(f"no policy is called {str(policy)!r}{nearest(str(policy), dict.fromkeys(names))}")
    return known[str(policy)]


# -- checking and building --------------------------------------------------------------------------------------------


def _parse(data: Any, source: str) -> Lifecycle:
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a policy file is a mapping that begins with `policy:` or `phases:`")
    several = "phases" in data
    errors: dict[str, list[str]] = {}
    if several and isinstance(data["phases"], list):
        for i, phase in enumerate(data["phases"][:-1]):
            if isinstance(phase, dict) and phase.get("until") is None:
                errors[f"phases[{i}].until"] = ["is missing; only the last phase may leave it out"]
    written = data["phases"] if several else [data]
    written = written if isinstance(written, list) else []
    meant = [_meant(phase) if isinstance(phase, dict) else phase for phase in written]
    with naming(source):
        classes = schema.classes(phase["policy"] for phase in meant if isinstance(phase, dict))
    model = schema.lifecycle_model(classes) if several else schema.single_model(classes)
    if any(new is not old for new, old in zip(meant, written, strict=True)):
        errors |= _beside_unknown_policies(model, {**data, "phases": meant} if several else meant[0], data)
    spec = validated(model, data, source, errors)
    phases = spec.phases if several else [spec]
    policies = tuple((phase.policy, _build(phase), getattr(phase, "until", None)) for phase in phases)
    return Lifecycle(policies, limits_of(spec, data), spec.mode, source, spec.step, spec.rate_for)


def _beside_unknown_policies(model: TypeAdapter[Any], meant: Any, data: dict[str, Any]) -> dict[str, list[str]]:
    """What is wrong in a file besides policies that there are not, which hide all else that stands beside them.

    Each is taken for the one that was probably meant; where none comes near, nobody knows what its `params` may be.
    """
    found: dict[str, list[str]] = {}
    try:
        model.validate_python(meant)
    except ValidationError as e:
        for error in e.errors(include_url=False):
            place, message = explain(error, data)
            found.setdefault(place, []).append(message)
    return found


def _meant(phase: dict[Any, Any]) -> dict[Any, Any]:
    """Return `phase`, with a policy put in place of one that does not exist, so that its other mistakes show."""
    name, known = phase.get("policy"), registry.policy_names()
    if isinstance(name, str) and name in known:
        return phase
    if close := difflib.get_close_matches(str(name)[:100], known, 1):
        return {**phase, "policy": close[0]}
    return {**{key: value for key, value in phase.items() if key != "params"}, "policy": "hold"}


def _build(phase: schema.PhaseSpec) -> Policy:
    settings = {name: getattr(phase.params, name) for name in type(phase.params).model_fields}
    if phase.when is not None:
        settings["when"] = When(**phase.when.model_dump(exclude_none=True))
    if phase.budget is not None:
        settings["budget"] = phase.budget.build()
    return registry.policy_class(phase.policy)(**settings)


def validated(
    model: TypeAdapter[T], data: Any, source: str, errors: Mapping[str, list[str]] = MappingProxyType({})
) -> T:
    """`data` as `model` has it; `errors` are what was found wrong already, by place.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    found = {place: list(messages) for place, messages in errors.items()}
    spec: Any = None
    try:
        spec = model.validate_python(data)
    except ValidationError as e:
        for error in e.errors(include_url=False):
            place, message = explain(error, data)
            if message not in found.setdefault(place, []):
                found[place].append(message)
    if found:
        raise ConfigError("\n".join(f"{source}: {place}: {', or '.join(lines)}" for place, lines in found.items()))
    return spec


def limits_of(spec: schema.Shared, data: Mapping[str, Any]) -> Limits:
    """The limits of a file that was read as `data` and checked as `spec`."""
    entries = (
        Limit(pattern, limit.min, limit.max, peft=type(data["limits"][pattern]) is int)
        for pattern, limit in spec.limits.items()
    )
    return Limits(tuple(entries), tuple(map(tuple, spec.tie)), tuple(spec.rank_buckets), spec.rank_multiple)


def _check_object(name: str, policy: Policy) -> None:
    """Settings of a policy that was made in Python, if policy files know it; others look after themselves."""
    cls = type(policy)
    if policy.name not in registry.policy_names() or registry.policy_class(policy.name) is not cls:
        return
    model = registry.params_model(cls)
    try:
        model.model_validate({key: getattr(policy, key) for key in model.model_fields})
    except ValidationError as e:
        found = [explain(error, {}) for error in e.errors(include_url=False)]
        raise ConfigError("\n".join(f"{name}: {place}: {message}" for place, message in found)) from None
