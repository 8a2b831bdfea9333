"""Which ranks modules may have: limits, ties and buckets, by patterns over module names."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rankflow.errors import ConfigError
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.peft_patterns import compiled, matches


@dataclass(frozen=True)
class Limit:
    """Least and greatest rank of the modules a pattern names; None leaves that side as it was.

    A pattern is a glob over whole module names (`*` crosses dots), or `re:` and a regular expression for the whole
    name. With `peft`, it is a key of PEFT's `rank_pattern`: a regular expression for the end of the name, where the
    first such line that matches a module wins, as in PEFT; a glob that is no regular expression is taken as a glob.
    """

    pattern: str
    min: int | None = None
    max: int | None = None
    peft: bool = False


@dataclass(frozen=True)
class Limits:
    """What ranks modules may have. Later entries win over earlier ones.

    `ties` are groups of patterns: all modules that a group matches have one rank. Where its regular expressions
    capture something, modules with the same captured text are tied, e.g. ``re:.*layers\\.(\\d+)\\..*`` ties by layer.
    `buckets` and `multiple` hold for every module; rank 0 is never held to them.

    Limits bind decisions, not what is there: a module whose rank lies outside keeps it until the next decision of a
    policy that can mend it (shrinking policies bring ranks under their maximum, growing ones up to their minimum).
    """

    entries: tuple[Limit, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    buckets: tuple[int, ...] = ()
    multiple: int = 1

    def apply(self, layout: Layout) -> Layout:
        """`layout` with these limits in its slots, none wider than what the slots allowed before.

        Raises:
            ConfigError: naming every pattern that matches no module, every module whose limits contradict each
                other, and every tie between modules of different rank.
        """
        errors: list[str] = []
        low: dict[str, tuple[int, str]] = {}  # module -> rank, and the pattern that says so
        high: dict[str, tuple[int, str]] = {}
        settled: set[str] = set()
        for entry in self.entries:
            hits = set(matching(entry.pattern, layout, errors, peft=entry.peft))
            if entry.peft:
                hits -= settled
                settled |= hits
            if entry.min is not None:
                low |= dict.fromkeys(hits, (entry.min, entry.pattern))
            if entry.max is not None:
                high |= dict.fromkeys(hits, (entry.max, entry.pattern))
        slots = dict(layout)
        for name, slot in slots.items():
            bottom, why_low = low.get(name, (0, "the module's own"))
            top, why_high = high.get(name, (slot.max_rank, "the module's own"))
            bottom, top = max(bottom, slot.min_rank), min(top, slot.max_rank)
            if not 0 < top >= bottom:
                errors.append(f"{name}: min {bottom} ({why_low}) and max {top} ({why_high}) leave no rank to have")
                continue
            slots[name] = replace(
                slot,
                min_rank=bottom,
                max_rank=top,
                buckets=self.buckets or slot.buckets,
                multiple=math.lcm(self.multiple, slot.multiple),
            )
        self._tie(slots, errors)
        limited = Layout(slots)
        if not errors:
            for unit in units(limited):
                try:
                    _ = unit.span
                except ConfigError as e:
                    errors.append(str(e))
                if len({slot.rank for slot in unit.slots}) > 1:
                    ranks = ", ".join(f"{n} has {s.rank}" for n, s in zip(unit.names, unit.slots, strict=True))
                    errors.append(f"tied modules must start at one rank, but {ranks}")
        if errors:
            raise ConfigError("\n".join(f"limits: {e}" for e in dict.fromkeys(errors)))
        return limited

    def _tie(self, slots: dict[str, Slot], errors: list[str]) -> None:
        for i, group in enumerate(self.ties):
            hits: dict[str, str] = {}
            for pattern in group:
                hits |= matching(pattern, slots, errors)
            for text in dict.fromkeys(hits.values()):
                names = [name for name, captured in hits.items() if captured == text]
                joined = {slots[name].tie for name in names} - {None}  # groups that share a module become one
                for name, slot in slots.items():
                    if name in names or slot.tie in joined:
                        slots[name] = replace(slot, tie=f"tie[{i}]{text}")


def matching(pattern: str, names: Mapping[str, Slot], errors: list[str], *, peft: bool = False) -> dict[str, str]:
    """Modules that `pattern`, of the kind `Limit` has, names -> what its groups captured. Mistakes go to `errors`."""
    expression = fnmatch.translate(pattern)
    try:
        if pattern.startswith("re:"):
            expression = pattern.removeprefix("re:")
            compiled(expression)
        elif peft:
            compiled(whole := rf"(?:.*\.)?(?:{pattern})$")
            expression = whole
    except ConfigError as e:
        if not peft:
            errors.append(str(e))
            return {}
    try:
        hits = {name: "/".join(map(str, m.groups())) for name in names if (m := matches(expression, name))}
    except ConfigError as e:
        errors.append(str(e))
        return {}
    if not hits:
        errors.append(f"{pattern!r} matches no module; the nearest is {_nearest(pattern, names)!r}")
    return hits


def _nearest(pattern: str, names: Mapping[str, Slot]) -> str:
    """The module whose name ends most like `pattern`."""
    wanted = pattern.removeprefix("re:").lstrip("*.^").rstrip("$")
    parts = wanted.count(".") + 1
    return max(names, key=lambda n: difflib.SequenceMatcher(None, wanted, ".".join(n.split(".")[-parts:])).ratio())


# -- units: modules that move together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One module, or several that a tie holds to one rank."""

    names: tuple[str, ...]
    slots: tuple[Slot, ...]

    def __str__(self) -> str:
        return " = ".join(self.names)

    @property
    def rank(self) -> int:
        return self.slots[0].rank

    def ranks(self, first: int, last: int) -> Iterator[int]:
        """The ranks from `first` to `last` that limits allow, ascending."""
        return filter(self.allows, range(max(first, self._range.start), min(last + 1, self._range.stop)))

    @property
    def span(self) -> tuple[int, int]:
        """The lowest and the highest rank that limits allow.

        Raises:
            ConfigError: they allow none.
        """
        low = next(filter(self.allows, self._range), None)
        high = next(filter(self.allows, reversed(self._range)), None)
        if low is None or high is None:
            raise ConfigError(f"{self}: min, max, rank_buckets and rank_multiple together allow no rank")
        return low, high

    @property
    def _range(self) -> range:
        return range(max(slot.min_rank for slot in self.slots), min(slot.max_rank for slot in self.slots) + 1)

    def allows(self, rank: int) -> bool:
        """Whether limits let all of its modules have `rank`."""
        return all(slot.allows(rank) for slot in self.slots)


def units(layout: Layout) -> list[Unit]:
    """What moves together, in the order of the first module of each."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for name, slot in layout.items():
        groups.setdefault((slot.tie is not None, slot.tie or name), []).append(name)
    return [Unit(tuple(names), tuple(layout[name] for name in names)) for names in groups.values()]


def allowed_ranks(layout: Layout, count: Mapping[str, int]) -> dict[str, int]:
    """The smallest ranks that limits allow and that are no less than `count`, or else the greatest they allow."""
    ranks: dict[str, int] = {}
    for unit in units(layout):
        low, high = unit.span
        asked = max(count.get(name, 0) for name in unit.names)
        rank = next(unit.ranks(asked, high), high) if asked > 0 else low
        ranks |= dict.fromkeys(unit.names, rank)
    return {name: ranks[name] for name in layout}
