"""gradient_start: its ranks, rows and sizes against those worked out here from dense gradients, and when it looks."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankflow
from rankflow.errors import ConfigError, PlanError
from rankflow.policies.methods.gradient_start import GradientStart

STEPS = 20


class Net(nn.Module):
    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 12, 2, bias=False) if kind == "conv" else nn.Linear(12, 20, bias=False)
        self.second = nn.Linear(12 if kind == "conv" else 20, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.reshape(-1, 3, 2, 2)).flatten(1) if self.kind == "conv" else self.first(x)
        return self.head(torch.tanh(self.second(torch.tanh(x))))


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.2, 3, 12, dtype=torch.float64)  # inputs are larger in some directions
    return [
        (torch.randn(8, 12, generator=g, dtype=torch.float64) * spread, torch.randint(0, 3, (8,), generator=g))
        for _ in range(n)
    ]


def adapted(*, head: bool = False, kind: str = "linear", **config: Any) -> PeftModel:
    torch.manual_seed(0)
    saved = ["head"] if head else None
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], modules_to_save=saved, **config)
    return get_peft_model(Net(kind).double(), lora)  # type: ignore[return-value]


class Run:
    def __init__(self, model: PeftModel, steps: int = STEPS, policy: Any = "gradient_start", **options: Any):
        self.model = model.train()
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        options = {"batches": batches(), "loss_fn": loss, **options}
        self.flow = rankflow.attach(model, self.optimizer, policy, total_steps=steps, **options)

    def until(self, step: int) -> Run:
        while self.flow.step < step:
            loss(self.model, batches()[self.flow.step % 4]).backward()
            self.flow.before_step()
            self.optimizer.step()
            self.flow.after_step()
            self.optimizer.zero_grad()
        return self

    def adapter(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}


def policy(**params: Any) -> dict[str, Any]:
    """All rows of the gradient are looked at, so that nothing is left to chance."""
    return {"policy": "gradient_start", "params": {"batches": 4, "rows": 64, "components": 64, **params}}


def dense(model: PeftModel) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each module the weight, the mean gradient over all batches, and all inputs."""
    base = model.base_model.model
    layers = {name: getattr(base, name).base_layer for name in ("first", "second")}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, keep=inputs[name]: keep.append(args[0].detach()))
        for name, layer in layers.items()
    ]
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    sums = [torch.zeros_like(w) for w in weights]
    for batch in batches():
        for total, g in zip(sums, torch.autograd.grad(loss(model, batch), weights), strict=True):
            total += g / 4
    for hook in hooks:
        hook.remove()
    for w in weights:
        w.requires_grad_(False)
    each = zip(layers, weights, sums, strict=True)
    return {name: (w.detach(), g, torch.cat(inputs[name])) for name, w, g in each}


def test_ranks_rows_and_sizes_are_those_of_the_dense_gradient():
    model = adapted()
    with torch.no_grad():  # so that the modules differ
        weight = model.base_model.model.first.base_layer.weight
        weight.mul_((torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1) * 3)
    truth = dense(model)
    run = Run(model, steps=100, policy=policy(at_least=0, at_most=16))
    ranks = run.flow.layout.ranks
    cost = {name: sum(w.shape) for name, (w, _, _) in truth.items()}
    score = {n: float((w * g).abs().mean()) / math.sqrt(cost[n]) for n, (w, g, _) in truth.items()}
    assert sum(ranks[n] * cost[n] for n in ranks) <= 4 * sum(cost.values())
    best = min(  # r in proportion to score, as near as whole ranks within the parameters allow
        range(1, 12), key=lambda r: abs(r / max(1, (4 * sum(cost.values()) - r * cost["first"]) // cost["second"])
                                        - score["first"] / score["second"])
    )  # fmt: skip
    assert abs(ranks["first"] - best) <= 1
    for name, (_, g, x) in truth.items():
        a = getattr(model.base_model.model, name).lora_A["default"].weight.detach()
        rows = torch.nn.functional.normalize(a)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(a), dtype=a.dtype), atol=1e-5, rtol=0)
        most = torch.linalg.svdvals(g)[: len(a)].square().sum()
        assert (g @ rows.T).square().sum() > 0.98 * most, "as much of the gradient as so many directions can hold"
        norms = a.norm(dim=1)
        assert norms.max() - norms.min() < 1e-5 * norms.mean(), "one factor for a module"
        energy, random = (x @ a.T).square().mean(), x.square().mean() / 3
        torch.testing.assert_close(energy, random, rtol=1e-4, atol=0)  # 32 inputs, and the sample has all of them


def test_the_function_stays_and_steps_are_not_longer_than_random_ones():
    model = adapted(head=True)
    run = Run(model)
    run.until(1)
    x = batches()[0][0]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model.base_model.model(x))
    assert not any(bool(t.any()) for n, t in run.adapter().items() if "lora_B" in n)


