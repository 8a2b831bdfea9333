"""What pydantic found wrong in a policy file, in words: where, what, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from rankflow.config import registry, schema


def explain(error: Any, data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the place of a mistake and what to do about it."""
    loc = list(error["loc"])
    tag = 2 if loc[:1] == ["phases"] else 0
    # pydantic names the member of the union, which is not in the file
    policy = loc.pop(tag) if len(loc) > tag and loc[tag] in registry.policy_names() else None
    if "params" in loc:
        del loc[loc.index("params") + 2 :]  # nor are those of a union of values
    message, context = error["msg"], error.get("ctx", {})
    given = _short(error["input"])
    match error["type"]:
        case "extra_forbidden":
            key = loc[-1]
            if "phases" in data and loc == [key] and key in schema.PhaseSpec.model_fields:
                message = "stands beside `phases`; a file has one policy or several phases: move it into a phase"
            else:
                message = f"unknown key{nearest(str(key)[:100], _keys(loc[:-1], policy, 'phases' in data))}"
        case "missing":
            message = "is missing"
        case "union_tag_invalid":
            loc.append("policy")
            tag = context["tag"]
            message = f"no policy is called {_short(tag)}{nearest(str(tag)[:100], registry.policy_names())}"
        case "union_tag_not_found":
            loc.append("policy")
            message = f"is missing; known: {', '.join(registry.policy_names())}"
        case "value_error":
            message = message.removeprefix("Value error, ")
        case "literal_error":
            message = f"is {given}, but should be {context['expected']}"
            message += nearest(str(error["input"])[:100], re.findall(r"'(\w+)'", context["expected"]), known=False)
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
    models: dict[str, type[BaseModel]] = {"budget": schema.BudgetSpec, "when": schema.WhenSpec}
    if loc[:1] == ["limits"]:
        return list(schema.LimitSpec.model_fields)
    if loc and loc[-1] == "params" and policy is not None:
        return list(registry.params_model(registry.policy_class(policy)).model_fields)
    if loc and loc[-1] in models:
        return list(models[loc[-1]].model_fields)
    if loc:
        return [*schema.PhaseSpec.model_fields, "until"]
    return [*schema.Run.model_fields, *(["phases"] if several else schema.PhaseSpec.model_fields)]


def nearest(wrong: str, valid: Iterable[str], *, known: bool = True) -> str:
    """Return the end of a message about `wrong`: the name that was probably meant, and the valid ones."""
    valid = list(valid)
    close = difflib.get_close_matches(wrong, valid, 1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant or ';'} known: {', '.join(valid)}" if known else meant
