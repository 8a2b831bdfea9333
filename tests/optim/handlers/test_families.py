"""A family of optimizers is added by one file, or by a package that declares its handlers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import lora, loss_of
from packages import install
from torch.optim import Optimizer

from rankflow.errors import ConfigError, OptimizerError
from rankflow.lora.adapter import Adapter
from rankflow.optim import handlers
from rankflow.optim.handler import Handler
from rankflow.optim.handlers import PLUGINS, find_handler
from rankflow.plans.ops import Keep
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon

FAMILY = """
from rankflow.optim.handler import Handler

HANDLERS = {"Heavy": Handler("weight")}
"""


class Heavy(Optimizer):
    """Momentum under a name of its own."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(self.state[p].setdefault("weight", torch.zeros_like(p)).mul_(0.9).add_(p.grad), alpha=1e-3)


def stepped() -> tuple[Any, Heavy]:
    model = lora("linear")
    optimizer = Heavy([p for p in model.parameters() if p.requires_grad])
    loss_of(model, "linear").backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(params=["a file", "a package"])
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a file":
        (tmp_path / "heavy.py").write_text(FAMILY)
        monkeypatch.setattr(handlers, "__path__", [*handlers.__path__, str(tmp_path)])
    else:
        monkeypatch.syspath_prepend(str(tmp_path))
        install(tmp_path, "heavies", FAMILY, {"rankflow.optimizers": {"heavy": "heavies:HANDLERS"}})


def test_an_optimizer_of_no_family_is_refused():
    model, optimizer = stepped()
    adapter = Adapter(model)
    with pytest.raises(OptimizerError, match="'weight'"):
        Surgeon(adapter, optimizer).apply(RankPlan({name: [Keep((2, 0))] for name in adapter.sites}, "told"))


def test_state_of_an_added_family_follows_a_resize(added: None):
    model, optimizer = stepped()
    adapter = Adapter(model)
    before = {name: optimizer.state[site.A]["weight"].clone() for name, site in adapter.sites.items()}
    Surgeon(adapter, optimizer).apply(RankPlan({name: [Keep((2, 0))] for name in adapter.sites}, "told"))
    for name, site in adapter.sites.items():
        assert site.rank == 2
        torch.testing.assert_close(optimizer.state[site.A]["weight"], before[name][[2, 0]])


def test_what_names_a_class_goes_before_what_is_anybodys(monkeypatch: pytest.MonkeyPatch):
    Lion = type("Lion", (Heavy,), {"__module__": "menagerie.cats"})
    parameter = [torch.nn.Parameter(torch.ones(2, 2))]
    assert find_handler(Lion(parameter)).first == "exp_avg"  # type: ignore[union-attr]
    monkeypatch.setattr(PLUGINS, "_registered", {})
    PLUGINS.register("menagerie", {"menagerie.Lion": Handler("mane"), "torch.optim.SGD": Handler("mane")})
    assert find_handler(Lion(parameter)).first == "mane"  # type: ignore[union-attr]
    assert find_handler(torch.optim.SGD(parameter)).first == "momentum_buffer"  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [Handler("weight"), {"Heavy": "weight"}, {1: Handler("weight")}])
def test_what_is_no_mapping_of_handlers_is_refused(wrong: Any):
    with pytest.raises(ConfigError):
        PLUGINS.register("heavy", wrong)
