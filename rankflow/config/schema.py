"""The schema of policy files: one strict pydantic model for each kind of mapping.

Models of `params` are made from the fields of the policies themselves, so that a setting, its default, its bounds and
its meaning are written once. The published JSON schema comes from the same models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    TypeAdapter,
    WithJsonSchema,
    create_model,
    model_validator,
)

from rankflow.config.registry import Strict, params_model, policy_class, shipped_policies, shipped_policy
from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.schedule import resolve_step
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import DEFAULT_STEP, Mode, StepLength

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _step(value: Any) -> Any:
    try:
        resolve_step(value, 1, what="step")
    except ConfigError as e:
        raise ValueError(str(e).removeprefix("step: ")) from None
    return value


def parse_size(value: Any) -> int:
    """Bytes, from a number of them or a size such as `32MiB`.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{str(value)[:80]!r} is neither a number of bytes nor a size such as '32MiB' or '500KB'")
    size = float(found[1]) * _UNITS[found[2]]
    if not math.isfinite(size):
        raise ValueError(f"{found[1][:20]}... is more than anything has")
    return int(size)


Step = Annotated[
    Any,
    PlainValidator(_step),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*%$"}]}),
]
Size = Annotated[
    Any,
    PlainValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": rf"^\d+(\.\d+)?\s*({'|'.join(_UNITS)})$"},
            ]
        }
    ),
]


