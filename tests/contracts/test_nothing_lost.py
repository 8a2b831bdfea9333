"""Whatever fails in the middle of a step, the step has not happened; called again, it comes to the same bits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import Planted, failing
from helpers import same, snapshot
from tiny import Tiny, batch, loss, save, timeless, tiny

import rankflow
from rankflow.plans.ops import Drop, Grow, Keep, Open, Refactor, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.gate import Gate
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.methods.sora import SoraGate
from rankflow.policies.observation import Signal, Study
from rankflow.training.ledger import Ledger
from tests.gating.test_gates import Noisy
from tests.training.test_controller import hooks_on

AVERAGES = frozenset({Signal.MEAN_ZZ, Signal.MEAN_DD, Signal.MEASURED})
HELD_OUT = [batch(500 + i) for i in range(3)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told(Policy):
    """Does what it is told at every step, and counts what it has seen."""

    plans: dict[int, RankPlan] = dataclasses.field(default_factory=dict)
    entering: RankPlan = dataclasses.field(default_factory=RankPlan)
    leaving: RankPlan = dataclasses.field(default_factory=RankPlan)
    kind: Gate | None = None
    signals: frozenset[Signal] = frozenset()
    when: When = dataclasses.field(default_factory=lambda: When(start=1, every=1))
    studied: tuple[Study, ...] = ()

    @property
    def gate(self):
        return self.kind

    @property
    def studies(self):
        return self.studied

    @property
    def decay(self):
        return 0.9

    def listen(self, step):
        return self.signals

    def init(self, layout):
        return {"seen": torch.zeros(())}

    def observe(self, state, obs, step):
        return {"seen": state["seen"] + 1}

    def enter(self, state, layout):
        return self.entering

    def leave(self, state, layout):
        return self.leaving

    def decide(self, state, obs, layout, step):
        return self.plans.get(step, RankPlan(reason="rest"))


def cut(rank: int = 3) -> tuple[Refactor, Grow]:
    """Another basis of two directions, and a new one."""
    turn = torch.linalg.qr(torch.randn(rank, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    return Refactor(turn.mT, turn), Grow(1)


def everything(plain: bool) -> RankPlan:
    """Grow, shrink, remove, bring back, freeze."""
    third = (Open((1,), 0.5), Grow(1)) if not plain else cut()
    ops = {"first": (Keep((2, 0)), Grow(2)), "second": (Drop(),), "third": third, "last": (Grow(1), Train(False))}
    return RankPlan(ops, "everything")


OUT = RankPlan({"first": (Drop(),), "third": (Keep((0, 1)),)}, "make room")
BACK = RankPlan({"first": (Grow(2),), "second": (Keep((0,)),), "third": (Drop(),), "last": (Train(False),)}, "return")


def phases(*policies: Told, until: int) -> Lifecycle:
    named = [("told", p, until if i < len(policies) - 1 else None) for i, p in enumerate(policies)]
    return Lifecycle(tuple(named))


STUDY = Study("train", batches=2, signals=frozenset({Signal.GRAD_B}), when="start")
CASES: dict[str, tuple[Callable[[], Lifecycle], dict[str, Any], int]] = {  # lifecycle, adapter, the step that fails
    "gates and averages": (
        lambda: phases(Told(plans={3: everything(False)}, kind=SoraGate(), signals=AVERAGES), until=9),
        {},
        3,
    ),
    "a module that returns": (
        lambda: phases(Told(plans={1: OUT, 2: BACK}, kind=SoraGate(), signals=AVERAGES), until=9),
        {"use_rslora": True},
        2,
    ),
    "dora": (lambda: phases(Told(plans={2: everything(True)}), until=9), {"use_dora": True}, 2),
    "averages through a cut": (
        lambda: phases(Told(plans={2: everything(True)}, signals=AVERAGES), until=9),
        {"use_rslora": True, "alpha_pattern": {"first": 9}},
        2,
    ),
    "from gate to gate": (
        lambda: phases(
            Told(plans={1: RankPlan({"last": (Train(False),)})}, kind=SoraGate(start="randn"), leaving=OUT),
            Told(kind=Noisy(), entering=RankPlan({"second": (Grow(1),)}), studied=(STUDY,)),
            until=3,
        ),
        {},
        3,
    ),
    "held-out batches": (
        lambda: phases(
            Told(plans={2: RankPlan({"last": (Train(False),)})}, kind=Gate(scope="module", trained_on="outer")),
            Told(),
            until=4,
        ),
        {},
        3,
    ),
}
SHARES = [20, pytest.param(1, marks=pytest.mark.slow)]  # of the places one in so many


def begun(case: str, folder: Path) -> Tiny:
    make, config, _ = CASES[case]
    ledger = Ledger(folder / "l.jsonl", keep_matrices=True)
    return Tiny(make(), 8, model=tiny(**config), ledger=ledger, batches=HELD_OUT, outer_batches=HELD_OUT)


def all_of(run: Tiny) -> dict[str, Any]:
    """What a step that has not happened leaves as it was, by value and where it matters by identity."""
    training = run.model.training
    with torch.no_grad():
        out = run.model.eval()(batch(0)[0])
    run.model.train(training)
    path = run.flow.ledger.path
    return {
        "live": snapshot(run.model, run.optimizer),
        "flow": copy.deepcopy(run.flow.state_dict()),
        "out": out,
        "hooks": hooks_on(run.model),
        "keys": [list(m.lora_A) for m in run.model.modules() if hasattr(m, "lora_A")],
        "file": path.read_bytes() if path is not None and path.exists() else b"",
        "random": torch.get_rng_state(),
    }


def failures(work: Callable[[], object], unchanged: Callable[[int], None], seed: str, share: int) -> int:
    """Let `work` fail at one place after the other, of which there is one in `share`, until it does not; how often."""
    for times in range(10**6):
        at = sum(map(ord, seed)) % share + share * times
        with failing(at) as places:
            try:
                work()
            except Planted:
                unchanged(at)
                continue
        assert places() <= at, "somebody took the planted failure for one of their own"
        return times
    raise AssertionError


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_fails_anywhere_has_not_happened_and_can_be_taken_again(tmp_path: Path, case: str, share: int):
    step = CASES[case][2]
    whole = begun(case, tmp_path / "whole").until(7)
    run = begun(case, tmp_path).until(step - 1)
    run.backward_and_step()
    before = all_of(run)
    times = failures(run.flow.after_step, lambda at: assert_same(all_of(run), before, at), case, share)
    assert times > 300 / share
    assert run.flow.step == step
    assert not same(all_of(run)["live"], before["live"])
    run.optimizer.zero_grad()
    run.until(7)
    assert_same(run.end(), whole.end())
    assert timeless(Ledger.read(tmp_path / "l.jsonl").events) == run.end()["events"]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", ["gates and averages", "from gate to gate"])
def test_an_end_that_fails_anywhere_has_not_come_yet(tmp_path: Path, case: str, share: int):
    whole = begun(case, tmp_path / "whole").until(3)
    run = begun(case, tmp_path).until(3)
    before = all_of(run)

    def unchanged(at: int) -> None:
        if run.flow.attached:  # else it has come, and only its last breath failed
            assert_same(all_of(run) | {"hooks": before["hooks"]}, before, at)  # nothing is listened to any more

    assert failures(run.flow.finish, unchanged, case, share) > 100 / share
    whole.flow.finish()
    assert_same(run.end(), whole.end())
    assert [e["event"] for e in Ledger.read(tmp_path / "l.jsonl").events].count("finish") == 1


@pytest.mark.parametrize("share", SHARES)
def test_a_run_that_cannot_begin_leaves_the_model_alone(tmp_path: Path, share: int):
    policy = Told(entering=everything(False), kind=SoraGate(start="randn"), signals=AVERAGES, studied=(STUDY,))
    model = tiny()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    path, runs = tmp_path / "l.jsonl", []
    before = snapshot(model, optimizer)

    def begin() -> None:
        options = {"loss_fn": loss, "batches": HELD_OUT, "ledger": path}
        runs.append(rankflow.attach(model, optimizer, phases(policy, until=9), total_steps=8, **options))

    def unchanged(at: int) -> None:
        assert_same(snapshot(model, optimizer), before, at)
        assert hooks_on(model) + len(optimizer._optimizer_step_pre_hooks) == 0, at
        assert not path.exists() or not path.stat().st_size, at

    assert failures(begin, unchanged, "begin", share) > 300 / share
    assert Ledger.read(path).layout() == runs[0].layout


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", ["gates and averages", "a module that returns", "held-out batches"])
def test_a_run_that_cannot_go_back_goes_on(tmp_path: Path, case: str, share: int):
    """To a state of its own, of some steps before, at the same ranks."""
    step = CASES[case][2]
    whole = begun(case, tmp_path / "whole").until(step + 3)
    run = begun(case, tmp_path).until(step)
    state = copy.deepcopy(run.flow.state_dict())
    run.until(step + 2)

    def go_back() -> None:
        run.flow.load_state_dict(state)

    with pytest.raises(Planted), failing(99):
        go_back()
    run.step()
    assert_same(run.end(), whole.end())
    before = all_of(run)
    assert failures(go_back, lambda at: assert_same(all_of(run), before, at), case, share) > 100 / share
    assert run.flow.step == step


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", ["gates and averages", "held-out batches"])
def test_a_run_that_cannot_go_on_leaves_the_model_alone(tmp_path: Path, case: str, share: int):
    make, _, step = CASES[case]
    save(begun(case, tmp_path).until(step + 1), tmp_path)
    model = tiny()
    rankflow.restore(model, tmp_path)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    optimizer.load_state_dict(kept["optimizer"])
    before = snapshot(model, optimizer)

    def go_on() -> None:
        options = {"outer_batches": HELD_OUT, "loss_fn": loss, "ledger": tmp_path / "l.jsonl", "state": kept["flow"]}
        rankflow.attach(model, optimizer, make(), total_steps=8, **options)

    def unchanged(at: int) -> None:
        assert_same(snapshot(model, optimizer), before, at)
        assert hooks_on(model) + len(optimizer._optimizer_step_pre_hooks) == 0, at

    assert failures(go_on, unchanged, case, share) > 200 / share


def assert_same(found: dict[str, Any], wanted: dict[str, Any], at: int | None = None) -> None:
    for key, value in wanted.items():
        assert same(found[key], value), (at, key, differing(found[key], value))


def differing(one: Any, other: Any, path: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return "; ".join(differing(one[k], other[k], f"{path}/{k}") for k in one if not same(one[k], other[k]))
    return path
