"""Tables about runs: events, gates, ranks, and where two runs part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rankflow.plans.names import Row, arrange
from rankflow.render.table import (
    Cell,
    Column,
    Table,
    between_types,
    figure,
    module,
    number,
    rank_bars,
    word,
)

if TYPE_CHECKING:
    from rankflow.analysis.run_comparison import Comparison
    from rankflow.training.ledger import Event


def events_table(events: Sequence[Event]) -> Table:
    """What happened when, and why; decisions that were not taken are marked."""
    columns = [
        Column("step"),
        Column("event", text=True),
        Column("policy", text=True),
        Column("modules", "How many were resized"),
        Column("total rank"),
        Column("why", text=True),
    ]
    rows = [
        [
            number(int(e["step"])),
            word(str(e["event"]), marked=e["event"] == "skip"),
            word(str(e.get("policy", ""))),
            number(len(e["ranks"]) if e.get("ranks") else None),
            number(e.get("total_rank")),
            word(str(e.get("reason", "")) or ", ".join(map(str, e.get("notes", []))), long=True),
        ]
        for e in events
    ]
    return Table("Events", columns, rows)


def gates_table(fold: Event) -> Table:
    """What the gates of a phase came to, module by module, from its `fold` event."""
    reports: Mapping[str, Mapping[str, Any]] = fold["gates"]
    keys = list(dict.fromkeys(key for report in reports.values() for key in report))
    rows = arrange(reports)
    return Table(
        f"Gates of {fold['policy']}, folded at step {fold['step']}",
        [Column("module", text=True), *(Column(str(key).replace("_", " ")) for key in keys)],
        [[module(row.short, row.name), *(figure(reports[row.name].get(key)) for key in keys)] for row in rows],
        total=[word("all"), *(figure(fold["total"].get(key)) for key in keys)] if fold["total"] else None,
        breaks=between_types(rows),
    )


def ranks_table(history: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    """Every module's rank from the first step to the last; modules that end at rank 0 are marked."""
    first, last = history[0][1], history[-1][1]
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    columns = [
        Column("module", text=True),
        Column("first"),
        Column("over the events", text=True),
        Column("last"),
        *(Column("least", wide=True), Column("most", wide=True)),
        Column("changes", "Events at which its rank became another"),
    ]
    rows = arrange(first)

    def cells(row: Row) -> list[Cell]:
        ranks = [ranks[row.name] for _, ranks in history]
        changes = sum(a != b for a, b in pairwise(ranks))
        return [
            module(row.short, row.name),
            number(ranks[0]),
            word(rank_bars(ranks, top)),
            number(ranks[-1], marked=ranks[-1] == 0),
            *(number(min(ranks)), number(max(ranks))),
            number(changes),
        ]

    total = [word("all"), number(sum(first.values())), word(""), number(sum(last.values())), *[word("")] * 3]
    title = f"Ranks from step {history[0][0]} to {history[-1][0]}"
    return Table(title, columns, [cells(row) for row in rows], total=total, breaks=between_types(rows))


def comparison_table(found: Comparison) -> Table:
    """Of runs that part: what each makes of the modules that they do not agree on, and how close that was."""
    assert found.did is not None
    assert found.margins is not None
    known = [f"{m:.3g}" if m is not None else "not known" for m in found.margins]
    caption = f"margin: {known[0]} in the first run and {known[1]} in the second, the least share by which a direction "
    caption += "that was taken scores above one that was not; near 0, last digits decide"
    return Table(
        f"Step {found.step}",
        [Column(name, text=True) for name in ("module", "first run", "second run")],
        [
            [word(""), *map(word, found.did)],
            *([word(m.name), word(m.first), word(m.second)] for m in found.modules),
        ],
        caption,
        breaks=frozenset({1}),
    )
