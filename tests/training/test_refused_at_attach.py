"""What cannot be managed is refused before the first step, with the remedy; what can goes all the way."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loops import tiny_llama, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from transformers import Trainer, TrainingArguments

import rankflow
from rankflow.errors import AdapterError, ConfigError, OptimizerError
from rankflow.observe.study import with_a_batch

LATE = {"policy": "squeeze", "budget": {"mean_rank": 2}, "when": {"start": 6, "every": 2, "stop": "90%"}}
Parameters = list[nn.Parameter]


class Plain(Optimizer):
    """Gradient descent."""

    def __init__(self, params: Parameters):
        super().__init__(params, {"lr": 0.1})
        self.log: list[int] = []

    @torch.no_grad()
    def step(self, closure=None):
        self.log.append(len(self.log))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
                    self.keep(p)

    def keep(self, p: nn.Parameter) -> None:
        pass


class Momentum(Plain):
    def keep(self, p: nn.Parameter) -> None:
        self.state[p].setdefault("speed", torch.zeros_like(p))


class Scaled(torch.optim.AdamW):
    """AdamW, and something around its step."""

    def step(self, closure=None):
        return super().step(closure)


class Slow(Scaled):
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("slow", p.detach().clone())


class ByName(Plain):
    """Keeps what it keeps under names of its own."""

    def keep(self, p: nn.Parameter) -> None:
        self.state["all"] = torch.zeros(7)  # type: ignore[index]


class ById(Plain):
    """Keeps what it keeps outside of its state."""

    def __init__(self, params: Parameters):
        super().__init__(params)
        self.speeds: dict[str, dict[int, torch.Tensor]] = {"all": {}}

    def keep(self, p: nn.Parameter) -> None:
        self.speeds["all"].setdefault(id(p), torch.zeros_like(p))


class OnParameters(Plain):
    def keep(self, p: nn.Parameter) -> None:
        p.speed = torch.zeros_like(p)  # type: ignore[attr-defined]


class LookingBack(Plain):
    """Keeps something from its fifth step on."""

    def keep(self, p: nn.Parameter) -> None:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 5:
            state["slow"] = p.detach().clone()


class Pairs(Plain):
    def __init__(self, params: Parameters):
        super().__init__(params)
        self.pairs = {p: p.detach().clone() for p in params}


class Unmade(Optimizer):
    def __init__(self, params: Parameters):
        self.param_groups = [{"params": params, "lr": 0.1}]
        self.state = defaultdict(dict)

    def step(self, closure=None):
        pass


class Wrapper:
    def __init__(self, params: Parameters):
        self.inner = torch.optim.AdamW(params)

    def step(self) -> None:
        self.inner.step()


class Around(Optimizer):
    """Around another optimizer, with state of its own."""

    def __init__(self, params: Parameters):
        self.optimizer = torch.optim.AdamW(params)
        self.param_groups, self.state = self.optimizer.param_groups, defaultdict(dict)

    def step(self, closure=None):
        self.optimizer.step()


class Twice(Plain):
    def __init__(self, params: Parameters):
        super().__init__(params)
        self.base = torch.optim.SGD(self.param_groups)


REFUSED: dict[str, tuple[Callable[[Parameters], Any], str]] = {
    "unknown state": (Momentum, "Momentum keeps 'speed'.*on_unknown_state"),
    "a subclass that keeps more": (Slow, "Slow keeps 'slow'.*on_unknown_state"),
    "state by id": (ById, "ById keeps.*outside of its state, in 'speeds'"),
    "state on parameters": (OnParameters, "OnParameters keeps 'speed'.*on_unknown_state"),
    "state that comes later": (LookingBack, "LookingBack keeps 'slow'.*on_unknown_state"),
    "parameters as keys": (Pairs, "Pairs keeps parameters outside.*pairs"),
    "state by name": (ByName, "ByName keeps 'all'.*on_unknown_state"),
    "sparse": (torch.optim.SparseAdam, "SparseAdam.*dense.*on_unknown_state"),
    "flat vectors": (torch.optim.LBFGS, "LBFGS keeps parameters outside.*_params"),
    "an optimizer within": (Twice, "Twice keeps parameters outside.*base"),
    "never made": (Unmade, r"Unmade is not.*super\(\).__init__"),
    "no optimizer": (Wrapper, "Wrapper is not.*hand over the optimizer inside"),
    "none": (lambda ps: None, "NoneType is not"),
    "a list": (lambda ps: ps, "list is not"),
    "state around": (Around, "Around keeps state of its own around AdamW"),
    "other parameters": (lambda ps: torch.optim.AdamW([nn.Parameter(torch.zeros(3))]), "does not hold"),
}
MANAGED: dict[str, Callable[[Parameters], Optimizer]] = {
    "without state": Plain,
    "something around a step": Scaled,
    "accelerate": lambda ps: Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(ps)),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    **{name: getattr(torch.optim, name) for name in ("Adamax", "Adadelta", "ASGD", "Rprop", "RAdam", "Muon")},
}


def small(**config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=4, target_modules=["0"], **config))


def trained(model: nn.Module) -> Parameters:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: Any, policy: Any = LATE, **options: Any) -> rankflow.Controller:
    flow = rankflow.attach(model, optimizer, policy, total_steps=10, **options)
    for i in range(10):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()
        assert flow.step == i + 1
    flow.finish()
    return flow


# -- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_could_not_follow_are_refused_at_attach(name):
    make, says = REFUSED[name]
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match=says):
        rankflow.attach(model, make(trained(model)), LATE, total_steps=1000)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    rankflow.attach(model, torch.optim.AdamW(trained(model)), LATE, total_steps=1000).detach()


@pytest.mark.parametrize("name", MANAGED)
def test_optimizers_that_can_follow_do(name):
    model = small()
    flow = train(model, MANAGED[name](trained(model)))  # outside of the assertion, which would hold on to the list
    assert flow.layout.total_rank == 2


def test_looking_at_an_optimizer_moves_nothing_of_it():
    """With gradients there, a scheduler around its step, and random numbers that a step would draw."""

    class Noisy(Plain):
        def __init__(self, params: Parameters):
            super().__init__(params)
            self.count = {"steps": [torch.zeros(())]}

        def keep(self, p: nn.Parameter) -> None:
            torch.rand(3)
            self.count["steps"][0] += 1

    model = small()
    optimizer = Noisy(trained(model))
    torch.optim.lr_scheduler.LinearLR(optimizer)
    model(torch.ones(2, 8)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()
    rankflow.attach(model, optimizer, LATE, total_steps=10).detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.log == []
    assert optimizer.count["steps"][0] == 0
    assert not optimizer.state


@pytest.mark.parametrize("make", [Momentum, Slow])
@pytest.mark.filterwarnings("ignore:.*new directions start at full speed")
def test_unknown_state_may_start_afresh_or_stay_where_no_rank_changes(make):
    model = small()
    held = train(model, make(trained(model)), "hold").layout
    assert held.total_rank == 4
    squeezed = train(model, make(trained(model)), LATE, on_unknown_state="reset").layout
    assert squeezed.total_rank == 2


def test_state_of_another_layout_is_refused_at_attach():
    model = small()
    optimizer = torch.optim.AdamW(trained(model))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.state[trained(model)[0]]["exp_avg"] = torch.zeros(9, 8)
    with pytest.raises(OptimizerError, match="another layout"):
        rankflow.attach(model, optimizer, LATE, total_steps=10)


# -- adapters ---------------------------------------------------------------------------------------------------------


def not_trainable(folder: Path) -> PeftModel:
    small().save_pretrained(folder)
    return PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), folder)


def not_active(folder: Path) -> PeftModel:
    model = small()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    return model


NOT_TRAINED = {
    "not trainable": (not_trainable, "nothing of adapter 'default' trains.*is_trainable"),
    "not active": (not_active, "'default' is not active, 'other' is"),
}
DOORS: dict[str, Callable[[PeftModel, Path], Any]] = {
    "attach": lambda m, _: rankflow.attach(m, torch.optim.AdamW(m.parameters()), LATE, total_steps=1000),
    "callback": lambda m, out: Trainer(m, arguments(out), callbacks=[rankflow.RankFlowCallback(LATE)]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("which", NOT_TRAINED)
def test_adapters_that_nobody_trains_are_refused_with_the_call_to_make(which, door, tmp_path):
    made, says = NOT_TRAINED[which]
    model = made(tmp_path)
    with pytest.raises(AdapterError, match=rf"{says}.*set_adapter\('default'\)"):
        DOORS[door](model, tmp_path)
    model.set_adapter("default")
    flow = train(model, torch.optim.AdamW(trained(model)))
    assert flow.layout.total_rank == 2


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=10)


def test_an_optimizer_given_to_the_trainer_is_refused_with_the_trainer(tmp_path):
    model = small()
    with pytest.raises(OptimizerError, match="Momentum keeps 'speed'"):
        Trainer(
            model,
            arguments(tmp_path),
            callbacks=[rankflow.RankFlowCallback(LATE)],
            optimizers=(Momentum(trained(model)), None),  # type: ignore[arg-type]
        )


# -- data -------------------------------------------------------------------------------------------------------------


class Lines(IterableDataset[Any]):
    def __iter__(self):
        return iter(token_batches(2))


def drained() -> Any:
    batches = iter(token_batches(2))
    list(batches)
    return batches


EXAMPLES = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}]
NOT_BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "a dataset": (lambda: TensorDataset(torch.zeros(4, 2)), "dataset of examples .TensorDataset.*DataLoader"),
    "part of one": (lambda: Subset(EXAMPLES, [0]), "dataset of examples"),  # type: ignore[arg-type]
    "a stream": (Lines, "dataset of examples"),
    "examples": (lambda: EXAMPLES, r"an example \(input_ids \[5\]\).*DataLoader"),
    "lists of numbers": (lambda: [{"input_ids": [1, 2, 3]}], "an example.*no tensor"),
    "texts": (lambda: [{"text": "hello"}], "an example"),
    "pairs without a loss": (lambda: [(torch.zeros(2), torch.zeros(2))], "tuple.*loss_fn"),
    "one batch": (lambda: token_batches(1)[0], "a single dict"),
    "a name": (lambda: "train.jsonl", "a single str"),
    "nothing": (list, "no batch"),
    "a number": (lambda: 3, "cannot be iterated"),
    "a generator that is through": (drained, "no batch left"),
}
STUDIES = {
    "batches": {
        "policy": "colora",
        "budget": {"mean_rank": 2},
        "limits": {"*": {"max": 4}},
        "when": {"start": 6, "every": 2},
        "params": {"points": 1, "batches": 1},
    },
    "outer_batches": {"policy": "diffora", "budget": {"mean_rank": 1}},
}


def attach(argument: str, data: Any) -> rankflow.Controller:
    model = tiny_llama(dropout=0.0)
    given: Any = {argument: data}
    return rankflow.attach(model, torch.optim.AdamW(trained(model)), STUDIES[argument], total_steps=12, **given)


@pytest.mark.parametrize("name", NOT_BATCHES)
@pytest.mark.parametrize("argument", STUDIES)
def test_data_that_are_no_batches_are_refused_at_attach(name, argument):
    make, says = NOT_BATCHES[name]
    with pytest.raises(ConfigError, match=rf"^{argument}.*{says}"):
        attach(argument, make())
    if name != "a generator that is through":
        with pytest.raises(ConfigError, match=rf"^{argument}.*{says}"):
            rankflow.RankFlowCallback(STUDIES[argument], **{argument: make()})


@pytest.mark.parametrize("name", [n for n in NOT_BATCHES if n != "a generator that is through"])
def test_calibration_refuses_them_too(name):
    make, says = NOT_BATCHES[name]
    with pytest.raises(ConfigError, match=rf"^batches.*{says}"):
        rankflow.calibrate(tiny_llama(), make())


@pytest.mark.parametrize("argument", STUDIES)
def test_batches_are_taken_as_they_come(argument):
    """A loader, a loader of ready-made batches, and a stream without an end, of which no batch is lost."""
    loader: Any = DataLoader(Lines(), batch_size=None)
    for data in (token_batches(2), tuple(token_batches(2)), DataLoader(EXAMPLES, batch_size=1), loader):  # type: ignore[arg-type]
        attach(argument, data).detach()
    attach(argument, itertools.cycle(token_batches(2))).detach()
    assert list(with_a_batch(iter([1, 2, 3]), argument)) == [1, 2, 3]
