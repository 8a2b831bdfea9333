"""Runs under `torch.compile` decide and learn what they would without: steps that are scored run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Tiny, batch, compiled_code_of_nobody_else, loss  # noqa: F401, the fixture

from rankflow.analysis.run_comparison import compare

STEPS = 10
TWICE = {"start": 3, "every": 4, "stop": 8}
SMALL = {"*": {"min": 0, "max": 5}}
POLICIES: dict[str, dict[str, Any]] = {
    "increlora": {
        "policy": "increlora",
        "when": TWICE,
        "budget": {"mean_rank": 4},
        "limits": SMALL,
        "params": {"window": 1, "score_fraction": 1.0},
    },
    "squeeze by loss": {
        "policy": "squeeze",
        "when": TWICE,
        "budget": {"mean_rank": 1},
        "params": {"metric": "loss", "window": 2, "shape": "linear"},
    },
    "sora": {"policy": "sora", "when": TWICE, "params": {"lam": 3.0, "gate_lr": 0.05, "remove_after": 1}},
    "bayesian_lora": {
        "policy": "bayesian_lora",
        "when": TWICE,
        "params": {"gate_init": -0.5, "gate_lr": 0.1, "mu": 0.03},
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own


def trained(policy: dict[str, Any], backend: Any = None) -> tuple[Tiny, list[float]]:
    run, losses = Tiny(policy, STEPS), []
    model: Any = run.model if backend is None else torch.compile(run.model, backend=backend)
    for step in range(STEPS):
        value = loss(model, batch(step))
        losses.append(value.item())
        value.backward()
        run.flow.before_step()
        run.optimizer.step()
        run.flow.after_step()
        run.optimizer.zero_grad()
    run.flow.finish()
    return run, losses


@pytest.mark.parametrize("mode", ["resize", "mask"])
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_runs_are_those_that_are_not(name: str, mode: str):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    policy = {**POLICIES[name], "mode": mode}
    plain, expected = trained(policy)
    compiled, losses = trained(policy, backend)
    assert graphs, "not all of it was eager"
    found = compare(plain.flow.ledger, compiled.flow.ledger)
    assert found.same, str(found)
    assert any(e["event"] == "resize" for e in plain.flow.ledger.events)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_with_gradients_that_are_compiled_too(name: str):
    plain, expected = trained(POLICIES[name])
    compiled, losses = trained(POLICIES[name], "aot_eager")
    assert compare(plain.flow.ledger, compiled.flow.ledger).same
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
