"""Ranks of an adapter as PEFT's config states them: a default, the exceptions, and the modules left out."""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import regex

from rankflow.errors import ConfigError, first_line

if sys.version_info >= (3, 11):
    from re import _parser  # type: ignore[attr-defined]  # what `re` makes of an expression before it compiles it
else:
    import sre_parse as _parser

_LONGEST_PATTERN = 1 << 17  # characters: the names of a whole model's modules, one beside the other
_MOST_COPIES = 512  # that repeats may come to: each takes some 250 bytes, and thousands of expressions are kept
_SECONDS = 1.0  # that an expression may take over names; a sound one takes microseconds over each
_NOTHING = 0.01  # seconds over one name that are not counted
_slow: dict[str, float] = {}  # seconds that an expression has taken over names that took it longer


class RankConfig(NamedTuple):
    """Values of the config fields of these names. Patterns are anchored, so each matches one module exactly."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def anchored(name: str) -> str:
    """The pattern that PEFT, which matches keys as regular expressions from any dot on, matches to `name` alone."""
    return "^" + re.escape(name)


def scaling_for(alpha: float, rank: int, rslora: bool) -> float:
    """What PEFT multiplies B A by at this alpha and rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def alpha_for(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha that makes PEFT compute `scaling` at `rank`, exact where a float can be, an int where one is."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    for exact in (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if scaling_for(exact, rank, rslora) == scaling:
            return exact
    return alpha


def rank_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> RankConfig:
    """Config fields for modules of rank > 0: the largest rank is the default, modules that differ get a pattern.

    Both maps have the same keys. The default alpha is that of the first module of the largest rank.
    """
    r = max(ranks.values())
    alpha = next(alphas[name] for name, rank in ranks.items() if rank == r)
    return RankConfig(
        r,
        alpha,
        {anchored(name): rank for name, rank in ranks.items() if rank != r},
        {anchored(name): a for name, a in alphas.items() if a != alpha},
    )


def exclude_modules(
    current: Collection[str] | str | None, present: Collection[str], absent: Collection[str]
) -> list[str] | str | None:
    """PEFT's `exclude_modules` that leaves out what `current` did and the modules in `absent`, and none in `present`.

    A list of full names where that is unambiguous. PEFT matches list entries from any dot on, so where an absent
    name is also the tail of a present one, and where the user's own value is a regular expression, it is one.
    """
    ours = {*present, *absent}
    if isinstance(current, str):
        return _as_regex(_strip(current, ours), absent)
    users = sorted(set(current or ()) - ours)
    if any(name.endswith("." + gone) for gone in absent for name in present):
        tails = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in users)
        return _as_regex(tails, absent)
    return [*users, *absent] or None


def _as_regex(users: str, absent: Collection[str]) -> str | None:
    own = [f"(?:{users})"] if users and absent else [users] if users else []
    return "|".join([*own, *map(re.escape, absent)]) or None


def _strip(pattern: str, ours: Collection[str]) -> str:
    """Return the user's part of an expression that `_as_regex` made."""
    names = {re.escape(name) for name in ours}
    stripped = False
    while True:
        head, _, last = pattern.rpartition("|")
        if last not in names:
            break
        pattern, stripped = head, True
    if stripped and pattern.startswith("(?:") and pattern.endswith(")"):
        return pattern[3:-1]
    return pattern


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression as Python's own `re` understands it, for `matches`.

    Raises:
        ConfigError: it is none, is longer than any that is meant to name modules, or repeats so much that it would be
            when written out, which is what it takes to compile it.
    """
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"longer than {_LONGEST_PATTERN:,} characters")
        if "(?#" in pattern:  # `re` and `regex` do not agree on where one ends
            raise ValueError("it has a comment")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            re.compile(pattern)  # which is stricter, and the judge of what is meant
            if (copies := _copies(_parser.parse(pattern))) > _MOST_COPIES:
                raise ValueError(f"its repeats come to {copies:.6g} parts, of at most {_MOST_COPIES}")
            return regex.compile(pattern, regex.V0)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError) as e:
        raise ConfigError(f"{pattern[:80]!r} is not a regular expression: {first_line(e)}") from None


def matches(pattern: str, name: str) -> regex.Match[str] | None:
    """The match of a whole name, from an expression that may be a stranger's: one that backtracks for ever is an error.

    Raises:
        ConfigError: it is no regular expression, or takes for ever, over one name or over all.
    """
    expression = compiled(pattern)
    began, found = time.thread_time(), None
    try:
        found = expression.fullmatch(name, timeout=_SECONDS)
    except TimeoutError:
        _slow[pattern] = math.inf
    else:
        if (took := time.thread_time() - began) < _NOTHING:
            return found
        _slow[pattern] = _slow.get(pattern, 0.0) + took
    if _slow[pattern] > _SECONDS:
        del _slow[pattern]
        raise ConfigError(
            f"{pattern[:80]!r} takes more than {_SECONDS:g} s to match {name[:80]!r}; take repeats out of repeats"
        )
    return found


def _copies(parsed: Any) -> int:
    """How many parts there are once repeats of a number are written out, beyond those that are written already."""
    return _parts(parsed, True) - _parts(parsed, False)


def _parts(parsed: Any, repeated: bool) -> int:
    total = 0
    for operation, argument in parsed:
        inner = sum(_parts(part, repeated) for part in _within(argument))
        times = 1
        if repeated and str(operation).endswith("_REPEAT"):
            low, high, _ = argument
            times = max(1, low if high is _parser.MAXREPEAT else high)
        total += times * max(1, inner)
    return total


def _within(argument: Any) -> Iterator[Any]:
    """The expressions that are part of one."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _within(part)
