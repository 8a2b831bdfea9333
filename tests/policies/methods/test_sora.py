"""SoRA (arXiv 2311.11696): its proximal step against the formulas, its gates and removals on a live model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import Run, tiny_llama, token_batches
from peft import PeftModel

from rankflow.config.load import load_policy
from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.schedule import When
from rankflow.policies.methods.sora import Sora, SoraGate
from rankflow.policies.observation import Observation, Signal

numbers = st.floats(-3, 3, allow_nan=False, width=32)


def prox(values: list[float], lam: float, lr: float = 1.0, step: int = 1, **gate) -> list[float]:
    theta = {"value": torch.tensor(values), "zero_for": torch.zeros(len(values))}
    return SoraGate(xi=((0, lam),), **gate).prox(theta, lr, step)["value"].tolist()


@given(st.lists(numbers, min_size=1, max_size=8), st.floats(0, 1, width=32))
def test_the_proximal_step_is_the_soft_threshold(values, xi):
    for v, got in zip(values, prox(values, xi), strict=True):
        assert got == pytest.approx(math.copysign(max(abs(v) - xi, 0.0), v), abs=1e-6)
    assert prox([-v for v in values], xi) == [-v for v in prox(values, xi)]
    if xi == 0:
        assert prox(values, 0.0) == pytest.approx(values)


@given(numbers, numbers, st.floats(0, 1, width=32))
def test_it_is_firmly_nonexpansive(x, y, xi):
    a, b = prox([x, y], xi)
    assert (a - b) ** 2 <= (a - b) * (x - y) + 1e-5


@given(numbers)
def test_the_released_operator_has_a_dead_zone_of_twice_the_threshold(v):
    xi = 0.25
    if abs(abs(v) - xi) < 1e-4 or abs(abs(v) - 2 * xi) < 1e-4:
        return  # values exactly there are left to rounding
    wanted = 0.0 if abs(v) < 2 * xi else v - math.copysign(xi, v)
    assert prox([v], xi, prox_rule="official") == pytest.approx([wanted], abs=1e-6)


def test_the_threshold_follows_the_learning_rate_or_does_not():
    assert prox([1.0], 2.0, lr=0.1) == pytest.approx([0.8])
    assert prox([1.0], 0.3, lr=0.1, threshold="absolute") == pytest.approx([0.7])


def test_without_gradients_a_gate_is_zero_after_its_size_over_the_threshold_steps():
    gate = SoraGate(xi=((0, 0.3),), threshold="absolute", remove_after=2)
    theta = {"value": torch.tensor([1.0, -0.5]), "zero_for": torch.zeros(2)}
    zero_at, closed_at = [0, 0], [0, 0]
    for step in range(1, 10):
        theta = dict(gate.prox(theta, 1.0, step))
        for i in range(2):
            if theta["value"][i] == 0 and not zero_at[i]:
                zero_at[i] = step
            if not gate.open(theta)[i] and not closed_at[i]:
                closed_at[i] = step
    assert zero_at == [math.ceil(1.0 / 0.3), math.ceil(0.5 / 0.3)]
    assert closed_at == [z + 2 for z in zero_at]


@pytest.mark.parametrize("sparsify", ["linear", "log_linear", "exp_linear"])
def test_lam_goes_to_its_maximum_in_stages(sparsify):
    when = When(10, 10).resolve(100)
    lams = Sora(lam=0.1, max_lam=0.7, sparsify=sparsify, stages=5, when=when).lams
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    wanted = {
        "linear": 0.1 + 0.6 * t,
        "log_linear": torch.log(math.exp(0.1) + (math.exp(0.7) - math.exp(0.1)) * t),
        "exp_linear": torch.exp(math.log(0.1) + (math.log(0.7) - math.log(0.1)) * t),
    }[sparsify]
    assert [lam for _, lam in lams] == pytest.approx(wanted.tolist())
    assert [step for step, _ in lams] == [0, 30, 50, 70, 90]
    gate = Sora(lam=0.1, max_lam=0.7, sparsify=sparsify, stages=5, when=when).gate
    theta = {"value": torch.ones(1), "zero_for": torch.zeros(1)}
    assert float(gate.prox(theta, 1.0, 29)["value"]) == pytest.approx(1 - float(wanted[0]))
    assert float(gate.prox(theta, 1.0, 100)["value"]) == pytest.approx(0.3)


def test_at_the_first_step_only_b_has_a_gradient():
    run = Run(Sora(when=When(5, 5)), 10, model=tiny_llama(dropout=0.0))
    run.model(**run.batches[0]).loss.backward()
    run.flow.before_step()
    gradients = run.flow._gates.gradients
    assert gradients.keys() == run.flow.layout.keys()
    assert not any(bool(g.any()) for g in gradients.values())
    for site in Adapter(run.model).sites.values():
        assert not bool(site.A.grad.any())
        assert bool(site.B.grad.any())


def test_a_run_is_that_of_the_formulas():
    """AdamW on A and B, Adam and a soft threshold on g, worked out in float64 beside it."""
    lam = 3.0
    model = tiny_llama(dropout=0.0).double()
    run = Run(Sora(lam=lam, when=When(8, 8)), 8, model=model)
    name, site = next(iter(run.flow._adapter.sites.items()))
    g, m, v = torch.ones(2, dtype=torch.float64), 0.0, 0.0
    for t in range(1, 9):
        seen = []
        A, B = site.A.detach().clone(), site.B.detach().clone()
        module = site.layer.lora_B["default"]
        hook = module.register_full_backward_hook(lambda _, __, dy, seen=seen: seen.append(dy[0].detach()))
        inputs = []
        pre = site.layer.lora_A["default"].register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
        rate = run.optimizer.param_groups[0]["lr"]
        run.step()
        hook.remove()
        pre.remove()
        # dL/dg_i = <A_i x, B_i^T dy> over all tokens of both micro-batches
        grad = sum(((x @ A.T) * (dy @ B)).sum((0, 1)) for x, dy in zip(inputs, seen, strict=True))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        moved = g - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        g = moved.sign() * (moved.abs() - rate * lam).clamp(min=0)
        torch.testing.assert_close(run.flow._gates.values()[name].double(), g, rtol=1e-4, atol=1e-5)


def test_a_zero_gate_blocks_its_direction_but_can_revive():
    with pytest.warns(UserWarning, match="none can change anything"):
        run = Run(Sora(lam=0.0, when=When(8, 8)), 8, model=tiny_llama(dropout=0.0))
    run.until(2)
    theta = run.flow._gates._training.theta
    with torch.no_grad():
        for of in theta.values():
            of["value"][0] = 0.0
    run.flow._gates._forward.draw(None)
    run.model(**run.batches[0]).loss.backward()
    for site in run.flow._adapter.sites.values():
        assert not bool(site.A.grad[0].any())
        assert not bool(site.B.grad[:, 0].any())
    run.model.zero_grad()
    run.step()
    assert all(bool(of["value"][0] != 0) for of in theta.values())


def test_gates_can_begin_normal_as_in_the_released_code():
    def begun(seed: int) -> torch.Tensor:
        run = Run(Sora(gate_init="randn", when=When(5, 5)), 10, model=tiny_llama(r=16), seed=seed)
        return torch.cat(list(run.flow._gates.values().values()))

    values = begun(0)
    assert len(values) == 160
    assert abs(float(values.mean())) < 0.3
    assert 0.8 < float(values.std()) < 1.2
    assert torch.equal(values, begun(0))
    assert not torch.equal(values, begun(1))


def test_the_l1_term_is_the_mean_of_all_gates():
    gate = SoraGate(l1=10.0)
    theta = {n: {"value": torch.tensor(v, requires_grad=True)} for n, v in {"a": [1.0, -2.0], "b": [0.5]}.items()}
    term = gate.penalty(theta, 1)
    assert term is not None
    assert float(term.detach()) == pytest.approx(10 * 3.5 / 3)
    assert gate.penalty(theta, 1) is not None
    assert SoraGate().penalty(theta, 1) is None


def test_gates_close_modules_leave_and_what_is_saved_is_plain_lora(tmp_path):
    policy = {
        "policy": "sora",
        "limits": {"*": {"min": 0}},
        "when": {"start": 4, "every": 4},
        "params": {"lam": 12.0, "remove_after": 1},
    }
    run = Run(policy, 20, model=tiny_llama(r=4))
    with pytest.warns(UserWarning, match="every module that trains"):
        run.until(16)
    ranks = list(run.flow.layout.ranks.values())
    assert 0 < sum(ranks) < 40
    probe = token_batches(1, seed=4)[0]
    with torch.no_grad():
        gated = run.model.eval()(**probe).logits
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path).eval()
        torch.testing.assert_close(loaded(**probe).logits, gated)
        run.model.train()
    run.until(20)
    with torch.no_grad():
        gated = run.model.eval()(**probe).logits
        run.flow.finish()
        torch.testing.assert_close(run.model(**probe).logits, gated)
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path).eval()
    torch.testing.assert_close(loaded(**probe).logits, gated)


def test_when_all_gates_close_one_direction_stays_and_the_run_goes_on():
    policy = Sora(lam=1e4, remove_after=0, when=When(2, 2))
    run = Run(policy, 6)
    with pytest.warns(UserWarning, match="every module that trains"):
        run.until(6)
    assert run.flow.layout.total_rank == 1
    run.flow.finish()


def layout(ranks: list[int], **limits) -> Layout:
    return Layout({f"m{i}": Slot(r, 6, 5, 1.0, max_rank=8, **limits) for i, r in enumerate(ranks)})


def observed(gates: dict[str, list[float]]) -> Observation:
    def record(g: list[float]):
        return {
            Signal.GATE: torch.tensor(g),
            Signal.GATE_OPEN: torch.tensor(g) != 0,
            Signal.A: torch.ones(len(g), 6),
            Signal.B: torch.ones(5, len(g)),
        }

    return Observation(1, {name: record(g) for name, g in gates.items()})


def test_a_budget_takes_the_least_directions_of_all_modules():
    policy = Sora(budget=Budget("total_rank", 3), when=When(1, 1, 2), shape="constant")
    before = layout([3, 3])
    obs = observed({"m0": [0.9, 0.0, -0.8], "m1": [0.1, 0.7, 0.2]})
    plan = policy.decide(policy.init(before), obs, before, 1)
    kept = {name: ops[0].idx for name, ops in plan.ops.items()}  # type: ignore[union-attr]
    assert kept == {"m0": (0, 2), "m1": (1,)}


def test_a_phase_that_decides_on_its_first_step_sees_the_gates_it_has_just_put_on():
    phases = [
        {"policy": "hold", "until": 2},
        {"policy": "sora", "budget": {"mean_rank": 1}, "when": {"every": 2}, "params": {"shape": "constant"}},
    ]
    run = Run({"phases": phases, "limits": {"*": {"min": 0}}}, 4, model=tiny_llama(r=2)).until(2)
    first = [e for e in run.flow.ledger.events if e["event"] == "resize"]
    assert [(e["step"], e["total_rank"]) for e in first] == [(2, 10)]
    assert "0 of 20 gates are zero" in first[0]["reason"]


def test_limits_keep_more_than_gates_do():
    policy = Sora(when=When(1, 1, 2))
    before = layout([4, 4], min_rank=2)
    plan = policy.decide({}, observed({"m0": [0.0, 0.3, 0.0, 0.0], "m1": [0.0] * 4}), before, 1)
    after = plan.apply_to(before)
    assert after.ranks == {"m0": 2, "m1": 2}
    assert 1 in plan.ops["m0"][0].idx  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({}, "mean learning rate of 0.01 or more"),
        ({"lam": 2.0}, "mean learning rate of 0.005 or more"),
        ({"gate_lr": 0.004}, "100 steps of shrinkage take 0.4 off"),
        ({"gate_lr": 0.01}, None),
        ({"lam": 3e-4, "threshold": "absolute"}, "take 0.03 off"),
        ({"lam": 0.0, "max_lam": 0.03, "stages": 2, "threshold": "absolute"}, None),
        ({"lam": 0.0, "max_lam": 0.01, "stages": 2, "threshold": "absolute"}, "take 0.41 off"),  # from step 60 on
        ({"budget": Budget("total_rank", 3)}, None),
    ],
)
def test_it_says_when_shrinkage_closes_nothing(settings, note):
    said = Sora(when=When(10, 10).resolve(100), **settings).notes
    assert (note is None and not said) or (note is not None and note in said[0])


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="goes by factors"):
        Sora(lam=0.0, max_lam=1.0, sparsify="exp_linear", when=When(1, 1, 5, 9)).check(layout([2]))
    with pytest.raises(ConfigError, match="sora only lowers ranks"):
        Sora(budget=Budget("total_rank", 9), when=When(1, 1, 5, 9)).check(layout([2]))
    with pytest.raises(ConfigError, match="prox"):
        load_policy({"policy": "sora", "params": {"prox": "hard"}})
