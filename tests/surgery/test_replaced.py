"""Whoever holds parameters is told when a resize replaces them, or warned when it was not."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from failing import Planted, failing
from loops import GROW_THEN_SQUEEZE
from peft import LoraConfig, get_peft_model
from tiny import MASKED, Tiny, batch, loss, tiny
from torch import nn

import rankflow
from rankflow.plans.ops import Drop, Grow, Keep
from rankflow.plans.plan import RankPlan
from tests.contracts.test_nothing_lost import Told, phases
from tests.training.test_trainer import trainer

PLANS = {
    2: RankPlan({"first": (Keep((2, 0)), Grow(2)), "second": (Drop(),)}, "away"),
    3: RankPlan({"second": (Grow(2),), "third": (Grow(1),)}, "back"),
}


class Book:
    """All trainable parameters, kept up to date by what it is told alone; by name and role, not by the model."""

    def __init__(self, model: nn.Module):
        self.kept = [p for p in model.parameters() if p.requires_grad]
        self.told: list[tuple[str, list[str], list[str], tuple[Any, ...]]] = []

    def __call__(self, name: str, old: Any, new: Any, ops: Any) -> None:
        self.told.append((name, list(old), list(new), tuple(ops)))
        gone = {id(p) for p in old.values()}
        self.kept = [p for p in self.kept if id(p) not in gone] + list(new.values())

    def is_up_to_date(self, model: nn.Module) -> bool:
        return {id(p) for p in self.kept} == {id(p) for p in model.parameters() if p.requires_grad}


def told_run(plans: dict[int, RankPlan] = PLANS, **options: Any) -> tuple[Tiny, Book]:
    model = tiny()
    book = Book(model)
    return Tiny(phases(Told(plans=plans), until=9), 8, model=model, on_resize=book, **options), book


def test_callbacks_hear_of_each_module_in_order_with_its_parameters_and_ops():
    run, book = told_run()
    run.until(5)
    assert book.told == [
        ("first", ["A", "B"], ["A", "B"], PLANS[2].ops["first"]),
        ("second", ["A", "B"], [], (Drop(),)),
        ("second", [], ["A", "B"], PLANS[3].ops["second"]),
        ("third", ["A", "B"], ["A", "B"], PLANS[3].ops["third"]),
    ]
    assert book.is_up_to_date(run.model)


def test_a_callback_that_was_removed_hears_nothing_more():
    run, _ = told_run()
    heard: list[str] = []
    handle = run.flow.on_resize(lambda name, *_: heard.append(name))
    run.until(2)
    handle.remove()
    run.until(4)
    assert heard == ["first", "second"]


def test_where_the_ledger_cannot_be_written_callbacks_are_told_that_the_resize_is_undone(tmp_path, monkeypatch):
    run, book = told_run(ledger=tmp_path / "l.jsonl")
    run.until(1)
    seen: list[list[int]] = []
    run.flow.on_resize(lambda *_: seen.append([id(p) for p in run.model.parameters()]))
    run.backward_and_step()
    before = [id(p) for p in run.model.parameters()]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rankflow.training.ledger, "_append_lines", full)
        with pytest.raises(OSError, match="No space"):
            run.flow.after_step()
    assert [(name, ops) for name, _, _, ops in book.told[2:]] == [("second", ()), ("first", ())]
    assert book.is_up_to_date(run.model)
    assert seen[0] != before
    assert seen[2:] == [before, before], "the model is back before callbacks hear of it"
    run.flow.after_step()
    run.optimizer.zero_grad()
    run.until(5)
    assert book.is_up_to_date(run.model)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_callback_that_raises_leaves_everything_as_it_was(error: BaseException):
    run, book = told_run()
    run.until(1)
    run.backward_and_step()
    before, ranks = [id(p) for p in run.model.parameters()], run.flow.layout.ranks

    def refuse(name: str, old: Any, new: Any, ops: Any) -> None:
        if ops and name == "second":
            raise error

    handle = run.flow.on_resize(refuse)
    with pytest.raises(type(error)):
        run.flow.after_step()
    assert [id(p) for p in run.model.parameters()] == before
    assert (run.flow.layout.ranks, run.flow.step) == (ranks, 1)
    assert book.is_up_to_date(run.model)
    handle.remove()
    run.flow.after_step()
    run.optimizer.zero_grad()
    run.until(5)
    assert book.is_up_to_date(run.model)


@pytest.mark.parametrize("share", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_a_step_is_interrupted_a_list_kept_by_callbacks_is_the_models(share: int):
    run, book = told_run()
    run.until(1)
    run.backward_and_step()
    for at in range(7, 10**6, share):
        with failing(at):
            try:
                run.flow.after_step()
            except Planted:
                assert book.is_up_to_date(run.model), at
                continue
        break
    assert at > 300
    assert book.is_up_to_date(run.model)


def test_factors_written_in_place_are_told_too():
    heard: list[tuple[bool, bool]] = []
    run = Tiny(MASKED, 8, on_resize=lambda name, old, new, ops: heard.append((old is new, bool(ops))))
    run.until(6)
    run.flow.finish()
    assert {(True, True), (False, False)} <= set(heard)  # decisions in place; room that comes and goes without ops


def test_the_trainers_callback_passes_them_on_however_early_they_come(tmp_path):
    callback = rankflow.RankFlowCallback(GROW_THEN_SQUEEZE)
    heard: list[str] = []
    callback.on_resize(lambda name, *_: heard.append(name))
    made = trainer(tmp_path, callback)
    book = Book(made.model)
    callback.on_resize(book)
    made.train()
    assert heard
    assert book.is_up_to_date(made.model)


# -- whoever was not told ---------------------------------------------------------------------------------------------


def stale(hold: Callable[[nn.Module], Any], steps: int = 4) -> list[str]:
    """Warnings of a run in which somebody holds what `hold` gives."""
    run, _ = told_run()
    held = hold(run.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.until(steps)
    del held
    return [str(w.message) for w in caught]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Scheduler:
    def __init__(self, parameters: list[nn.Parameter]):
        self.last = parameters[0]


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "a list of 8": trained,
    "a tuple of 8": lambda m: tuple(trained(m)),
    "a set of 8": lambda m: set(trained(m)),
    "a dict of": lambda m: dict(m.named_parameters()),
    "a list": lambda m: (lambda parameters: lambda: sum(p.norm() for p in parameters))(trained(m)),  # a closure
    "the function": lambda m: (lambda p: lambda: p.norm())(trained(m)[0]),
    "a list of 8 ": lambda m: torch.optim.SGD(trained(m), 0.1),
    "a Scheduler": lambda m: Scheduler(trained(m)),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_old_parameters_that_somebody_holds_are_warned_of_once_with_their_modules(kind: str):
    found = stale(HOLDERS[kind])
    assert len(found) == 1
    assert kind in found[0]
    assert "first" in found[0]
    assert "third" not in found[0], "was not resized yet"


def test_the_warning_comes_before_the_next_step_is_clipped():
    assert len(stale(trained, steps=2)) == 0
    assert len(stale(trained, steps=3)) == 1


def one_variable(model: nn.Module) -> None:
    p = None
    for p in trained(model):
        p.requires_grad_()


def shared_variable(model: nn.Module) -> Any:
    """With functions that are gone, in a frame that goes on."""

    def loop() -> Iterator[None]:
        for p in reversed(trained(model)):  # the first is replaced
            any(p is q for q in model.parameters())
        yield

    going_on = loop()
    next(going_on)
    return going_on


def kept_losses(model: nn.Module) -> list[torch.Tensor]:
    return [loss(model, batch(i)) for i in range(3)]


def a_cycle(model: nn.Module) -> None:
    knot: list[Any] = trained(model)
    knot.append(knot)


QUIET: list[Callable[[nn.Module], Any]] = [one_variable, shared_variable, kept_losses, a_cycle]


@pytest.mark.parametrize("hold", [*QUIET, lambda m: [id(p) for p in trained(m)]])
def test_what_is_not_used_again_is_no_holder(hold: Callable[[nn.Module], Any]):
    gc.disable()
    try:
        assert stale(hold) == []
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("again", [False, True])
def test_hooks_that_went_with_old_parameters_are_warned_of_once(kind: str, again: bool):
    """Unless a callback puts them on the new ones."""

    def put(p: nn.Parameter) -> None:
        getattr(p, kind)(lambda of: None)

    run, _ = told_run()
    for p in run.model.parameters():
        if p.requires_grad:
            put(p)
    if again:
        run.flow.on_resize(lambda name, old, new, ops: [put(p) for p in new.values()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.until(8)
    said = [str(w.message) for w in caught]
    assert [text.partition(" that")[0] for text in said] == [] if again else ["hooks on parameters of first"]


def test_nobody_looks_for_holders_while_nothing_was_replaced(monkeypatch):
    looked: list[int] = []
    monkeypatch.setattr(gc, "get_referrers", lambda *objects: looked.append(len(objects)) or [])
    run, _ = told_run({5: RankPlan({"first": (Keep((0,)),)}, "cut")})
    parameters = trained(run.model)
    run.until(5)
    assert not looked
    run.until(6)
    assert looked == [2]
    assert len(parameters) == 8


def test_a_model_that_is_called_by_a_frame_of_its_own_is_no_holder():
    """A loss, and parameters as local variables, live on until they are assigned anew."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    plans = {1: RankPlan({"0": (Keep((0,)),), "1": (Grow(1),)}), 3: RankPlan({"1": (Drop(),)})}
    flow = rankflow.attach(model, optimizer, phases(Told(plans=plans), until=9), total_steps=5)
    for at in range(5):
        out = loss(model, batch(at))
        out.backward()
        flow.before_step()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.clamp_(-1, 1)
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
    flow.finish()
    assert p is not None
    assert out.isfinite()
