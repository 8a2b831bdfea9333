"""DiffoRA: relaxation, alternation and choice of modules, against DARTS worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from loops import Run, tiny_llama, token_batches
from peft import PeftModel

from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Drop
from rankflow.plans.schedule import When
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.methods.diffora import Diffora, DifforaGate
from rankflow.policies.observation import Observation, Signal

OUTER = token_batches(3, seed=7)


def layout(rank: int = 2, **limits) -> Layout:
    names = [f"layers.{i}.{m}" for i in range(2) for m in ("q", "k", "v", "o")]
    return Layout({n: Slot(rank, 6, 5, 1.0, max_rank=8, **limits) for n in names})


def observed(m: dict[str, float], size: float = 1.0) -> Observation:
    def record(value: float):
        return {
            Signal.GATE: torch.tensor([value]),
            Signal.A: size * torch.ones(2, 6),
            Signal.B: torch.ones(5, 2),
        }

    return Observation(1, {n: record(v) for n, v in m.items()})


VALUES = dict(zip(layout(), [0.9, 0.1, 0.8, 0.2, 0.3, 0.4, 0.35, 0.1], strict=True))


def stays(policy: Diffora, before: Layout, obs: Observation) -> set[str]:
    after = policy.decide({}, obs, before, policy.when.events[-1]).apply_to(before)
    return {n for n, s in after.items() if s.rank}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"layers.0.q", "layers.0.v", "layers.1.k", "layers.1.v"}),
        ({"keep": "global"}, {"layers.0.q", "layers.0.v", "layers.1.k", "layers.1.v"}),
        ({"keep": "global", "ratio": 0.25}, {"layers.0.q", "layers.0.v"}),
        ({"ratio": 0.2}, {"layers.0.q", "layers.1.k"}),  # rounded up
        ({"ratio": 1.0}, set(VALUES)),
    ],
    ids=["per layer", "global", "global quarter", "rounded up", "all"],
)
def test_the_modules_of_greatest_m_stay(options, wanted):
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, **options)
    assert stays(policy, layout(), observed(VALUES)) == wanted
    monotone = {n: v**3 / 2 for n, v in VALUES.items()}
    assert stays(policy, layout(), observed(monotone)) == wanted


def test_of_equal_m_the_earlier_stays_and_what_may_not_leave_does_not():
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, ratio=0.25)
    assert stays(policy, layout(), observed(dict.fromkeys(VALUES, 0.5))) == {"layers.0.q", "layers.1.q"}
    assert stays(policy, layout(min_rank=1), observed(VALUES)) == set(VALUES)


def test_modules_can_be_compared_by_the_size_of_their_update():
    before = layout()
    obs = observed(VALUES)
    big = {n: dict(r) for n, r in obs.items()}
    big["layers.0.k"][Signal.A] = 100 * big["layers.0.k"][Signal.A]
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, ratio=0.25, compare="update")
    assert "layers.0.k" in stays(policy, before, Observation(1, big))


def test_before_the_last_event_nothing_is_chosen():
    policy = Diffora(when=When(1, 1, 4, 10), warmup=0)
    plan = policy.decide({}, observed(dict.fromkeys(VALUES, 0.5)), layout(), 2)
    assert not plan
    assert "entropy 1.000" in plan.reason


def test_a_budget_goes_to_the_chosen_modules_evenly():
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, budget=Budget("total_rank", 16))
    after = policy.decide({}, observed(VALUES), layout(), 1).apply_to(layout())
    assert sorted(after.ranks.values()) == [0, 0, 0, 0, 4, 4, 4, 4]


def test_restart_makes_the_chosen_modules_anew():
    policy = Diffora(when=When(1, 1, 2, 10), warmup=0, restart=True)
    plan = policy.decide({}, observed(VALUES), layout(), 1)
    assert all(isinstance(ops[0], Drop) for ops in plan.ops.values())
    assert sorted(plan.apply_to(layout()).ranks.values()) == [0, 0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("relax", ["sigmoid", "softmax"])
def test_the_relaxation(relax):
    theta = {n: {"logit": torch.tensor([0.3 * i - 1], dtype=torch.float64)} for i, n in enumerate(VALUES)}
    draws = DifforaGate(scope="module", relax=relax).draw(theta, None)
    a = [0.3 * i - 1 for i in range(8)]
    if relax == "sigmoid":
        wanted = [1 / (1 + math.exp(-x)) for x in a]
    else:
        halves = [[math.exp(x) for x in a[:4]], [math.exp(x) for x in a[4:]]]
        wanted = [4 * x / sum(half) for half in halves for x in half]
    assert [float(d["value"]) for d in draws.values()] == pytest.approx(wanted)


def life(**options) -> Lifecycle:
    return Lifecycle((("diffora", Diffora(when=When(3, 3), warmup=1, **options), None),))


@pytest.mark.parametrize("relax", ["sigmoid", "softmax"])
def test_logits_are_trained_on_held_out_batches_as_darts_does(relax):
    """Two updates worked out in float64: gradient of the held-out loss, Adam of (0.5, 0.999) with L2 decay."""
    run = Run(life(relax=relax, gate_lr=0.1), 6, model=tiny_llama(dropout=0.0).double(), outer_batches=OUTER)
    gates = run.flow._gates
    logits = dict.fromkeys(gates.values(), 0.0)
    m, v = dict.fromkeys(logits, 0.0), dict.fromkeys(logits, 0.0)
    run.step()  # before the end of the warm-up nothing is trained
    for t in (1, 2):
        # the controller has taken the update that precedes the next step; redo it by hand
        factors = {n: (s.A.detach().clone(), s.B.detach().clone()) for n, s in run.flow._adapter.sites.items()}
        theta = {n: torch.tensor([x], dtype=torch.float64, requires_grad=True) for n, x in logits.items()}
        values = {n: x.sigmoid() for n, x in theta.items()}
        if relax == "softmax":
            for names in ([n for n in theta if f"layers.{i}." in n] for i in range(2)):
                powers = torch.cat([theta[n] for n in names]).exp()
                values |= {n: len(names) * power[None] / powers.sum() for n, power in zip(names, powers, strict=True)}
        plain = tiny_llama(dropout=0.0).double().eval()
        for name, module in plain.named_modules():
            key = name.removeprefix("base_model.model.")
            if key in factors:
                for part, factor in zip(("lora_A", "lora_B"), factors[key], strict=True):
                    holder = getattr(module, part)["default"]
                    del holder._parameters["weight"]
                    holder.weight = values[key] * factor if part == "lora_A" else factor
        loss = plain(**OUTER[t - 1]).loss
        for n, g in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            g = float(g) + 1e-3 * logits[n]
            m[n], v[n] = 0.5 * m[n] + 0.5 * g, 0.999 * v[n] + 0.001 * g * g
            step = 0.1 * (m[n] / (1 - 0.5**t)) / (math.sqrt(v[n] / (1 - 0.999**t)) + 1e-8)
            logits[n] -= step
        found = {n: float(theta["logit"].detach()) for n, theta in gates._training.theta.items()}
        assert found == pytest.approx(logits, rel=1e-3, abs=1e-4)
        run.step()


def test_training_batches_never_move_the_logits_and_the_choice_ends_the_search():
    run = Run(life(), 9, outer_batches=OUTER).until(2)

    def logits() -> torch.Tensor:
        return torch.cat([theta["logit"].detach().clone() for theta in run.flow._gates._training.theta.values()])

    before = logits()
    assert bool(before.any())
    run.model(**token_batches(1, seed=9)[0]).loss.backward()
    run.flow.before_step()
    run.optimizer.step()
    assert torch.equal(logits(), before)
    run.flow.after_step()  # takes the held-out update that goes before the next step
    assert not torch.equal(logits(), before)
    run.until(9)
    assert sum(rank > 0 for rank in run.flow.layout.ranks.values()) == 6  # 5 modules in each of 2 layers, half, up
    chosen = logits()
    run.flow._phases.outer_when_due()
    assert torch.equal(logits(), chosen)


def test_where_all_modules_stay_and_logits_rest_it_is_plain_lora():
    settings = {"relax": "softmax", "ratio": 1.0, "gate_lr": 1e-30}
    policy = {
        "phases": [
            {"policy": "diffora", "until": 6, "when": {"start": 4, "every": 9}, "params": {"warmup": 1, **settings}},
            {"policy": "hold"},
        ]
    }
    with pytest.warns(UserWarning, match="none can change anything"):
        searched = Run(policy, 8, outer_batches=OUTER)
    searched, plain = searched.until(8), Run("hold", 8).until(8)
    assert searched.losses == plain.losses
    assert searched.flow.layout.ranks == plain.flow.layout.ranks


def test_a_search_then_a_plain_lora(tmp_path):
    policy = {
        "phases": [
            {"policy": "diffora", "until": 6, "when": {"start": 4, "every": 9}, "params": {"warmup": 1}},
            {"policy": "hold"},
        ],
        "limits": {"*": {"min": 0}},
    }
    run = Run(policy, 8, outer_batches=OUTER).until(8)
    run.flow.finish()
    probe = token_batches(1, seed=4)[0]
    with torch.no_grad():
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path).eval()
        torch.testing.assert_close(loaded(**probe).logits, run.model.eval()(**probe).logits)


def test_a_planted_task_is_found():
    """A teacher differs from the model in one module: trained to follow it, the search ranks that one first."""
    teacher = tiny_llama(dropout=0.0).eval()
    planted = "model.layers.1.self_attn.o_proj"
    with torch.no_grad():
        layer = teacher.base_model.model.get_submodule(planted)
        layer.lora_B["default"].weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        with torch.no_grad():
            wanted = teacher(**batch).logits
        return (model(**batch).logits - wanted).square().mean()

    run = Run(life(gate_lr=0.1), 40, model=tiny_llama(dropout=0.0), outer_batches=OUTER, loss_fn=loss)
    for batch in token_batches(30, seed=5):
        loss(run.model, batch).backward()
        run.flow.before_step()
        run.optimizer.step()
        run.flow.after_step()
        run.optimizer.zero_grad()
        if len(run.flow.layout) > sum(rank > 0 for rank in run.flow.layout.ranks.values()):
            break
    values = {n: float(v) for n, v in run.flow._gates.values().items()}
    assert max(values, key=values.__getitem__) == planted


def test_what_is_missing_is_said_at_the_start():
    with pytest.raises(ConfigError, match=r"held-out batches .* outer_batches"):
        Run(life(), 9)
    with pytest.raises(ConfigError, match="holds no batch"):
        Run(life(), 9, outer_batches=[]).until(3)
    with pytest.raises(ConfigError, match="warmup lasts until the choice"):
        Diffora(when=When(1, 1, 3, 9), warmup="50%").check(layout())
