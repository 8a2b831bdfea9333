"""Find the smallest rank that a user's own command accepts, by bisection."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankflow.errors import ConfigError

_STDERR = 2
_SCRIPT = r"[^\w./:=@%+,{}-]"  # in what is more than a path or an option
Judge = Callable[[Path], bool]  # whether the adapter at that path is good enough


@dataclass(frozen=True)
class Trial:
    """A rank that was tried, and whether it was accepted.

    rank: of all modules that have more. passed: whether it was accepted. seconds: time that judging took.
    """

    rank: int
    passed: bool
    seconds: float


def search(ranks: Sequence[int], passes: Callable[[int], bool]) -> list[Trial]:
    """Try growing `ranks` by bisection, the largest first, and return the trials in the order they were made.

    Nothing is presumed of ranks above one that passed: where the largest fails, those below it are tried all the same.
    """
    trials: list[Trial] = []

    def attempt(rank: int) -> bool:
        began = time.perf_counter()
        passed = passes(rank)
        trials.append(Trial(rank, passed, time.perf_counter() - began))
        return passed

    attempt(ranks[-1])
    bisect_left(ranks, True, hi=len(ranks) - 1, key=attempt)
    return trials


def accepted(trials: Sequence[Trial]) -> int:
    """Return the smallest rank that passed.

    Raises:
        ConfigError: none did.
    """
    good = [trial.rank for trial in trials if trial.passed]
    if not good:
        tried = ", ".join(str(trial.rank) for trial in trials)
        raise ConfigError(f"accepted was none of ranks {tried}, tried in that order; nothing is written")
    return min(good)


def contradictions(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return a note where a rank failed above one that passed, or nothing."""
    failed = max((trial.rank for trial in trials if not trial.passed), default=0)
    passed = min((trial.rank for trial in trials if trial.passed), default=failed)
    if failed <= passed:
        return ()
    return (
        f"acceptance is not monotone: rank {failed} failed where rank {passed} passed; do not trust it to rank sizes",
    )


def acceptance_command(command: str) -> Judge:
    """Return a judge that runs a command, without a shell, and accepts a candidate where its status is 0.

    `{}` in the command is the candidate's path, which comes last where there is no `{}`. What the
    command prints goes to stderr.

    Raises:
        ConfigError: no command. From the judge itself: one that cannot be run, or a script that the path would be
            part of, with what a shell acts on in its name.
    """
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise ConfigError(f"--accept {command!r}: {e}") from None
    if not words:
        raise ConfigError("--accept is empty; give a command, e.g. --accept 'python evaluate.py {}'")
    if not any("{}" in word for word in words):
        words.append("{}")

    def accept(candidate: Path) -> bool:
        try:
            arguments = [_filled(word, candidate) for word in words]
            return subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=_STDERR, check=False).returncode == 0
        except OSError as e:
            raise ConfigError(f"--accept: {words[0]} cannot be run ({e.strerror})") from None

    return accept


def _filled(word: str, candidate: Path) -> str:
    """Return a word of the command with the candidate's path in it.

    Within a script (`sh -c "... {}"`) the path is read as part of it, so there it has to be one that no shell makes
    anything else of.

    Raises:
        ConfigError: it is not.
    """
    path = str(candidate)
    if "{}" in word and re.search(_SCRIPT, word) and shlex.quote(path) != path:
        raise ConfigError(
            f"--accept: {word!r} is a script, and {path!r} in it would not be read as a path; hand it over as a word "
            "of its own, e.g. sh -c 'evaluate \"$1\"' sh {}"
        )
    return word.replace("{}", path)
