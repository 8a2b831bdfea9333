"""Studies measure what they say and leave no trace."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import lora, loss_of, same, snapshot
from torch import Tensor, nn

from rankflow.errors import ConfigError, RankFlowError
from rankflow.lora.adapter import Adapter
from rankflow.observe.study import run_study
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Keep
from rankflow.plans.plan import RankPlan
from rankflow.policies.base import Policy, State
from rankflow.policies.observation import Observation, Signal, Study

GRADIENTS = frozenset({Signal.A, Signal.B, Signal.GRAD_A, Signal.GRAD_B})


def batches(n: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (n, 2, 6), generator=generator)
    return [{"input_ids": x, "labels": x} for x in ids]


@dataclass(frozen=True, kw_only=True)
class GradientImportance(Policy):
    """Keeps the directions whose removal would change the loss most, to first order, on a few batches at the start."""

    keep: int = 2

    @property
    def studies(self) -> tuple[Study, ...]:
        return (Study("gradient", GRADIENTS, batches=3),)

    def observe(self, state: State, obs: Observation, step: int) -> State:
        scores = {}
        for name, seen in obs.items():
            on_a = (seen[Signal.A] * seen[Signal.GRAD_A]).sum(1)
            on_b = (seen[Signal.B] * seen[Signal.GRAD_B]).sum(0)
            scores[name] = (on_a + on_b).abs()
        return scores

    def decide(self, state: State, obs: Observation, layout: Layout, step: int) -> RankPlan:
        best = {name: score.topk(self.keep).indices.sort().values.tolist() for name, score in state.items()}
        return RankPlan({name: [Keep(tuple(idx))] for name, idx in best.items()}, "first-order importance")


def test_a_gradient_policy_finds_the_directions_that_matter():
    model = lora("linear")
    adapter = Adapter(model)
    dead = {name: (i % 4, (i + 1) % 4) for i, name in enumerate(adapter.sites)}
    with torch.no_grad():
        for name, site in adapter.sites.items():
            site.B[:, list(dead[name])] = 0.0  # B = 0 and grad_B * B = 0: no first-order effect at all
    policy = GradientImportance()
    observed = run_study(policy.studies[0], adapter, model, batches(3))
    assert observed.study == "gradient"
    state = policy.observe({}, observed, 0)
    plan = policy.decide(state, observed, adapter.layout(), 0)
    for name, (op,) in plan.ops.items():
        assert isinstance(op, Keep)
        assert set(op.idx) == set(range(4)) - set(dead[name])
    assert len(plan.ops) == len(adapter.sites)


def test_signals_are_averages_over_batches_and_points():
    model = lora("linear", lora_dropout=0.4).train()
    adapter = Adapter(model)
    points = (0.25, 0.5, 0.75, 1.0)
    signals = frozenset({Signal.GRAD_A, Signal.DELTA_SCORE, Signal.S_B, Signal.TOKENS, Signal.A})
    observed = run_study(Study("path", signals, batches=2, points=points), adapter, model, batches(5), step=9)
    assert observed.step == 9

    model.eval()
    name = "model.layers.1.mlp.down_proj"
    site = adapter.sites[name]
    scaling = site.scaling
    gradients = []
    for batch in batches(2):
        for point in points:
            for s in adapter.sites.values():
                s.layer.scaling["default"] = scaling * point
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append(site.A.grad.clone())
    for s in adapter.sites.values():
        s.layer.scaling["default"] = scaling
    torch.testing.assert_close(observed[name][Signal.GRAD_A], torch.stack(gradients).mean(0))
    single = [run_study(Study("one", signals, batches=2, points=(p,)), adapter, model, batches(2)) for p in points]
    for signal in (Signal.DELTA_SCORE, Signal.S_B):
        torch.testing.assert_close(observed[name][signal], torch.stack([o[name][signal] for o in single]).mean(0))
        assert not torch.equal(single[0][name][signal], single[-1][name][signal])
    assert observed[name][Signal.TOKENS] == 12
    assert torch.equal(observed[name][Signal.A], site.A)


def test_completeness_of_a_path():
    """sum over the path of <DeltaW, dL/dDeltaW> is the loss with the adapter minus the loss without it."""
    model = lora("linear")
    adapter = Adapter(model)
    n = 64
    points = tuple((k + 0.5) / n for k in range(n))
    observed = run_study(
        Study("path", frozenset({Signal.B, Signal.GRAD_B}), batches=1, points=points), adapter, model, batches(1)
    )
    # At point c: <B, grad_B> = <c DeltaW, G(c)>, so one pass at c is worth 1/c of that.
    total = 0.0
    for point in points:
        one = run_study(
            Study("one", frozenset({Signal.B, Signal.GRAD_B}), batches=1, points=(point,)), adapter, model, batches(1)
        )
        total += sum(float((r[Signal.B] * r[Signal.GRAD_B]).sum()) for r in one.values()) / point / n
    with torch.no_grad():
        there = model(**batches(1)[0]).loss
        with model.disable_adapter():
            without = model(**batches(1)[0]).loss
    assert total == pytest.approx(float(there - without), rel=1e-3)
    assert len(observed) == len(adapter.sites)


def random_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state(), list(random.getstate()[1]), name, keys.tolist(), rest]


class Trained:
    """A model in the middle of training: optimizer state, gradients, mixed modes."""

    def __init__(self) -> None:
        self.model = lora("linear", lora_dropout=0.3).train()
        self.model.base_model.model.model.layers[0].eval()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        for _ in range(2):
            loss_of(self.model, "linear").backward()
            self.optimizer.step()
        self.hooked = 0
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _: setattr(self, "hooked", self.hooked + 1))

    def state(self) -> dict[str, object]:
        return {**snapshot(self.model, self.optimizer), "random": random_state(), "hooked": self.hooked}


class Shaky:
    """A batch source and a loss that draw random numbers, and may fail."""

    def __init__(self, fail: str | None):
        self.fail = fail

    def __iter__(self) -> Any:
        for i, batch in enumerate(batches(4)):
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            if self.fail == "batches" and i == 2:
                raise KeyError("the data broke")
            yield batch

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert not any(m.training for m in model.modules())
        torch.rand(1)
        if self.fail == "loss":
            raise KeyError("the loss broke")
        return model(**batch).loss


@pytest.mark.parametrize("fail", [None, "batches", "loss"])
def test_nothing_is_left_behind(fail: str | None):
    run = Trained()
    before = run.state()
    shaky = Shaky(fail)
    study = Study("everything", frozenset(Signal), batches=3, points=(0.5, 1.0))
    adapter = Adapter(run.model)
    if fail is None:
        run_study(study, adapter, run.model, shaky, shaky.loss)
    else:
        with pytest.raises(KeyError, match="broke"):
            run_study(study, adapter, run.model, shaky, shaky.loss)
    assert same(run.state(), before)
    assert not any(len(m._forward_hooks) or len(m._forward_pre_hooks) for m in run.model.modules())


def test_the_same_key_gives_the_same_study():
    model = lora("linear")
    study = Study("s", frozenset({Signal.GRAD_A, Signal.SKETCH}), batches=2)
    data = torch.utils.data.DataLoader(batches(20), batch_size=None, shuffle=True)

    def once(**key: int) -> Observation:
        torch.rand(1)
        return run_study(study, Adapter(model), model, data, **key)

    one, again, other = once(seed=1, step=2), once(seed=1, step=2), once(seed=1, step=3)
    name = next(iter(one))
    for signal in study.signals:
        assert torch.equal(one[name][signal], again[name][signal])
        assert not torch.equal(one[name][signal], other[name][signal])


def test_no_more_batches_are_drawn_than_asked_for():
    model = lora("linear")
    source = iter(batches(5))
    run_study(Study("s", frozenset({Signal.GRAD_A}), batches=2), Adapter(model), model, source)
    assert len(list(source)) == 3


def test_gradients_may_be_off_around_a_study():
    model = lora("linear")
    study = Study("s", frozenset({Signal.DELTA_SCORE}), batches=1)
    with torch.no_grad():
        observed = run_study(study, Adapter(model), model, batches(1))
    assert all(r[Signal.DELTA_SCORE] > 0 for r in observed.values())


@pytest.mark.parametrize(
    ("study", "data", "loss_fn", "error", "message"),
    [
        (Study("s", GRADIENTS, points=(0.0, 1.0)), 1, None, ConfigError, "must be positive"),
        (Study("s", GRADIENTS, points=()), 1, None, ConfigError, "must be positive"),
        (Study("s", GRADIENTS, points=(float("nan"),)), 1, None, ConfigError, "must be positive"),
        (Study("s", GRADIENTS), 0, None, ConfigError, "got no batch"),
        (Study("s", GRADIENTS), 1, lambda m, b: m(b["input_ids"]).loss, RankFlowError, "the loss is None.*labels"),
        (Study("s", GRADIENTS), 1, lambda m, b: m(**b).logits, RankFlowError, r"tensor of shape \[2, 6, 64\]"),
    ],
)
def test_studies_that_cannot_be_run_say_why(study, data, loss_fn, error, message):
    model = lora("linear")
    with pytest.raises(error, match=message):
        run_study(study, Adapter(model), model, batches(data), loss_fn)


def test_an_adapter_that_does_not_train_has_nothing_to_study():
    model = lora("linear").requires_grad_(False)
    with pytest.raises(RankFlowError, match="none of the adapter's factors trains"):
        run_study(Study("s", GRADIENTS), Adapter(model), model, batches(1))
