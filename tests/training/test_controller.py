"""The controller: order of calls, counting of steps, what it refuses and what it survives, resume bit for bit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from loops import GROW_THEN_SQUEEZE, Run, resumed, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel, get_peft_model_state_dict

import rankflow
from rankflow.errors import AdapterError, CheckpointError, ConfigError, OptimizerError, RankFlowError
from rankflow.plans.ops import Drop, Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.observation import Observation, Signal, Study
from rankflow.training.checkpoint import load_state, save_state
from rankflow.training.ledger import Ledger

STEPS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Policy):
    """Does what it is told, to drive the controller."""

    plans: dict = dataclasses.field(default_factory=dict)
    listens: frozenset = frozenset()
    asked: list = dataclasses.field(default_factory=list)
    seen: list = dataclasses.field(default_factory=list)
    study: tuple = ()

    @property
    def studies(self):
        return self.study

    def listen(self, step):
        return self.listens if self.when.due(step) else frozenset()

    def observe(self, state, obs, step):
        self.seen.append((step, obs))
        return state

    def decide(self, state, obs, layout, step):
        self.asked.append(step)
        make = self.plans.get(step)
        return make(layout) if make else RankPlan(reason="scripted rest")


def scripted(every=1, **fields) -> tuple[Lifecycle, Scripted]:
    """A lifecycle of one scripted policy; its `asked` and `seen` lists are shared with the resolved copy."""
    policy = Scripted(when=When(start=1, every=every), **fields)
    return Lifecycle((("scripted", policy, None),)), policy


def only(run: Run, name: str) -> str:
    return next(n for n in run.flow.layout if n.endswith(name))


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_a_lifecycle_grows_then_anneals_and_ends_within_budget(tmp_path):
    run = Run(GROW_THEN_SQUEEZE, STEPS, ledger=tmp_path / "l.jsonl")
    other = {n: t for n, t in weights(run.model).items() if ".other." in n}
    run.until(4)
    assert len(set(run.flow.layout.ranks.values())) > 1
    run.until(11)
    peak = run.flow.layout.total_rank
    assert peak == 4 * 10
    run.until(STEPS)
    run.flow.finish()
    layout = run.flow.layout
    assert layout.total_rank == 2 * 10
    assert Ledger.read(tmp_path / "l.jsonl").layout() == layout
    after = weights(run.model)
    assert all(torch.equal(after[n], t) for n, t in other.items()), "the other adapter was touched"
    assert {"attach", "phase", "resize", "finish"} <= {e["event"] for e in run.flow.ledger.events}


def test_same_seed_same_bits_and_global_rng_untouched():
    runs = [Run(GROW_THEN_SQUEEZE, STEPS, seed=3).until(12) for _ in range(2)]
    assert runs[0].flow.layout == runs[1].flow.layout
    assert same_weights(weights(runs[0].model), weights(runs[1].model))
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(2)
    for batch in token_batches(2):
        run.model(**batch).loss.backward()
    before = torch.get_rng_state()
    run.flow.before_step()
    run.optimizer.step()
    version = run.flow.version
    run.flow.after_step()
    assert run.flow.version > version
    assert torch.equal(before, torch.get_rng_state())


def assert_one_run(whole: Run, second: Run, stop: int) -> None:
    """That `second`, resumed after `stop` steps, is bit for bit the run that was not stopped."""
    assert second.flow.layout == whole.flow.layout
    assert second.flow.ledger.layout() == whole.flow.layout
    a = {n: t for n, t in weights(whole.model).items() if ".default." in n}
    b = {n: t for n, t in weights(second.model).items() if ".default." in n}
    assert same_weights(a, b)
    assert second.losses == whole.losses[2 * stop :]


@pytest.mark.parametrize("stop", [1, 5, 9, 12, 13, 16, 19])
def test_resume_is_bit_for_bit_the_run_that_was_not_stopped(tmp_path, stop):
    whole = Run(GROW_THEN_SQUEEZE, STEPS).until(STEPS)
    first = Run(GROW_THEN_SQUEEZE, STEPS).until(stop)
    assert_one_run(whole, resumed(first, GROW_THEN_SQUEEZE, STEPS, tmp_path).until(STEPS), stop)


@pytest.mark.parametrize("init", ["zero_b", "grad"])  # what the surgeon draws, and what the probes do
def test_a_resumed_run_keeps_its_seed_whatever_it_is_attached_with(tmp_path, init):
    params = {"window": 2, "score_fraction": 1.0, "grow_init": init, "top_k": 2}
    policy = {"policy": "increlora", "budget": {"mean_rank": 4}, "when": {"start": 3, "every": 3}, "params": params}
    whole = Run(policy, STEPS, seed=3).until(8)
    other = Run(policy, STEPS, seed=4).until(8)
    assert not same_weights(weights(whole.model), weights(other.model)), "the seed is of no consequence here"
    first = Run(policy, STEPS, seed=3).until(4)
    second = resumed(first, policy, STEPS, tmp_path, seed=4)
    assert second.flow.seed == 3
    assert_one_run(whole, second.until(8), 4)


def test_state_is_refused_where_ranks_or_format_differ(tmp_path):
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(4)
    state = run.flow.state_dict()
    fresh = Run(GROW_THEN_SQUEEZE, STEPS)
    with pytest.raises(CheckpointError, match=r"rankflow\.restore"):
        fresh.flow.load_state_dict(state)
    with pytest.raises(CheckpointError, match="format 99"):
        fresh.flow.load_state_dict({**state, "format": 99})
    run.model.save_pretrained(tmp_path)
    folder = save_state(run.flow, tmp_path)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(tmp_path)


def test_resume_with_another_number_of_steps_warns():
    state = Run(GROW_THEN_SQUEEZE, STEPS).until(1).flow.state_dict()
    longer = Run(GROW_THEN_SQUEEZE, 2 * STEPS)
    with pytest.warns(UserWarning, match="20 steps and now has 40"):
        longer.flow.load_state_dict(state)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_only_real_optimizer_steps_count():
    lifecycle, policy = scripted()
    run = Run(lifecycle, STEPS)
    run.model(**run.batches[0]).loss.backward()
    for _ in range(3):
        run.flow.before_step()
        run.flow.after_step()  # a scaler that skips never calls optimizer.step
    assert run.flow.step == 0
    assert policy.asked == []
    run.optimizer.step()
    run.flow.after_step()
    assert run.flow.step == 1
    assert policy.asked == [1]


def test_a_skipped_step_is_listened_to_again():
    lifecycle, policy = scripted(listens=frozenset({Signal.GRAD_B}))
    run = Run(lifecycle, STEPS)
    for took in (False, True):
        run.model(**run.batches[0]).loss.backward()
        run.flow.before_step()
        if took:
            run.optimizer.step()
        run.flow.after_step()
    (step, obs), *rest = policy.seen
    assert step == 1
    assert not rest
    assert len(obs.gather(Signal.GRAD_B)) == len(run.flow.layout)


class CountingMode(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators a piece of code runs, in order."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def hooks_on(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_parameters = sum(
        len(getattr(p, "_backward_hooks", None) or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        for p in model.parameters()
    )
    return on_parameters + sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def test_idle_steps_run_the_same_operators_and_install_no_hooks():
    plain_model = tiny_llama().train()
    optimizer = torch.optim.AdamW([p for p in plain_model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    run = Run({**GROW_THEN_SQUEEZE, "phases": [{"policy": "hold"}]}, STEPS)
    hooks = hooks_on(plain_model)
    for i in range(3):
        recorded = []
        for model, opt, flow in ((plain_model, optimizer, None), (run.model, run.optimizer, run.flow)):
            torch.manual_seed(i)
            with CountingMode() as mode:
                model(**run.batches[i]).loss.backward()
                if flow is not None:
                    flow.before_step()
                opt.step()
                if flow is not None:
                    flow.after_step()
                opt.zero_grad()
            recorded.append(mode.ops)
        assert recorded[0] == recorded[1]
        assert hooks_on(run.model) == hooks


def test_scored_steps_listen_and_other_steps_do_not():
    run = Run(GROW_THEN_SQUEEZE, STEPS)
    quiet = hooks_on(tiny_llama())
    heard = []
    for _ in range(12):
        heard.append(hooks_on(run.model) > quiet)
        run.step()
    # events at 3, 6, 9 (stop before 12), each with a window of two steps
    assert heard == [s in (2, 3, 5, 6, 8, 9) for s in range(1, 13)]


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_a_decision_without_its_signals_is_an_error_and_never_zeros():
    lifecycle, _ = scripted(listens=frozenset({Signal.GRAD_B}))
    run = Run(lifecycle, STEPS)
    run.model(**run.batches[0]).loss.backward()
    run.optimizer.step()
    with pytest.raises(RankFlowError, match="before_step"):
        run.flow.after_step()


def test_two_controllers_on_one_adapter_are_refused_and_a_finished_one_is_not_in_the_way():
    run = Run("hold", STEPS)
    with pytest.raises(ConfigError, match="finish"):
        rankflow.attach(run.model, run.optimizer, "hold", total_steps=5)
    run.flow.finish()
    with rankflow.attach(run.model, run.optimizer, "hold", total_steps=5) as flow:
        assert flow.step == 0


def test_an_optimizer_of_something_else_is_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(OptimizerError, match="optimizer"):
        rankflow.attach(model, optimizer, "hold", total_steps=5)


def test_a_model_without_lora_and_a_wrong_adapter_name_are_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(AdapterError, match="other"):
        rankflow.attach(model, optimizer, "hold", total_steps=5, adapter_name="nosuch")
    plain = torch.nn.Linear(3, 3)
    with pytest.raises(AdapterError, match="LoRA"):
        rankflow.attach(plain, torch.optim.SGD(plain.parameters()), "hold", total_steps=5)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_run_without_steps_is_refused(steps):
    model = tiny_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match="total_steps"):
        rankflow.attach(model, optimizer, "hold", total_steps=steps)


# -- what it survives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_skip_the_decision_and_the_run_goes_on(bad):
    lifecycle, policy = scripted(listens=frozenset({Signal.GRAD_A}), plans={2: lambda lo: grow(lo)})
    run = Run(lifecycle, STEPS)
    target = run.flow._adapter.sites[only(run, "q_proj")].A

    hook = target.register_hook(lambda g: g * bad)
    for micro in run.batches[:2]:
        run.model(**micro).loss.backward()
    hook.remove()
    run.flow.before_step()
    run.optimizer.zero_grad()  # the user drops the bad gradients and steps on
    run.optimizer.step()
    with pytest.warns(UserWarning, match=r"q_proj: grad_A is not finite"):
        run.flow.after_step()
    assert policy.asked == []
    assert run.flow.ledger.events[-1]["event"] == "skip"
    assert run.flow.ledger.events[-1]["skipped"] == "non_finite"
    run.step()
    assert policy.asked == [2]
    assert run.flow.version == 1


def grow(layout, n: int = 1) -> RankPlan:
    return RankPlan({next(iter(layout)): (Grow(n),)}, "grow")


def test_a_disabled_adapter_at_a_due_step_skips_the_decision():
    lifecycle, policy = scripted(plans={1: grow, 2: grow})
    run = Run(lifecycle, STEPS)
    run.model(**run.batches[0]).loss.backward()
    run.optimizer.step()
    run.model.base_model.disable_adapter_layers()
    with pytest.warns(UserWarning, match="disabled"):
        run.flow.after_step()
    run.model.base_model.enable_adapter_layers()
    run.model.set_adapter("default")
    run.step()
    assert policy.asked == [2]


def test_an_adapter_merged_in_mid_run_is_refused_and_nothing_changes():
    lifecycle, _ = scripted(plans={2: grow})
    run = Run(lifecycle, STEPS).until(1)
    run.model.merge_adapter()
    before = weights(run.model)
    run.model.eval()
    run.optimizer.step()
    with pytest.raises(AdapterError, match="merge"):
        run.flow.after_step()
    assert same_weights(before, weights(run.model))


def test_half_the_precision_in_mid_run_goes_on():
    lifecycle, _ = scripted(plans={2: grow, 3: lambda lo: RankPlan({next(iter(lo)): (Keep((1,)),)}, "shrink")})
    run = Run(lifecycle, STEPS)
    run.model.to(torch.bfloat16)  # before there is optimizer state: torch's own AdamW refuses mixed dtypes
    run.until(5)
    site = run.flow._adapter.sites[next(iter(run.flow.layout))]
    assert site.A.dtype == torch.bfloat16
    assert site.A.shape[0] == 1


def test_a_module_leaves_and_comes_back_in_its_old_place():
    name = "model.layers.0.self_attn.v_proj"
    lifecycle, _ = scripted(
        plans={2: lambda lo: RankPlan({name: (Drop(),)}, "leave"), 4: lambda lo: RankPlan({name: (Grow(3),)}, "back")}
    )
    run = Run(lifecycle, STEPS)
    order = [n for n, p in run.model.named_parameters() if p.requires_grad]
    run.until(3)
    assert not any(name in n for n, p in run.model.named_parameters() if p.requires_grad)
    run.until(6)
    assert [n for n, p in run.model.named_parameters() if p.requires_grad] == order
    held = [id(p) for p in run.optimizer.param_groups[0]["params"]]
    assert held == [id(p) for _, p in run.model.named_parameters() if p.requires_grad]


# -- penalty, studies, numbers ----------------------------------------------------------------------------------------


def test_penalty_gradient_equals_the_penalty_in_the_loss():
    policy = {"policy": "increlora", "budget": {"mean_rank": 4}, "params": {"orth": 0.3, "window": 1}}
    run = Run(policy, STEPS)
    assert float(run.flow.penalty()) == 0, "it would count twice"
    run.flow.before_step()
    added = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    run.optimizer.zero_grad()
    sites = run.flow._adapter.sites.values()
    total = sum(
        (s.A @ s.A.T - torch.eye(s.A.shape[0])).norm() + (s.B.T @ s.B - torch.eye(s.B.shape[1])).norm() for s in sites
    )
    (0.3 * total / (2 * len(sites))).backward()
    expected = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    assert added.keys() == expected.keys()
    assert all(torch.allclose(added[n], expected[n], atol=1e-6) for n in added)

    in_loss = Run(policy, STEPS, penalty="in_loss")
    in_loss.flow.before_step()
    assert all(p.grad is None for p in in_loss.model.parameters())
    in_loss.flow.penalty().backward()
    assert all(torch.allclose(p.grad, expected[n]) for n, p in in_loss.model.named_parameters() if n in expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientImportance(Policy):
    """Before the first step: grow the module where |A * dL/dA| + |B * dL/dB| is largest."""

    studies: ClassVar = (Study("importance", frozenset({Signal.GRAD_A, Signal.GRAD_B, Signal.A, Signal.B}), batches=2),)

    def observe(self, state, obs, step):
        if obs.study is None:
            return state
        score = [
            (r[Signal.A] * r[Signal.GRAD_A]).abs().sum() + (r[Signal.B] * r[Signal.GRAD_B]).abs().sum()
            for r in obs.values()
        ]
        return {"score": torch.stack(score)}

    def decide(self, state, obs, layout, step):
        best = list(layout)[int(state["score"].argmax())]
        return RankPlan({best: (Grow(2),)}, "most important") if step == 0 else RankPlan(reason="done")


def test_a_study_decides_before_the_first_step_and_leaves_no_trace():
    model = tiny_llama(dropout=0.0)
    for name, p in model.named_parameters():
        if "layers.1.mlp.up_proj.lora_B.default" in name:
            p.data.fill_(0.5)
    rng = torch.get_rng_state()
    lifecycle = Lifecycle((("importance", GradientImportance(), None),))
    run = Run(lifecycle, STEPS, model=model, batches=token_batches(3))
    before = weights(model)
    assert run.flow.layout["model.layers.1.mlp.up_proj"].rank == 4
    assert run.flow.layout.total_rank == 22
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    after = weights(model)
    assert all(torch.equal(after[n], t) for n, t in before.items() if "up_proj" not in n)


def test_a_study_without_data_names_the_argument():
    with pytest.raises(ConfigError, match="batches="):
        Run(Lifecycle((("importance", GradientImportance(), None),)), STEPS)


def test_metrics_and_parameters_describe_what_is_live():
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(10)
    metrics = run.flow.metrics()
    live = [p for n, p in run.model.named_parameters() if ".default." in n]
    assert metrics["rankflow/params"] == sum(p.numel() for p in live)
    assert metrics["rankflow/total_rank"] == sum(
        p.shape[0] for n, p in run.model.named_parameters() if "A.default" in n
    )
    assert {id(p) for p in run.flow.parameters()} == {id(p) for p in live}
    assert metrics["rankflow/resizes"] == run.flow.version > 0


def test_what_is_saved_in_mid_run_is_plain_peft(tmp_path):
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(14)
    run.model.eval()
    batch = run.batches[0]
    expected = run.model(**batch).logits
    run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    base = tiny_llama().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(loaded(**batch).logits, expected, atol=1e-6)
    shapes = {k: v.shape for k, v in get_peft_model_state_dict(run.model).items()}
    assert shapes == {k: v.shape for k, v in get_peft_model_state_dict(loaded).items()}


def test_observation_that_was_not_asked_for_is_an_error():
    obs = Observation(1, {"m": {Signal.A: torch.zeros(1)}})
    with pytest.raises(RankFlowError, match="grad_A"):
        obs["m"][Signal.GRAD_A]
