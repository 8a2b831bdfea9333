"""Policy files: YAML in, a `Lifecycle` out. Whatever is wrong is said at once, each thing with its place."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from rankflow.config import schema as grammar
from rankflow.errors import ConfigError
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.schedule import When
from rankflow.policies.base import Lifecycle, Policy

PolicyLike = str | os.PathLike[str] | Mapping[str, Any] | Policy | Lifecycle

T = TypeVar("T")

schema = grammar.schema


def load_policy(policy: PolicyLike) -> Lifecycle:
    """A lifecycle from the path of a policy file, the name of a shipped one, a mapping of the same shape, or an object.

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
    path = _find(policy)
    return _parse(read_yaml(path), str(path))


def shipped() -> dict[str, Path]:
    """The policy files that come with rankflow, by name: from the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).parents[1] / "policy_files"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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


def describe() -> list[Description]:
    """Every policy, with its settings, their types, defaults and meanings."""
    found = []
    for name in grammar.policy_names():
        cls = grammar.policy_class(name)
        hints = get_type_hints(cls, include_extras=True)
        model = grammar.params_model(cls)
        settings = tuple(
            Setting(f.name, _type_name(hints[f.name]), f.default, model.model_fields[f.name].description or "")
            for f in fields(cls)
            if f.name in model.model_fields
        )
        found.append(Description(name, cls.source, (cls.__doc__ or "").strip().partition("\n")[0], settings))
    return found


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
    known = shipped()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        hint = f"; a policy of that name is shipped: use {path.stem!r}" if path.stem in known else ""
        raise ConfigError(f"{path}: no such file{hint}")
    if str(policy) not in known:
        raise ConfigError(f"no policy is called {str(policy)!r}{_nearest(str(policy), known)}")
    return known[str(policy)]


_LARGEST = 100_000  # values that a file may come to, aliases spelt out
_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """safe_load, but a key that stands twice in a mapping is an error instead of silently winning, and so are aliases
    of aliases that a small file would fill the memory with."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # of nodes, aliases spelt out
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
            size = 1 + sum(self._sizes.get(id(part), 0) for part in parts)
            if size > _LARGEST:
                raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)
            self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file says; a key that stands twice is an error.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:  # what becomes of a date or number that is none
        raise ConfigError(f"{path}: not valid YAML: a value is not what its form or tag says: {e}") from None
    except yaml.MarkedYAMLError as e:
        place = f"line {e.problem_mark.line + 1}: " if e.problem_mark is not None else ""
        hint = "; a pattern that begins with * needs quotes" if "alias" in f"{e.context} {e.problem}" else ""
        raise ConfigError(f"{path}: {place}not valid YAML: {e.problem}{hint}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None


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
    model: TypeAdapter[Any] = TypeAdapter(grammar.lifecycle_model()) if several else grammar.single_model()
    errors |= _beside_unknown_policies(model, data, several)
    spec = validated(model, data, source, errors)
    phases = spec.phases if several else [spec]
    policies = tuple((phase.policy, _build(phase), getattr(phase, "until", None)) for phase in phases)
    return Lifecycle(policies, limits_of(spec, data), spec.mode, source)


def _beside_unknown_policies(model: TypeAdapter[Any], data: dict[str, Any], several: bool) -> dict[str, list[str]]:
    """What is wrong in a file besides policies that there are not, which hide all else that stands beside them.

    Each is taken for the one that was probably meant; where none comes near, nobody knows what its `params` may be.
    """
    phases = data["phases"] if several else [data]
    if not isinstance(phases, list):
        return {}
    meant = [_meant(phase) if isinstance(phase, dict) else phase for phase in phases]
    if all(new is old for new, old in zip(meant, phases, strict=True)):
        return {}
    found: dict[str, list[str]] = {}
    try:
        model.validate_python({**data, "phases": meant} if several else meant[0])
    except ValidationError as e:
        for error in e.errors(include_url=False):
            place, message = _explain(error, data)
            found.setdefault(place, []).append(message)
    return found


def _meant(phase: dict[Any, Any]) -> dict[Any, Any]:
    """`phase`, if its policy is one; else as if one had been named."""
    name, known = phase.get("policy"), grammar.policy_names()
    if isinstance(name, str) and name in known:
        return phase
    if close := difflib.get_close_matches(str(name)[:100], known, 1):
        return {**phase, "policy": close[0]}
    return {**{key: value for key, value in phase.items() if key != "params"}, "policy": "hold"}


def _build(phase: grammar.PhaseSpec) -> Policy:
    settings = {name: getattr(phase.params, name) for name in type(phase.params).model_fields}
    if phase.when is not None:
        settings["when"] = When(**phase.when.model_dump(exclude_none=True))
    if phase.budget is not None:
        settings["budget"] = phase.budget.build()
    return grammar.policy_class(phase.policy)(**settings)


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
            place, message = _explain(error, data)
            if message not in found.setdefault(place, []):
                found[place].append(message)
    if found:
        raise ConfigError("\n".join(f"{source}: {place}: {', or '.join(lines)}" for place, lines in found.items()))
    return spec


def limits_of(spec: grammar.Shared, data: Mapping[str, Any]) -> Limits:
    """The limits of a file that was read as `data` and checked as `spec`."""
    entries = (
        Limit(pattern, limit.min, limit.max, peft=type(data["limits"][pattern]) is int)
        for pattern, limit in spec.limits.items()
    )
    return Limits(tuple(entries), tuple(map(tuple, spec.tie)), tuple(spec.rank_buckets), spec.rank_multiple)


def _check_object(name: str, policy: Policy) -> None:
    """Settings of a shipped policy that was made in Python; others look after themselves."""
    if not type(policy).__module__.startswith("rankflow.policies.methods."):
        return
    model = grammar.params_model(type(policy))
    try:
        model.model_validate({key: getattr(policy, key) for key in model.model_fields})
    except ValidationError as e:
        found = [_explain(error, {}) for error in e.errors(include_url=False)]
        raise ConfigError("\n".join(f"{name}: {place}: {message}" for place, message in found)) from None


def _explain(error: Any, data: Mapping[str, Any]) -> tuple[str, str]:
    """Where, and what to do about it."""
    loc = list(error["loc"])
    tag = 2 if loc[:1] == ["phases"] else 0
    # pydantic names the member of the union, which is not in the file
    policy = loc.pop(tag) if len(loc) > tag and loc[tag] in grammar.policy_names() else None
    if "params" in loc:
        del loc[loc.index("params") + 2 :]  # nor are those of a union of values
    message, context = error["msg"], error.get("ctx", {})
    given = _short(error["input"])
    match error["type"]:
        case "extra_forbidden":
            key = loc[-1]
            if "phases" in data and loc == [key] and key in grammar.PhaseSpec.model_fields:
                message = "stands beside `phases`; a file has one policy or several phases: move it into a phase"
            else:
                message = f"unknown key{_nearest(str(key)[:100], _keys(loc[:-1], policy, 'phases' in data))}"
        case "missing":
            message = "is missing"
        case "union_tag_invalid":
            loc.append("policy")
            tag = context["tag"]
            message = f"no policy is called {_short(tag)}{_nearest(str(tag)[:100], grammar.policy_names())}"
        case "union_tag_not_found":
            loc.append("policy")
            message = f"is missing; known: {', '.join(grammar.policy_names())}"
        case "value_error":
            message = message.removeprefix("Value error, ")
        case "literal_error":
            message = f"is {given}, but should be {context['expected']}"
            message += _nearest(str(error["input"])[:100], re.findall(r"'(\w+)'", context["expected"]), known=False)
        case "model_type" | "dict_type":
            message = f"should be a mapping, not {given}"
        case _:
            message = f"{message.removeprefix('Input ').lower()}, not {given}"
    return _place(loc), message


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]} ..."


