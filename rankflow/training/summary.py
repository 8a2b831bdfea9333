"""A summary of a run in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rankflow.plans.layout import Layout
from rankflow.plans.names import arrange
from rankflow.policies.lifecycle import Phase
from rankflow.training.phases import Phases


@dataclass(frozen=True)
class Summary:
    """How often a run decided, what came of it, and where it is written down.

    policy: its phases by name. steps: optimizer steps taken, of `total_steps`. decisions: due steps on which it
    decided. resizes: how often ranks changed, also as a phase began or ended. before, after: total rank. modules: how
    many the layout has. ranks: type of module -> its lowest and highest rank. ledger: its file, None where it is in
    memory alone.
    """

    policy: str
    steps: int
    total_steps: int
    decisions: int
    resizes: int
    before: int
    after: int
    modules: int
    ranks: Mapping[str, tuple[int, int]]
    ledger: str | None

    def __str__(self) -> str:
        spans = (f"{kind} {low}" + (f" to {high}" if high > low else "") for kind, (low, high) in self.ranks.items())
        total = f"{self.before} -> {self.after}" if self.before != self.after else str(self.after)
        kept = "ledger: in memory only; give ledger='run.jsonl' to keep it"
        report = ""
        if self.ledger is not None:
            kept, report = f"ledger: {self.ledger}", f"rankflow report {self.ledger}; "
        did = f"{_times(self.decisions, 'decision')}, {_times(self.resizes, 'resize') if self.resizes else 'no resize'}"
        lines = [
            f"rankflow: {self.policy}: {did} in {self.steps} of {self.total_steps} steps; total rank {total}, mean "
            f"{self.after / max(1, self.modules):.4g}",
            f"ranks: {', '.join(spans)}",
            kept,
            f"next: {report}rankflow inspect ADAPTER, once it is saved; rankflow squeeze ADAPTER for a smaller one",
        ]
        return "\n  ".join(lines)


def summarise(phases: Phases) -> Summary:
    """The summary of a run as it is now."""
    due = {(p.name, step) for p in phases.all for step in (*_at_the_start(p), *p.policy.when.events)}
    events = phases.ledger.events
    taken = {(e["policy"], e["step"]) for e in events if e["event"] in ("skip", "resize")}
    return Summary(
        policy=" -> ".join(phase.name for phase in phases.all),
        steps=phases.step,
        total_steps=phases.total_steps,
        decisions=len(due & taken),
        resizes=sum(bool(e["event"] == "resize" and e["ranks"]) for e in events),
        before=phases.first_layout.total_rank,
        after=phases.layout.total_rank,
        modules=len(phases.layout),
        ranks={kind: (min(ranks), max(ranks)) for kind, ranks in ranks_by_type(phases.layout).items()},
        ledger=None if phases.ledger.path is None else str(phases.ledger.path),
    )


def metrics_of(layout: Layout, resizes: int) -> dict[str, float]:
    """Numbers for a logger (`Controller.metrics`)."""
    return {
        "rankflow/total_rank": layout.total_rank,
        "rankflow/mean_rank": layout.total_rank / len(layout),
        "rankflow/params": layout.params,
        "rankflow/resizes": resizes,
        **{f"rankflow/rank/{kind}": sum(ranks) / len(ranks) for kind, ranks in ranks_by_type(layout).items()},
    }


def _at_the_start(phase: Phase) -> list[int]:
    """The first step of a phase in a list, if the phase decides there from a study of the data; else an empty list."""
    return [phase.begin] if any(study.when == "start" for study in phase.policy.studies) else []


def ranks_by_type(layout: Layout) -> dict[str, list[int]]:
    """Type of module, as reports call it -> the ranks of its modules, in order of layers."""
    found: dict[str, list[int]] = {}
    for row in arrange(layout):
        found.setdefault(row.label, []).append(layout[row.name].rank)
    return found


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
