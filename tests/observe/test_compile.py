"""Under `torch.compile`: how often it compiles anew, the warning that it may stop to, and who keeps code eager."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from failing import Planted, failing
from loops import tiny_llama, token_batches
from tiny import LAYERS, Tiny, batch, compiled_code_of_nobody_else, loss, tiny  # noqa: F401, the fixture

import rankflow
from rankflow.observe.compile import compiled_modules, stay_eager
from rankflow.plans.layout import Layout
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.ops import Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.policies.lifecycle import Lifecycle
from tests.training.test_controller import scripted

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own


def to(*ranks: int) -> Any:
    """A plan that brings the four layers to these ranks."""

    def make(layout: Layout) -> RankPlan:
        ops = {}
        for name, rank in zip(LAYERS, ranks, strict=True):
            have = layout[name].rank
            if rank != have:
                ops[name] = [Keep(tuple(range(rank)))] if rank < have else [Grow(rank - have)]
        return RankPlan(ops, "told")

    return make


def anywhere(steps: range) -> dict[int, Any]:
    """Plans that bring all layers to ranks drawn anew at each step, of those that limits allow."""

    def make(layout: Layout, rng: random.Random) -> RankPlan:
        return to(*(rng.choice([r for r in range(1, 9) if slot.allows(r)]) for slot in layout.values()))(layout)

    return {step: partial(make, rng=random.Random(step)) for step in steps}


def lifecycle(plans: dict[int, Any], **options: Any) -> Lifecycle:
    return replace(scripted(plans=plans)[0], **options)


class Counted:
    """A run whose model, or each of whose LoRA layers, is compiled by a backend that counts its graphs."""

    def __init__(self, policy: Any, how: str, steps: int = 20, **options: Any):
        self.graphs: list[int] = []  # after every step
        made: list[Any] = []
        self.run = Tiny(policy, steps, **options)
        self.model: Any = self.run.model
        self.shapes = {self.ranks}

        def backend(graph: Any, inputs: Any) -> Any:
            made.append(graph)
            return graph.forward

        if how == "whole":
            self.model = torch.compile(self.run.model, backend=backend)
        elif how == "layers":
            for name in LAYERS:
                getattr(self.run.model.base_model.model, name).compile(backend=backend)
        self._made = made

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.run.flow.layout.ranks.values())

    def step(self) -> None:
        flow, optimizer = self.run.flow, self.run.optimizer
        self.shapes.add(self.ranks)
        loss(self.model, batch(flow.step)).backward()
        self.graphs.append(len(self._made))
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()

    def until(self, step: int) -> Counted:
        while self.run.flow.step < step:
            self.step()
        return self


def by_layer(shapes: set[tuple[int, ...]]) -> int:
    """How many shapes the LoRA layers had, the second and the third being of the same size."""
    sizes = ("5x7", "7x7", "7x7", "7x4")
    return len({(size, rank) for ranks in shapes for size, rank in zip(sizes, ranks, strict=True)})


# -- how many graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "expected"), [("layers", by_layer), ("whole", len)])
def test_a_graph_for_every_combination_of_shapes_that_code_meets_and_no_more(how: str, expected: Any):
    plans = {2: to(5, 3, 3, 3), 3: to(3, 3, 3, 3), 4: to(3, 5, 3, 3), 5: to(3, 3, 5, 3), 6: to(5, 3, 3, 3)}
    counted = Counted(lifecycle(plans), how).until(8)
    assert counted.graphs[-1] == expected(counted.shapes)
    assert counted.graphs[2] > counted.graphs[1], "a rank that is new"
    assert counted.graphs[3] == counted.graphs[2], "back to ranks that were there"
    assert counted.graphs[6] == counted.graphs[5]
    counted.run.flow.detach()


@pytest.mark.parametrize(
    ("how", "expected"), [("layers", by_layer), pytest.param("whole", len, marks=pytest.mark.slow)]
)
def test_buckets_bound_the_graphs_of_a_run_with_many_decisions(how: str, expected: Any):
    found = {}
    with torch._dynamo.config.patch(recompile_limit=64):
        for buckets in ((), (2, 3)):
            torch._dynamo.reset()
            counted = Counted(lifecycle(anywhere(range(2, 13)), limits=Limits(buckets=buckets)), how).until(13)
            counted.run.flow.detach()
            found[len(buckets)] = counted.graphs[-1]
            assert counted.graphs[-1] == expected(counted.shapes)
    sizes = 3  # of the four layers two are alike
    assert found[2] <= (sizes * 2 if how == "layers" else 2 ** len(LAYERS))
    assert found[0] > 1.4 * found[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers' own
def test_decoder_layers_whose_modules_are_tied_have_a_graph_for_each_bucket():
    """And again for the first layer, whose input has no gradient."""
    model: Any = tiny_llama(r=2, dropout=0.0).train()
    made: list[Any] = []
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=lambda graph, _: made.append(graph) or graph.forward)
    ranks = ((4, 2), (2, 4), (4, 4), (2, 2), (4, 2), (2, 4))

    def plan(layout: Layout, to: tuple[int, int]) -> RankPlan:
        ops = {}
        for name, slot in layout.items():
            if (rank := to["layers.1." in name]) != slot.rank:
                ops[name] = [Keep((0, 1))] if rank == 2 else [Grow(2)]
        return RankPlan(ops, "told")

    plans = {step: partial(plan, to=to) for step, to in enumerate(ranks, 1)}
    limits = Limits(ties=((r"re:.*layers\.(\d+)\..*",),), buckets=(2, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = 2 * len(ranks)  # so that a quarter of them is left after the last decision
    flow = rankflow.attach(model, optimizer, lifecycle(plans, limits=limits), total_steps=steps)
    for tokens in token_batches(steps):
        model(**tokens).loss.backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
    flow.finish()
    assert sum(e["event"] == "resize" for e in flow.ledger.events) == len(ranks)
    assert len(made) == 2 * 2


# -- the warning ------------------------------------------------------------------------------------------------------


def warned(policy: Any, how: str, limit: int = 8) -> bool:
    """Whether attaching warns, of a model that is compiled as a whole, layer by layer or not at all."""
    model: Any = tiny()
    if how == "layers":
        for name in LAYERS:
            getattr(model.base_model.model, name).compile(backend="eager")
    given = torch.compile(model, backend="eager") if how == "whole" else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch._dynamo.config.patch(recompile_limit=limit), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rankflow.attach(given, optimizer, policy, total_steps=20).detach()
    return any("torch.compile" in str(w.message) for w in caught)


@pytest.mark.parametrize("how", ["layers", "whole"])
def test_decisions_that_can_pass_the_limit_are_warned_of_at_attach(how: str):
    assert warned(lifecycle(anywhere(range(2, 7))), how, limit=8)
    assert not warned(lifecycle(anywhere(range(2, 7))), how, limit=99)


def test_layers_of_one_class_share_the_limit():
    rare = lifecycle(anywhere(range(2, 4)))
    decisions = 20  # the scripted policy decides at every step
    assert not warned(rare, "whole", limit=decisions + 1)
    assert warned(rare, "layers", limit=decisions + 1)


def test_a_model_that_is_not_compiled_is_not_warned_of():
    other: Any = torch.compile(tiny(), backend="eager")
    loss(other, batch(0))
    assert not warned(lifecycle(anywhere(range(2, 7))), "eagerly", limit=1)


def test_ranks_that_keep_shapes_or_come_back_to_few_are_not_warned_of():
    policy = lifecycle(anywhere(range(2, 7)), mode="mask", limits=Limits((Limit("*", max=8),)))
    assert not warned(policy, "whole", limit=2)
    assert not warned(lifecycle(anywhere(range(2, 7)), limits=Limits(buckets=(2, 3))), "whole", limit=2)


def test_nothing_is_imported_for_a_model_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert compiled_modules(tiny()) == 0
    assert "torch._dynamo" not in sys.modules


# -- scored steps stay eager -------------------------------------------------------------------------------------------


class Listener:
    pass


def compiles() -> bool:
    torch._dynamo.reset()
    graphs = []
    plus = torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert plus(torch.ones(2)).tolist() == [2, 2]
    return bool(graphs)


def test_the_last_to_leave_lets_code_compile_again():
    assert compiles()
    one, other = Listener(), Listener()
    first, second = stay_eager(one), stay_eager(other)
    assert not compiles()
    first()
    assert not compiles()
    second()
    second()
    assert compiles()


def test_a_listener_that_is_gone_has_left():
    one = Listener()
    stay_eager(one)
    assert not compiles()
    del one
    assert compiles()


def test_a_stance_of_the_users_comes_back():
    with torch.compiler.set_stance("force_eager"):
        leave = stay_eager(Listener())
        leave()
        assert not compiles()
    assert compiles()


def test_who_fails_while_beginning_to_listen_has_left_when_gone():
    for at in itertools.count():
        listener = Listener()
        with suppress(Planted), failing(at) as places:
            stay_eager(listener)
        del listener
        assert compiles(), at
        if places() <= at:
            break
    assert at > 3