class BudgetSpec(Strict):
    """How much adapter there may be when the phase ends: exactly one of these."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    mean_rank: Annotated[float, Field(gt=0, description="mean rank over all modules of the adapter")] | None = None
    total_rank: Annotated[PositiveInt, Field(description="sum of the ranks of all modules")] | None = None
    max_params: Annotated[PositiveInt, Field(description="LoRA parameters")] | None = None
    size: Annotated[Size | None, Field(description="bytes of LoRA factors, e.g. 32MiB")] = None
    fraction: Annotated[float, Field(gt=0, le=1, description="share of the LoRA parameters at attach")] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSpec:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"wants exactly one of {', '.join(type(self).model_fields)}, but {what}")
        try:
            self.build()
        except ConfigError as e:
            raise ValueError(str(e)) from None
        return self

    def build(self) -> Budget:
        given: dict[Any, Any] = self.model_dump(exclude_none=True)
        [(kind, amount)] = given.items()
        return Budget(kind, amount)


class WhenSpec(Strict):
    """When the policy decides: steps, or percentages, of the whole run."""

    start: Annotated[
        Step | None, Field(description="first decision; if left out, the phase's begin or one `every`")
    ] = None
    every: Annotated[
        Step | None,
        Field(description="steps between two decisions; if left out, 10% of the run (halving: equal stages)"),
    ] = None
    stop: Annotated[
        Step | None,
        Field(
            description="no decision from here on; if left out, the phase's end, or before its last quarter where the "
            "run ends with it"
        ),
    ] = None


class LimitSpec(Strict):
    """Least and greatest rank of the modules that the pattern names."""

    min: Annotated[NonNegativeInt, Field(description="least rank; 0 lets a policy take the module out")] | None = None
    max: Annotated[PositiveInt, Field(description="greatest rank")] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> LimitSpec:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


LimitOrRank = Annotated[
    LimitSpec,
    BeforeValidator(lambda value: {"max": value} if type(value) is int else value),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, LimitSpec.model_json_schema()]}),
]


class Shared(Strict):
    """What holds for a whole file."""

    limits: Annotated[
        dict[str, LimitOrRank],
        Field(
            description="glob, or `re:` and a regular expression, over module names -> {min, max}; later lines win. A "
            "number is a greatest rank, and its key is read as PEFT reads a rank_pattern's"
        ),
    ] = {}  # noqa: RUF012 - pydantic copies it
    tie: Annotated[
        list[list[str]],
        Field(description="groups of patterns whose modules have one rank (for each captured text of `re:` patterns)"),
    ] = []  # noqa: RUF012
    rank_buckets: Annotated[list[PositiveInt], Field(description="the only ranks a module may have, beside 0")] = []  # noqa: RUF012
    rank_multiple: Annotated[PositiveInt, Field(description="every rank is a multiple of this")] = 1


class Run(Shared):
    """What holds for a whole run, whatever its policies."""

    mode: Annotated[
        Mode,
        Field(
            description="resize: a decision makes new tensors; mask: tensors keep their shape, with room for the "
            "largest rank that limits allow, which suits torch.compile"
        ),
    ] = "resize"
    step: Annotated[
        StepLength,
        Field(
            description="held: updates of the adapter are scaled by (rate_for / mean rank) to the power of 1/2, so "
            "that other ranks do not make the steps of the model longer or shorter; capped: only where they would be "
            "longer; free: as the optimizer makes them"
        ),
    ] = DEFAULT_STEP
    rate_for: Annotated[
        float | None,
        Field(gt=0, le=2**20, description="the rank that the learning rate was chosen for; that of the last budget"),
    ] = None

    @model_validator(mode="after")
    def _rate_for_what_is_held(self) -> Run:
        if self.rate_for is not None and self.step == "free":
            raise ValueError("rate_for means something only where the step is held; leave it out, or set step: held")
        return self


class BudgetFile(Shared):
    """How large a saved adapter may be, and what ranks its modules may have."""

    budget: BudgetSpec | None = None


class PlanFile(Strict):
    """What `rankflow plan` writes: the rank of every module; the rest is for the reader."""

    ranks: Annotated[dict[str, NonNegativeInt], Field(min_length=1, description="module -> rank; 0 leaves it out")]
    adapter: str | None = None
    target: dict[str, Any] | None = None
    summary: str | None = None


class PhaseSpec(Strict):
    """One policy, and how long it is in charge."""

    policy: Any
    budget: Annotated[BudgetSpec | None, Field(description="how much adapter there may be when the phase ends")] = None
    when: Annotated[WhenSpec | None, Field(description="the steps on which the policy decides")] = None
    params: Any = None


Classes = tuple[tuple[str, type[Policy]], ...]  # name and class


def classes(named: Iterable[str] = ()) -> Classes:
    """The policies that a file may name: those shipped, and those of others that it does name. Others stay unimported.

    Raises:
        ConfigError: one that is named is broken.
    """
    found = {name: shipped_policy(name) for name in shipped_policies()} | {name: policy_class(name) for name in named}
    return tuple(sorted(found.items()))


@lru_cache(maxsize=32)
def single_model(policies: Classes) -> TypeAdapter[Any]:
    """A file with one policy."""
    return TypeAdapter(_one_of(policies, "File", Run, PhaseSpec))


@lru_cache(maxsize=32)
def lifecycle_model(policies: Classes) -> TypeAdapter[Any]:
    """A file with `phases`."""
    return TypeAdapter(_lifecycle(policies))


def _lifecycle(policies: Classes) -> type[Run]:
    until: Any = Annotated[Step | None, Field(description="the phase ends before this step")]
    phase: Any = _one_of(policies, "Phase", PhaseSpec, until=(until, None))
    phases: Any = (list[phase], Field(min_length=1))
    doc = "Several policies, one after the other."
    return create_model("Lifecycle", __base__=Run, __doc__=doc, phases=phases)


def _one_of(policies: Classes, suffix: str, *bases: type[Strict], **more: Any) -> Any:
    """The union over all policies, told apart by `policy`."""
    models = []
    for name, cls in policies:
        params = params_model(cls)
        required = any(field.is_required() for field in params.model_fields.values())
        default: Any = {"default_factory": dict, "validate_default": True} if required else {"default_factory": params}
        own = {
            "policy": (Literal[name], Field(description="which policy decides")),
            "params": (params, Field(description="the policy's own settings", **default)),
            **more,
        }
        models.append(create_model(f"{cls.__name__}{suffix}", __base__=bases, **own))  # type: ignore[call-overload]
    return Annotated[Union[tuple(models)], Field(discriminator="policy")]  # noqa: UP007


def schema() -> dict[str, Any]:
    """The JSON schema of files with shipped policies, for editors."""
    either: Any = Union[_one_of(classes(), "File", Run, PhaseSpec), _lifecycle(classes())]  # noqa: UP007
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rankflow policy",
        **TypeAdapter(either).json_schema(),
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
