"""Whether an engine loads an adapter rightly, and if not what it gets wrong and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankflow.engines import Fate, engine_named
from rankflow.errors import BaseNeeded, ConfigError
from rankflow.fitting import Fitting
from rankflow.formats.adapter import SavedAdapter
from rankflow.formats.detect import open_adapter
from rankflow.mismatches import ELSEWHERE, SQUEEZE, Problem, problems


@dataclass(frozen=True)
class Verdict:
    """problems: none if all is well. hint: how the engine is to be started for it, and what was not looked at."""

    source: str
    engine: str
    problems: tuple[Problem, ...]
    hint: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": [problem.to_json() for problem in self.problems]}


def check(src: str | Path, engine: str, *, kind: str | None = None, base: str | Path | None = None) -> Verdict:
    """What `engine` (`rankflow.engines.ENGINES`) would get wrong with a file as it is.

    What `squeeze` refuses to write for an engine has a problem here that no `squeeze` is the remedy of; what has none
    here is written for it. Where the names that an engine needs depend on the base model, and that is neither given
    nor named by the adapter, `hint` says so.

    Raises:
        ConfigError: an unknown engine or format.
        AdapterError: no adapter, or a damaged one.
    """
    named = engine_named(engine)
    adapter = open_adapter(src, kind, base)
    found = problems(adapter, named)
    refused, unseen = _as_written(adapter, Fitting(named, base=None if base is None else Path(base)), found)
    wrong = tuple(_on_base(problem, base) for problem in [*found, *refused])
    hint = "" if wrong else named.hint(max(adapter.layout.ranks.values()))
    return Verdict(str(adapter.path), engine, wrong, ". ".join(filter(None, (hint, unseen))))


def _as_written(adapter: SavedAdapter, fitting: Fitting, found: list[Problem]) -> tuple[list[Problem], str]:
    """(what forbids to write the adapter for the engine beside what was found, what could not be looked at)."""
    settled = any(problem.fate is Fate.REFUSED and not problem.remedy.startswith(SQUEEZE) for problem in found)
    if settled or any("--format" in problem.remedy for problem in found):  # which is the way to another format first
        return [], ""
    try:
        fitting.written(adapter)
    except BaseNeeded:
        return [], "Names were not looked at, since they depend on the base model: give its folder with --base"
    except ConfigError as e:
        what, _, remedy = str(e).removeprefix(f"{adapter.path}: ").rpartition("; ")
        return [Problem("", f"has no place for it: {what or remedy}", Fate.REFUSED, remedy if what else ELSEWHERE)], ""
    return [], ""


def _on_base(problem: Problem, base: str | Path | None) -> Problem:
    """The same with a remedy that reads what was read."""
    if base is None or not problem.remedy.startswith(SQUEEZE):
        return problem
    return replace(problem, remedy=f"{problem.remedy} --base {base}")