def _place(loc: Iterable[Any]) -> str:
    def parts() -> Iterator[str]:
        for part in loc:
            yield f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{_short(part)}]"

    return "".join(parts()).removeprefix(".") or "the file"


def _keys(loc: list[Any], policy: str | None, several: bool) -> list[str]:
    """The keys that the mapping at `loc` may have."""
    models: dict[str, type[BaseModel]] = {"budget": grammar.BudgetSpec, "when": grammar.WhenSpec}
    if loc[:1] == ["limits"]:
        return list(grammar.LimitSpec.model_fields)
    if loc and loc[-1] == "params" and policy is not None:
        return list(grammar.params_model(grammar.policy_class(policy)).model_fields)
    if loc and loc[-1] in models:
        return list(models[loc[-1]].model_fields)
    if loc:
        return [*grammar.PhaseSpec.model_fields, "until"]
    return [*grammar.Run.model_fields, *(["phases"] if several else grammar.PhaseSpec.model_fields)]


def _nearest(wrong: str, valid: Iterable[str], *, known: bool = True) -> str:
    """How a message about `wrong` goes on: the name that was probably meant, and those there are."""
    valid = list(valid)
    close = difflib.get_close_matches(wrong, valid, 1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant or ';'} known: {', '.join(valid)}" if known else meant
