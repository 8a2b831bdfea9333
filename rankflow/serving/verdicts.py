"""Check whether an engine loads an adapter rightly, and say what it gets wrong and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankflow.deprecation import renamed_arguments
from rankflow.errors import AdapterError, BaseNeeded, ConfigError
from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import SavedAdapter
from rankflow.formats.open import open_adapter, uses_base
from rankflow.serving.base_names import absent_from
from rankflow.serving.check import ELSEWHERE, problems
from rankflow.serving.engine import SQUEEZE, Fate, Problem
from rankflow.serving.engines import engine_named
from rankflow.serving.export import Fitting


@dataclass(frozen=True)
class Verdict:
    """engine: empty where only the base was looked at. problems: none if all is well. hint: how the engine is to be
    started for it, and what was not looked at. base: what was given. missing: modules that it does not have."""

    source: str
    engine: str
    problems: tuple[Problem, ...]
    hint: str
    base: str | None = None
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": [problem.to_json() for problem in self.problems]}


@renamed_arguments(kind="from_format")
def check(
    src: str | Path, engine: str | None = None, *, from_format: str | None = None, base: str | Path | None = None
) -> Verdict:
    """Return what an engine would get wrong with an adapter file as it is, and which of its modules a base lacks.

    With `engine`, one of `rankflow.serving.engines`, the file is checked against what that engine does. With `base`,
    modules are looked for in that model, by whatever names the file's format has for them.

    What `squeeze` refuses to write for an engine has a problem here that no `squeeze` is the remedy of; what has none
    here is written for it. Where the names that an engine needs depend on the base model, and that is neither given
    nor named by the adapter, `hint` says so.

    Raises:
        ConfigError: an unknown engine or format, neither engine nor base, or no engine and a base that is no model.
        AdapterError: no adapter, or a damaged one.
    """
    if engine is None and base is None:
        raise ConfigError(
            f"{src}: say what is to serve it with --engine, or what it was trained on with --base, or both"
        )
    adapter = open_adapter(src, from_format, base)
    lacking, missing, hints = _beside(adapter, base, needed=engine is None)
    found: list[Problem] = []
    if engine is not None:
        named = engine_named(engine)
        found = problems(adapter, named)
        refused, unseen = _as_written(adapter, Fitting(named, base=None if base is None else Path(base)), found)
        found += refused
        fine = not found and not lacking
        hints = [*([named.hint(max(adapter.layout.ranks.values()))] if fine else []), unseen, *hints]
    wanted = base if uses_base(adapter.path) or engine == "llamacpp" else None  # a squeeze takes no base for nothing
    wrong = tuple(_as_read(problem, from_format, wanted) for problem in [*found, *lacking])
    given = None if base is None else str(base)
    return Verdict(str(adapter.path), engine or "", wrong, ". ".join(filter(None, hints)), given, missing)


def _beside(
    adapter: SavedAdapter, base: str | Path | None, *, needed: bool
) -> tuple[list[Problem], tuple[str, ...], list[str]]:
    """(what is wrong beside the base, the modules it lacks, what is to be said)."""
    if base is None or adapter.source.kind == FULL:  # which was made of the two
        return [], (), []
    try:
        found = absent_from(adapter, base)
    except (ConfigError, AdapterError) as e:
        if needed:
            raise
        return [], (), [f"Modules were not looked for in the base: {e}"]
    hints = (
        [f"{len(found.unseen)} modules, {found.unseen[0]} first, cannot be looked for in it"] if found.unseen else []
    )
    if not found.modules:
        return [], (), hints
    does = f"has none of these, so that {len(found.modules)} of {len(adapter.layout)} modules load nothing"
    remedy = "give the base that it was trained on; or it goes by names of another version of that model's library"
    return [Problem("base", does, Fate.SILENT, remedy, found.modules)], found.modules, hints


def _as_written(adapter: SavedAdapter, fitting: Fitting, found: list[Problem]) -> tuple[list[Problem], str]:
    """(what forbids to write the adapter for the engine beside what was found, what could not be looked at)."""
    settled = any(problem.fate is not Fate.UNKNOWN and not problem.remedy.startswith(SQUEEZE) for problem in found)
    if settled or any("--to-format" in problem.remedy for problem in found):  # which is the way to another format first
        return [], ""
    try:
        fitting.written(adapter)
    except BaseNeeded:
        return [], "Names were not looked at, since they depend on the base model: give its folder with --base"
    except ConfigError as e:
        what, _, remedy = str(e).removeprefix(f"{adapter.path}: ").rpartition("; ")
        return [Problem("", f"has no place for it: {what or remedy}", Fate.REFUSED, remedy if what else ELSEWHERE)], ""
    return [], ""


def _as_read(problem: Problem, from_format: str | None, base: str | Path | None) -> Problem:
    """The same with a remedy that reads what was read."""
    if not problem.remedy.startswith(SQUEEZE):
        return problem
    given = [
        f" {option} {value}"
        for option, value in (("--from-format", from_format), ("--base", base))
        if value is not None
    ]
    return replace(problem, remedy=problem.remedy + "".join(given))
