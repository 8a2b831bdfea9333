"""Options that several commands share, options made from dataclasses, and the targets that options make."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rankflow.cli.app import bar
from rankflow.compress.option import options_of
from rankflow.errors import ConfigError

if TYPE_CHECKING:
    from rankflow.calibration.statistics import Statistics
    from rankflow.compress.target import Target

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter folder or file: PEFT, kohya, LyCORIS, ComfyUI, diffusers; or a whole model, with --base.",
    ),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that is there already.")]
ForceAll = Annotated[bool, typer.Option("--force", help="Replace outputs that are there already.")]
Metric = Annotated[
    str,
    typer.Option(
        rich_help_panel="Metric",
        help="What is preserved: weights; with --calibration the layers' outputs, or the loss.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Metric",
        metavar="FILE",
        help="Statistics from `rankflow calibrate`, or data as it takes them, with --base.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="In",
        metavar="MODEL",
        help="Base model's folder: to take from a whole model, for adapters of shapes unknown, for gguf; or with data.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Advanced",
        help="SVD: exact, or randomised on the full update: torch, fbpca, sklearn. Exact from factors if not"
        " given, else torch.",
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="In",
        metavar="FORMAT",
        help="peft, kohya, comfyui, diffusers or full (a whole model); told from the file if left out.",
    ),
]
BaseLookedUp = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        rich_help_panel="In",
        help="Base model's folder, to say which modules it lacks, or for adapters of shapes unknown and for gguf.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", rich_help_panel="Out", metavar="FILE", help="Write a report to look at in a browser, one file."
    ),
]
Device = Annotated[str, typer.Option(rich_help_panel="Advanced", help="Where to compute, e.g. cpu or cuda:0.")]


def made_of(**groups: type | tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that each of these parameters is given as options, one for each field with an `Option`.

    The command gets a mapping of fields to values in its place.

    Args:
        groups: parameter -> dataclass, or a tuple of a dataclass and those of its fields that are options here.
    """
    parts: dict[str, tuple[Any, ...]] = {
        name: (of, *options_of(of)) if isinstance(of, type) else of for name, of in groups.items()
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            own = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += _parameters(*parts[name]) if name in parts else [own]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            of_parts = {name: _values(given, *part) for name, part in parts.items()}
            command(**given, **of_parts)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer looks at
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def _parameters(of: type, *names: str) -> list[inspect.Parameter]:
    found = []
    for field in fields(of):
        if field.name not in names:
            continue
        option = options_of(of)[field.name]
        known = (_TYPES[part] for part in str(field.type).split(" | ") if part in _TYPES)
        kind: Any = option.type or next(known)
        name = option.name or field.name
        shown = typer.Option(
            f"--{name.replace('_', '-')}",
            metavar=option.metavar,
            help=option.help,
            rich_help_panel=option.panel or getattr(of, "panel", None),
        )
        annotation = Annotated[kind if field.default is not None else kind | None, shown]
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    return found


def _values(given: dict[str, Any], of: type, *names: str) -> dict[str, Any]:
    """Return field -> value, taken out of what the command line gave.

    Raises:
        ConfigError: a value that cannot be read.
    """
    values: dict[str, Any] = {}
    for name in names:
        option = options_of(of)[name]
        value = given.pop(option.name or name)
        if option.read is None:
            values[name] = value
        elif value is not None:
            try:
                values |= option.read(value)
            except ValueError as e:
                raise ConfigError(f"--{option.name or name}: {e}") from None
    return values


def statistics(given: Mapping[str, Any]) -> Statistics | Path | None:
    """Return the statistics file that --calibration names, or what comes of calibrating if it names data.

    Raises:
        ConfigError: --base without data, or data without it; else as `rankflow.calibration.base_model.calibrate_saved`.
    """
    found, base = given["calibration"], given["base"]
    data = None if found is None or found.suffix == ".safetensors" else found
    together = "--calibration DATA and --base MODEL go together; a statistics file needs no base"
    if base is None and data is not None:
        raise ConfigError(together)
    if needless_base(given) and given.get("engine") is None:
        raise ConfigError(f"{given['adapter']}: is read without its base; {together}")
    if base is None or data is None:
        return found
    from rankflow.calibration.base_model import calibrate_saved

    with bar("calibrating") as progress:
        return calibrate_saved(
            given["adapter"], base, data, metric=given["metric"], device=given["device"], progress=progress
        )


def needless_base(given: Mapping[str, Any]) -> bool:
    """Whether a base was given that nothing is read from: the adapter's own files say all."""
    from rankflow.formats.open import uses_base

    calibration = given["calibration"]
    for_data = calibration is not None and calibration.suffix != ".safetensors"
    for_gguf = given.get("to_format") == "gguf" or given.get("engine") == "llamacpp"
    return given["base"] is not None and not for_data and not for_gguf and not uses_base(given["adapter"])


_READ = {"plan": "its plan", "calibration": "its statistics or data", "base": "its base", "budget": "its budget"}


def read(source: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command reads, which no output may replace: its source, and the files that options name."""
    return {**source, **{what: given.get(option) for option, what in _READ.items()}}


def targets(goal: dict[str, Any], given: Mapping[str, Any], *, keep: bool = False) -> list[Target]:
    """Return one target for each output, from fields of `Target` and all that a command was given.

    `given`: `typer.Context.params`. With `keep` ranks stay as they are where no target was given.

    Raises:
        ConfigError: none or several targets, or options that do not go together.
    """
    from rankflow.compress.target import TARGETS, Target, every_rank
    from rankflow.formats.open import open_adapter

    ranks, accept = given.get("ranks"), given.get("accept")
    asked = any(goal.get(name) for name in TARGETS) or ranks or accept
    if given["budget"] is not None and not (asked or keep):
        raise ConfigError(f"{given['budget']}: has no budget; add one, or give a target beside it")
    goal["keep"] = keep and not asked
    if accept is not None:
        if ranks is not None:
            raise ConfigError("acceptance looks for the rank by itself, so --ranks cannot be given too; leave out one")
        return every_rank(open_adapter(given["adapter"], given["from_format"], given["base"]).layout, **goal)
    if ranks is None:
        return [Target(**goal)]
    if re.fullmatch(r"\d+(,\d+)*", ranks) is None:
        raise ConfigError(f"--ranks {ranks!r} is not a list of whole numbers such as 4,8,16")
    if goal["target_rank"] is not None:
        raise ConfigError("--ranks and --target-rank are two targets; give one")
    return [Target(**{**goal, "target_rank": rank}) for rank in dict.fromkeys(map(int, ranks.split(",")))]
