"""Two runs side by side: the same but for times, the same but for digits, or apart at a step that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny

from rankflow.analysis.run_comparison import compare
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow, Keep, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.render.run_tables import comparison_table
from rankflow.training.ledger import Ledger
from tests.render.test_tables import text

LAYOUT = Layout({name: Slot(2, 16, 16, 2.0) for name in ("a", "b", "c")})
OFTEN = {"start": 2, "every": 2, "stop": 9}
POLICIES: dict[str, dict[str, Any]] = {
    "increlora": {"policy": "increlora", "when": OFTEN, "budget": {"mean_rank": 5}, "params": {"grow_by": 1}},
    "squeeze": {"policy": "squeeze", "when": OFTEN, "budget": {"mean_rank": 1}, "params": {"shape": "linear"}},
    "adalora": {"policy": "adalora", "when": OFTEN, "budget": {"mean_rank": 1}},
    "elalora": {"policy": "elalora", "when": OFTEN, "params": {"move": 1}, "limits": {"*": {"max": 5}}},
}


def ledger(*plans: tuple[int, RankPlan], end: int | None = 40, layout: Layout = LAYOUT, **attach: Any) -> Ledger:
    made = Ledger()
    made.append("attach", 0, layout=layout.to_json(), **{"total_steps": 40, "seed": 0, **attach})
    made.append("phase", 0, policy="p")
    for step, plan in plans:
        made.append(
            "resize" if plan else "skip", step, plan or None, policy="p", reason="", seconds=step * torch.rand(1).item()
        )
    if end is not None:
        made.append("finish", end)
    return made


def grow(name: str, n: int = 1, margin: float | None = None) -> RankPlan:
    return RankPlan({name: [Grow(n)]}, margin=margin)


def turned(angle: float) -> RankPlan:
    t = torch.tensor(angle, dtype=torch.float64)
    N = torch.stack([torch.stack([t.cos(), t.sin()]), torch.stack([-t.sin(), t.cos()])])
    return RankPlan({"a": [Refactor(N, N.mT)]})


def test_equal_runs_are_the_same_but_for_their_times():
    plans = [(10, grow("a")), (20, RankPlan()), (30, grow("b"))]
    found = compare(ledger(*plans), ledger(*plans))
    assert (found.same, found.decisions, found.numbers, found.step, found.until) == (True, 3, None, None, None)
    assert str(found) == "the same 3 decisions, and all that was recorded with them."


def test_digits_are_not_decisions():
    found = compare(ledger((10, turned(0.1)), (20, grow("a"))), ledger((10, turned(0.1000001)), (20, grow("a"))))
    assert found.same
    assert (found.decisions, found.numbers) == (2, 10)
    assert "differ from step 10 on" in str(found)


def test_the_first_step_apart_is_told_with_modules_and_margins():
    common = (10, grow("c"))
    first = ledger(common, (20, grow("a", 2, margin=0.001)), (30, grow("a")))
    second = ledger(common, (20, grow("b", margin=0.25)), (30, grow("c")), seed=7)
    found = compare(first, second, ("x.jsonl", "y.jsonl"))
    assert not found.same
    assert (found.step, found.decisions, found.margins) == (20, 1, (0.001, 0.25))
    assert [(m.name, m.first, m.second) for m in found.modules] == [
        ("a", "2 to 4", "stays at 2"),
        ("b", "stays at 2", "2 to 3"),
    ]
    assert "at step 20 they part" in str(found)
    assert "begin with seed 0 and 7" in str(found)
    shown = text(comparison_table(found))
    assert "0.001 in the first run and 0.25 in the second" in " ".join(shown.split())
    assert "2 to 4" in shown


def test_other_directions_at_the_same_rank_are_another_decision():
    found = compare(
        ledger((10, RankPlan({"a": [Keep((0,))]}))), ledger((10, RankPlan({"a": [Keep((1,))]}))), ("x", "y")
    )
    assert [(m.first, m.second) for m in found.modules] == [("2 to 1 (keeps 0)", "2 to 1 (keeps 1)")]
    assert found.margins == (None, None)
    assert "not known" in text(comparison_table(found))


def test_what_one_does_and_the_other_does_not():
    found = compare(ledger((10, grow("a"))), ledger((10, RankPlan())))
    assert found.did == ("resize, p", "skip, p")
    found = compare(ledger((10, grow("a")), (20, grow("b"))), ledger((10, grow("a"))))
    assert (found.step, found.did) == (20, ("resize, p", "nothing"))


def test_a_run_in_progress_is_compared_as_far_as_it_has_come():
    whole, part = ledger((10, grow("a")), (20, grow("b"))), ledger((10, grow("a")), end=None)
    for pair in ((whole, part), (part, whole)):
        found = compare(*pair)
        assert (found.same, found.until, found.decisions) == (True, 10, 1)
        assert "Compared up to step 10" in str(found)
    assert not compare(whole, ledger((10, grow("b")), end=None)).same


def test_adapters_that_begin_unlike_part_at_once():
    wider = Layout({**LAYOUT, "a": Slot(3, 16, 16, 2.0), "d": Slot(2, 16, 16, 2.0)})
    found = compare(ledger(), ledger(layout=wider))
    assert found.step == 0
    assert [(m.name, m.first, m.second) for m in found.modules] == [
        ("a", "stays at 2", "stays at 3"),
        ("d", "is not there", "stays at 2"),
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_one_seed_one_run_and_every_decision_says_how_close_it_was(name: str, tmp_path: Path):
    ledgers = []
    for i in range(2):
        run = Tiny(POLICIES[name], 9, ledger=tmp_path / f"{i}.jsonl").until(9)
        run.flow.finish()
        ledgers.append(Ledger.read(tmp_path / f"{i}.jsonl"))
    found = compare(*ledgers)
    assert found.same
    assert found.numbers is None
    plans = [e["plan"] for e in ledgers[0].events if e["event"] == "resize"]
    margins = [plan["margin"] for plan in plans]
    assert plans
    assert None not in margins[:-1], "only the last may have left nothing to choose"
    assert all(m is None or 0 <= m <= 1 for m in margins)