@pytest.mark.parametrize("head", [False, True])
def test_it_looks_before_the_first_step_or_once_the_head_has_learnt(head: bool):
    model = adapted(head=head)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    run = Run(model)
    trained = [p.requires_grad for n, p in model.named_parameters() if "lora_" in n]
    look = max(e["step"] for e in run.until(3).flow.ledger.events if e["event"] == "resize")
    assert look == (2 if head else 0)  # a tenth of the run
    assert all(trained) is not head
    assert any(trained) is not head
    first = Run(adapted(head=head))
    if head:
        old = first.model.base_model.model.head.modules_to_save["default"].weight.detach().clone()
        first.until(1)
        assert all(torch.equal(first.adapter()[n], a) for n, a in before.items())
        assert not torch.equal(first.model.base_model.model.head.modules_to_save["default"].weight, old)
    run.until(STEPS).flow.finish()
    assert all(bool(t.any()) for n, t in run.adapter().items() if "lora_B" in n)
    assert all(p.requires_grad for n, p in run.model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_resumed_run_ends_where_it_would_have(at: int, tmp_path: Path):
    whole = Run(adapted(head=True)).until(STEPS)
    first = Run(adapted(head=True)).until(at)
    first.model.save_pretrained(tmp_path)
    saved = {"optimizer": first.optimizer.state_dict(), "flow": first.flow.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    model = adapted(head=True)
    rankflow.restore(model, tmp_path)
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    again = Run(model, state=kept["flow"])
    again.optimizer.load_state_dict(kept["optimizer"])
    again.until(STEPS)
    assert again.flow.layout.ranks == whole.flow.layout.ranks
    assert same(again.adapter(), whole.adapter())


def test_convolutions_keep_their_random_rows():
    model = adapted(kind="conv")
    before = model.base_model.model.first.lora_A["default"].weight.detach().clone()
    run = Run(model, policy=policy(at_least=1, at_most=1))
    after = model.base_model.model.first.lora_A["default"].weight
    kept = min(len(before), len(after))
    assert torch.equal(after[:kept], before[:kept])
    assert run.flow.layout["second"].rank >= 1


@pytest.mark.parametrize("head", [False, True])
def test_an_adapter_that_has_trained_is_refused_at_attach(head: bool):
    model = adapted(head=head)
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.fill_(0.1)
    with pytest.raises(PlanError):
        Run(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("head", [False, True])
def test_gradients_that_are_not_finite_leave_the_ranks_and_let_the_adapter_train(head: bool):
    bad = [(x * float("nan"), y) for x, y in batches()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = Run(adapted(head=head), batches=bad).until(4)
    assert run.flow.layout.ranks == {"first": 4, "second": 4}
    assert all(p.requires_grad for n, p in run.model.named_parameters() if "lora_" in n)
    assert any(e.get("skipped") == "non_finite" for e in run.flow.ledger.events)


def test_a_pass_without_the_adapter_does_not_let_it_train_while_it_waits():
    run = Run(adapted(head=True))
    for _ in range(3):
        x = batches()[0][0]
        with run.model.disable_adapter(), torch.no_grad():
            run.model(x)  # PEFT lets the factors train again afterwards
        run.until(run.flow.step + 1)
    assert not any(e["event"] == "skip" for e in run.flow.ledger.events)
    run.until(STEPS)


def test_an_iterator_is_not_used_up_before_it_is_looked_at():
    run = Run(adapted(head=True), batches=iter(batches(1))).until(3)
    assert max(e["step"] for e in run.flow.ledger.events if e["event"] == "resize") == 2


def test_directions_beyond_the_sketch_are_as_long_as_random_ones():
    model = adapted()
    Run(model, policy=policy(components=2, at_least=1, at_most=1))
    a = model.base_model.model.first.lora_A["default"].weight.detach()
    assert len(a) == 4
    torch.testing.assert_close(a[2:].norm(dim=1), torch.full((2,), 3**-0.5, dtype=a.dtype), rtol=0.6, atol=0)
    torch.testing.assert_close(a[:2].norm(dim=1), a[:1].norm(dim=1).expand(2), rtol=1e-5, atol=0)


def test_no_gradient_at_all_changes_nothing():
    run = Run(adapted(), loss_fn=lambda model, batch: 0.0 * loss(model, batch))
    assert run.flow.layout.ranks == {"first": 4, "second": 4}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs(steps: int):
    run = Run(adapted(head=True), steps=steps).until(steps)
    run.flow.finish()
    assert all(p.requires_grad for n, p in run.model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batches": None}, ConfigError),
        ({"batches": []}, ConfigError),
        ({"policy": {"policy": "gradient_start", "when": {"start": 3}}}, ConfigError),
        ({"policy": {"policy": "gradient_start", "params": {"head_first": 1.0}}}, ConfigError),
        ({"policy": {"policy": "gradient_start", "budget": {"mean_rank": 1000}}}, ConfigError),
        ({"policy": {"phases": [{"policy": "hold", "until": 3}, {"policy": "gradient_start"}]}}, ConfigError),
        ({"policy": {"phases": [{"policy": "gradient_start", "until": 1}, {"policy": "hold"}]}}, ConfigError),
    ],
    ids=["no batches", "none in them", "when", "all of the run", "budget out of reach", "not first", "short phase"],
)
def test_bad_input_is_refused(options: dict[str, Any], error: type[Exception]):
    with pytest.raises(error):
        Run(adapted(head=True), **options)


def test_it_costs_at_most_a_twentieth_of_the_steps():
    assert GradientStart().in_run(1000, False).batches == 8
    assert GradientStart().in_run(60, True).batches == 3
    assert GradientStart().in_run(5, True).batches == 1
