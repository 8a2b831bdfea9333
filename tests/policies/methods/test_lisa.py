"""LISA: who is drawn, that the others rest bit for bit, and what a phase leaves behind."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, resumed, same_weights, tiny_llama
from synthetic import World

from rankflow.config.load import load_policy
from rankflow.errors import ConfigError
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.schedule import When
from rankflow.policies.methods.lisa import Lisa
from rankflow.policies.observation import Observation
from rankflow.training.ledger import Ledger
from rankflow.training.trainer import RankFlowCallback
from tests.training.test_trainer import default_weights, trainer

EVENTS = When(1, 10).resolve(60)
NAMES = [f"model.layers.{i}.{m}" for i in range(8) for m in ("self_attn.q_proj", "mlp.up_proj")]


def layout_of(*names: str, **slot) -> Layout:
    return Layout({name: Slot(2, 12, 10, 1.0, **slot) for name in names})


def lisa(when: When = EVENTS, **params) -> Lisa:
    return Lisa(when=when, **params)


def drawn(policy: Lisa, layout: Layout, step: int) -> set[str]:
    """Modules that train after the event at `step`."""
    plan = policy.decide(policy.init(layout), Observation(step), layout, step)
    return {name for name, slot in plan.apply_to(layout).items() if slot.trainable}


# -- who is drawn -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9), st.integers(1, 2000), st.sampled_from(["layer", "module"]))
def test_so_many_whole_layers_train_and_no_other(active, seed, step, group):
    layout = layout_of(*NAMES)
    on = drawn(lisa(active=active, seed=seed, group=group), layout, step)
    if group == "module":
        assert len(on) == active
    else:
        assert Counter(name.split(".")[2] for name in on) == dict.fromkeys({n.split(".")[2] for n in on}, 2)
        assert len(on) == 2 * active


def test_a_draw_depends_on_seed_and_step_alone():
    layout = layout_of(*NAMES)
    torch.manual_seed(0)
    first = [drawn(lisa(), layout, step) for step in (10, 20, 30, 40)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert [drawn(lisa(), layout, step) for step in (10, 20, 30, 40)] == first
    assert torch.equal(torch.get_rng_state(), before)
    assert [drawn(lisa(seed=1), layout, step) for step in (10, 20, 30, 40)] != first
    assert len(set(map(frozenset, first))) > 1


def test_every_layer_trains_its_share_of_the_time():
    """Uniform: over 2000 draws of 2 in 8, each layer within 5 standard deviations of a quarter."""
    layout = layout_of(*NAMES)
    count = Counter(n.split(".")[2] for step in range(2000) for n in drawn(lisa(), layout, step) if "q_proj" in n)
    assert len(count) == 8
    assert all(abs(c - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for c in count.values())


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["layers.0.q", "layers.0.k", "layers.1.q"], 2),
        (["encoder.layers.0.q", "decoder.layers.0.q", "decoder.layers.0.k"], 2),
        (["h.3.attn.c_attn", "h.3.mlp.c_fc", "h.31.mlp.c_fc"], 2),
        (["layers.0.experts.0.up", "layers.0.experts.1.up", "layers.0.gate"], 3),
        (["embed_tokens", "lm_head", "layers.0.fc1", "layers.0.fc2"], 3),
    ],
)
def test_a_layer_is_what_agrees_up_to_the_last_number(names, layers):
    layout = layout_of(*names, "x.0.a")
    lisa(active=layers).check(layout)
    with pytest.raises(ConfigError, match=f"trains {layers + 1} of {layers + 1} layers, so none would ever rest"):
        lisa(active=layers + 1).check(layout)


def test_some_modules_always_train():
    layout = layout_of(*NAMES, "lm_head")
    policy = lisa(active=1, always=("*head", r"re:.*\.0\..*"))
    policy.check(layout)
    for step in range(40):
        on = drawn(policy, layout, step)
        assert {"lm_head", *NAMES[:2]} < on
        assert len(on) == 5
    with pytest.raises(ConfigError, match=r"lisa: always: '\*haed' matches no module; the nearest is 'lm_head'"):
        lisa(always=("*haed",)).check(layout)


def test_modules_that_left_or_were_frozen_before_are_not_drawn_and_not_touched():
    layout = layout_of(*NAMES)
    out = {
        NAMES[0]: replace(layout[NAMES[0]], rank=0),
        NAMES[1]: replace(layout[NAMES[1]], trainable=False),
        NAMES[2]: replace(layout[NAMES[2]], trainable=False),
    }
    layout = Layout({**layout, **out})
    policy = lisa(active=1)
    state = policy.init(layout)
    seen = set()
    for step in range(60):
        plan = policy.decide(state, Observation(step), layout, step)
        assert not plan.ops.keys() & out.keys()
        layout = plan.apply_to(layout)
        seen |= {name for name, slot in layout.items() if slot.trainable and slot.rank}
    assert seen == set(NAMES[3:])


def test_only_what_changes_is_in_a_plan():
    layout = layout_of(*NAMES)
    policy = lisa(active=3)
    state = policy.init(layout)
    for step in range(60):
        plan = policy.decide(state, Observation(step), layout, step)
        after = plan.apply_to(layout)
        assert set(plan.ops) == {n for n in layout if layout[n].trainable != after[n].trainable}
        assert plan or plan.reason.endswith("train on")
        layout = after


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Lisa(budget=Budget("total_rank", 9), when=EVENTS), "lisa keeps to no budget"),
        (lisa(active=6), "trains 6 of 6 layers, so none would ever rest; lower active or use group: module"),
        (lisa(When(90).resolve(60)), "no due step"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(policy, words):
    with pytest.raises(ConfigError, match=words):
        policy.check(World((2,) * 6).layout)


def test_it_draws_from_the_first_step_on_unless_told_otherwise():
    def events(**when):
        _, (phase,) = load_policy({"policy": "lisa", **when}).resolve(100, World((2,) * 6).layout)
        return list(phase.policy.when.events)

    assert events() == [1, 21, 41, 61, 81]
    assert events(when={"start": 30, "every": 40}) == [30, 70]
    assert load_policy({"policy": "lisa", "params": {"always": ["m1"]}}).policies[0][1].always == ("m1",)


# -- on a real model --------------------------------------------------------------------------------------------------

STEPS = 20
REAL = {"policy": "lisa", "when": {"start": 2, "every": 3}, "params": {"active": 1}}
THEN_GROW = {
    "phases": [
        {**REAL, "until": 10},
        {
            "policy": "increlora",
            "until": 17,
            "budget": {"mean_rank": 4},
            "when": {"every": 3},
            "params": {"window": "all", "score_fraction": 1.0},
        },
        {**REAL, "when": {"every": 2}, "params": {"active": 1, "seed": 3}},
    ]
}


def parameters(run: Run) -> dict[tuple[str, str], torch.nn.Parameter]:
    return {(n, r): p for n, site in run.flow._adapter.sites.items() for r, p in site.tensors().items()}


def kept(run: Run) -> dict[tuple[str, str], list[torch.Tensor]]:
    """Every factor, with what the optimizer keeps of it."""
    return {
        key: [t.detach().clone() for t in (p, *(run.optimizer.state[p].values()))] for key, p in parameters(run).items()
    }


def frozen(run: Run) -> set[str]:
    return {name for name, slot in run.flow.layout.items() if not slot.trainable}


def adamw(w, state, g, lr):
    """One AdamW step worked out in float64: weight decay 0.1, gradient already clipped."""
    t = float(state["step"]) + 1
    m = 0.9 * state["exp_avg"].double() + 0.1 * g
    v = 0.999 * state["exp_avg_sq"].double() + 0.001 * g * g
    return w * (1 - lr * 0.1) - lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_the_frozen_rest_bit_for_bit_and_the_thawed_go_on_with_their_moments():
    run = Run(REAL, STEPS)
    groups = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    rested: set[str] = set()
    woken = 0
    for _ in range(STEPS):
        resting, before, lr = frozen(run), kept(run), run.optimizer.param_groups[0]["lr"]
        states = {key: copy.deepcopy(run.optimizer.state[p]) for key, p in parameters(run).items()}
        gradients: dict[tuple[str, str], torch.Tensor] = {}

        def look(into=gradients):
            into |= {key: p.grad.double() for key, p in parameters(run).items() if p.grad is not None}

        run.step(look)
        assert {name for name, _ in gradients} == set(run.flow.layout) - resting
        clip = min(1.0, 1.0 / (math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) + 1e-6))
        after = kept(run)
        for key in after:
            if key[0] in resting:
                assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
            elif key[0] in rested:
                expected = adamw(before[key][0].double(), states[key], clip * gradients[key], lr)
                torch.testing.assert_close(after[key][0].double(), expected, rtol=1e-4, atol=1e-6)
                woken += 1
        assert all(p.grad is None for key, p in parameters(run).items() if key[0] in frozen(run))
        rested |= frozen(run)
    assert woken > 0
    assert [[id(p) for p in group["params"]] for group in run.optimizer.param_groups] == groups
    assert min(float(run.optimizer.state[p]["step"]) for p in run.flow.parameters()) < STEPS
    assert run.flow.version == 0


def trained(run: Run) -> set[bool]:
    return {p.requires_grad for p in run.flow.parameters()}


def test_a_phase_leaves_nothing_frozen_to_the_next():
    run = Run(THEN_GROW, STEPS).until(8)
    assert trained(run) == {True, False}
    run.until(9)  # the step that is next belongs to the growing phase, which listens to it
    assert trained(run) == {True}
    run.until(10)
    assert all(int(state[2]) == 10 for state in run.flow._phases.state.values()), "a module was not heard"
    run.until(16)
    assert run.flow.layout.total_rank == 40
    assert trained(run) == {True}
    assert trained(run.until(19)) == {True, False}
    assert trained(run.until(STEPS)) == {True}
    run.flow.finish()
    assert run.flow.ledger.layout() == run.flow.layout


def test_a_run_that_stops_early_is_left_trainable():
    run = Run(REAL, STEPS).until(7)
    assert trained(run) == {True, False}
    run.flow.finish()
    assert trained(run) == {True}
    assert run.flow.ledger.layout() == run.flow.layout


def test_what_the_user_froze_stays_frozen():
    model = tiny_llama()
    mine = [p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A.default" in n]
    mine += [p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_" in n and ".default." in n]
    for p in mine:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in mine]
    run = Run(REAL, STEPS, model=model)
    for step in range(1, STEPS + 1):
        run.until(step)
        assert not any(p.requires_grad for p in mine)
    assert all(torch.equal(p, b) for p, b in zip(mine, before, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 9, 10, 18])
def test_resume_is_bit_for_bit(tmp_path, stop):
    whole = Run(THEN_GROW, STEPS).until(STEPS)
    first = Run(THEN_GROW, STEPS).until(stop)
    second = resumed(first, THEN_GROW, STEPS, tmp_path)
    assert frozen(second) == frozen(first)
    second.until(STEPS)
    assert second.flow.layout == whole.flow.layout
    assert second.losses == whole.losses[2 * stop :]
    assert same_weights(default_weights(whole.model), default_weights(second.model))


def test_going_back_to_a_checkpoint_thaws_and_freezes_as_it_was_then():
    run = Run(REAL, STEPS).until(1)
    first = run.flow.state_dict()
    later = run.until(4).flow.state_dict()
    resting = frozen(run)
    run.flow.load_state_dict(first)
    assert trained(run) == {True}
    run.flow.load_state_dict(later)
    assert frozen(run) == resting
    assert {name for (name, _), p in parameters(run).items() if not p.requires_grad} == resting


@pytest.mark.parametrize(
    ("stop", "optim"),
    [
        (6, "adamw_torch_fused"),
        pytest.param(6, "adafactor", marks=pytest.mark.slow),
        pytest.param(8, "adamw_torch_fused", marks=pytest.mark.slow),
        pytest.param(18, "adamw_torch_fused", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_resumes_bit_for_bit_with_frozen_modules(tmp_path, stop, optim):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": optim}
    whole = trainer(tmp_path, RankFlowCallback(THEN_GROW), **options)
    whole.train()
    flow = RankFlowCallback(THEN_GROW)
    resumed = trainer(tmp_path, flow, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))
    assert flow.flow is not None
    assert all(p.requires_grad for p in flow.flow.parameters())
    assert Ledger.read(tmp_path / "rankflow.jsonl").layout() == flow.flow.layout
