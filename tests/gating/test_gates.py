"""Gates on live adapters: what forwards, merges and files see of them, how they are trained, resized and folded."""

from __future__ import annotations

import copy
import dataclasses
import gc
import tempfile
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import KINDS, base_of, inputs_of, lora, loss_of, outputs, randomise, reload, same, snapshot
from loops import Run, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers.optimization import Adafactor

import rankflow
from rankflow.errors import AdapterError, ConfigError, OptimizerError, PlanError
from rankflow.gating.gates import Gates
from rankflow.lora.adapter import Adapter
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Drop, Grow, Keep, Open, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.gate import Gate
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.methods.hold import Hold
from rankflow.policies.observation import Signal
from rankflow.surgery.surgeon import Surgeon


@dataclass(frozen=True, kw_only=True)
class Spread(Gate):
    """Starts at different values, some of them zero or negative."""

    def init(self, slot, generator):
        n = slot.rank if self.scope == "component" else 1
        return {"value": torch.tensor([1.5, 0.0, -0.7, 0.4, 0.9, 1.1, 0.2, 2.0])[:n].clone()}


@dataclass(frozen=True, kw_only=True)
class Rounded(Spread):
    """Fake-quantises both factors with a learned step, gradients straight through."""

    def init(self, slot, generator):
        return {**super().init(slot, generator), "step": torch.tensor(0.05)}

    def _round(self, t, step):
        return t + ((t / step).round() * step - t).detach() + 0 * step

    def a(self, draw, A):
        return super().a(draw, self._round(A, draw["step"]).to(A.dtype))

    def b(self, draw, B):
        return self._round(B, draw["step"]).to(B.dtype)


@dataclass(frozen=True, kw_only=True)
class Noisy(Gate):
    """The value times uniform noise while training."""

    def noisy(self, step):
        return True

    def noise(self, theta, generator):
        return {"u": torch.rand(theta["value"].shape, generator=generator)}

    def draw_one(self, theta, noise):
        return {"value": theta["value"] * (0.5 + noise["u"]) if noise is not None else theta["value"] * 1.0}


@dataclass(frozen=True, kw_only=True)
class Threshold(Gate):
    """A soft threshold after every step."""

    xi: float = 0.02

    def prox(self, theta, lr, step):
        v = theta["value"]
        return {"value": v.sign() * (v.abs() - self.xi).clamp(min=0)}


@dataclass(frozen=True, kw_only=True)
class Gating(Policy):
    """Has a gate; on due steps it removes closed directions and grows a first module."""

    kind: Gate = Threshold()
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.GATE, Signal.GATE_GRAD, Signal.GATE_OPEN})

    @property
    def gate(self):
        return self.kind

    def decide(self, state, obs, layout, step):
        ops = {}
        for i, (name, slot) in enumerate(layout.items()):
            if slot.rank == 0:
                continue
            keep = obs[name][Signal.GATE_OPEN].nonzero().flatten().tolist()
            if self.kind.scope == "component" and 0 < len(keep) < slot.rank:
                ops[name] = (Keep(tuple(keep)),)
            elif i == 0:
                ops[name] = (Grow(1),)
        return RankPlan(ops, "test")


def under(model: torch.nn.Module, gate: Gate, lr: float = 1e-2) -> tuple[Gates, torch.optim.Optimizer]:
    adapter = Adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    gates = Gates(adapter, OptimizerState(optimizer, adapter), seed=0)
    gates.install(gate)
    return gates, optimizer


def scale_by_hand(model: torch.nn.Module, gates: Gates) -> None:
    """What the gates do, done to the Parameters of a model without gates."""
    values = gates.values()
    with torch.no_grad():
        for name, site in Adapter(model).sites.items():
            site.A.copy_(site.raw_a(values[name].to(site.A.dtype)[:, None] * site.a()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["component", "module"])
def test_forward_merge_and_files_see_the_gated_factors_and_state_dict_the_raw_ones(kind, scope):
    model, by_hand = lora(kind), lora(kind)
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    plain = outputs(model, kind)
    gates, _ = under(model, Spread(scope=scope))
    scale_by_hand(by_hand, gates)
    wanted = outputs(by_hand, kind)
    assert not torch.allclose(plain, wanted)
    torch.testing.assert_close(outputs(model, kind), wanted)
    assert same({k: v for k, v in model.state_dict().items() if "lora_" in k}, before)
    own = get_peft_model_state_dict(model)
    assert same(own, get_peft_model_state_dict(lora(kind)))
    torch.testing.assert_close(outputs(copy.deepcopy(model), kind), wanted)
    torch.testing.assert_close(outputs(reload(model, kind), kind), wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A.*lready (un)?merged")  # PEFT, of a layer within a layer
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, kind), wanted)
        model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, kind), wanted)
    gates.fold()
    torch.testing.assert_close(outputs(model, kind), wanted)
    torch.testing.assert_close(outputs(reload(model, kind), kind), wanted)
    assert [type(m) for m in model.modules()] == [type(m) for m in by_hand.modules()]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_dora_and_rslora(options):
    model, by_hand = lora("linear", **options), lora("linear", **options)
    gates, _ = under(model, Spread())
    scale_by_hand(by_hand, gates)
    wanted = outputs(by_hand, "linear")
    torch.testing.assert_close(outputs(model, "linear"), wanted)
    torch.testing.assert_close(outputs(reload(model, "linear"), "linear"), wanted)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, "linear"), wanted)


def test_both_factors_may_be_changed_and_what_is_saved_and_folded_is_what_ran():
    model = lora("linear")
    gates, _ = under(model, Rounded())
    wanted = outputs(model, "linear")
    torch.testing.assert_close(outputs(reload(model, "linear"), "linear"), wanted)
    gates.fold()
    torch.testing.assert_close(outputs(model, "linear"), wanted)


def test_a_state_dict_made_beforehand_is_folded_too():
    model = lora("linear")
    under(model, Spread())
    wanted = outputs(model, "linear")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, state_dict=model.state_dict())
        loaded = PeftModel.from_pretrained(base_of("linear"), folder, autocast_adapter_dtype=False)
    torch.testing.assert_close(outputs(loaded, "linear"), wanted)


# -- gradients --------------------------------------------------------------------------------------------------------


def reference_gradient(kind: str, gates: Gates, seeds: list[int]):
    """dL/dv by autograd through factors that were multiplied by hand, summed over batches."""
    model = lora(kind)
    adapter = Adapter(model)
    values = {n: v.double().requires_grad_() for n, v in gates.values().items()}
    raw = {n: s.A.detach().clone() for n, s in adapter.sites.items()}
    for name, site in adapter.sites.items():
        module, key = site.holders["A"]
        del module._parameters[key]
        scaled = site.raw_a(values[name][:, None] * site.a(raw[name]))
        if isinstance(module, torch.nn.ParameterDict):
            module.__dict__[key] = scaled
        else:
            module.weight = scaled
    loss = sum(loss_of(model, kind, seed=s) for s in seeds)
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, list(values.values()))
    return dict(zip(values, found, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d_transformers", "experts"])
def test_gradients_of_gates_are_autograds(kind):
    model = lora(kind)
    gates, _ = under(model, Spread())
    for seed in (3, 4):
        (loss_of(model, kind, seed=seed) * 8).backward()
    gates.collect(loss_scale=8.0)
    wanted = reference_gradient(kind, gates, [3, 4])
    assert gates.gradients.keys() == wanted.keys()
    for name, g in gates.gradients.items():
        torch.testing.assert_close(g, wanted[name].float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gate", [Spread(), Noisy()], ids=["plain", "noisy"])
def test_checkpointing_of_either_kind_gives_the_same_gradients(reentrant, gate):
    found = []
    for checkpointed in (False, True):
        model = tiny_llama(dropout=0.0)
        randomise(model)
        if checkpointed:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        gates, _ = under(model, gate)
        for batch in token_batches(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(**batch, use_cache=False).loss.backward()
        gates.collect()
        found.append(gates.gradients)
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)
        assert bool(found[0][name].any())


def test_two_forwards_before_one_backward_see_noise_of_their_own():
    model = tiny_llama(dropout=0.0)
    randomise(model)
    model.train()
    batches = token_batches(2)
    gates, _ = under(model, Noisy())
    losses = [model(**b).loss for b in batches]
    assert not torch.equal(losses[0], model(**batches[0]).loss), "each forward draws anew"
    sum(losses).backward()
    gates.collect()
    together = gates.gradients
    again, _ = under(fresh := tiny_llama(dropout=0.0), Noisy())
    randomise(fresh)
    fresh.train()
    for b in batches:
        fresh(**b).loss.backward()
    again.collect()
    for name, g in again.gradients.items():
        torch.testing.assert_close(together[name], g)


def test_evaluation_sees_no_noise_and_the_global_random_state_is_left_alone():
    model = tiny_llama(dropout=0.0)
    randomise(model)
    state = torch.random.get_rng_state()
    gates, _ = under(model, Noisy())
    batch = token_batches(1)[0]
    model.train()
    trained = model(**batch).loss
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, model(**batch).loss)
        assert not torch.equal(model(**batch).loss, trained)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained.backward()  # of a forward that lies before the evaluation
    gates.collect()
    assert all(bool(g.any()) for g in gates.gradients.values())


def test_after_a_noisy_forward_files_and_merges_hold_what_has_no_noise(tmp_path):
    model = tiny_llama(dropout=0.0)
    randomise(model)
    model.delete_adapter("other")
    under(model, Noisy())
    batch = token_batches(1)[0]
    with torch.no_grad():
        wanted = model.eval()(**batch).loss
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}

    def noisy() -> None:
        assert not torch.equal(model.train()(**batch).loss, wanted)

    noisy()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path)
    torch.testing.assert_close(loaded.eval()(**batch).loss, wanted)
    noisy()
    model.merge_adapter()
    model.train()(**batch)  # neither a forward in between
    torch.testing.assert_close(model(**batch).loss, wanted)
    with torch.no_grad():
        model.eval()(**batch)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        if name in base:
            torch.testing.assert_close(p.detach(), base[name], atol=1e-6, rtol=0)
    noisy()
    torch.testing.assert_close(model.merge_and_unload().eval()(**batch).loss, wanted)


@pytest.mark.parametrize("what", ["lora_A", "lora_"])
def test_a_module_that_the_optimizer_does_not_hold_has_a_gate_that_does_not_learn(what):
    model = tiny_llama(r=4, dropout=0.0)
    randomise(model)
    frozen = {n: p for n, p in model.named_parameters() if f"layers.0.mlp.up_proj.{what}" in n and ".default." in n}
    for p in frozen.values():
        p.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in frozen.items()}
    run = Run(Gating(kind=Threshold(xi=0.3)), 8, model=model).until(8)
    gates = run.flow._gates.values()
    if what == "lora_":
        assert bool((gates["model.layers.0.mlp.up_proj"] == 1).all())
    run.flow.finish()
    if what == "lora_":
        assert same({n: p.detach() for n, p in frozen.items()}, before)


def test_a_gate_that_cannot_be_had_leaves_the_model_free():
    model = tiny_llama()
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad], relative_step=True, lr=None)
    with pytest.raises(OptimizerError, match="relative_step"):
        rankflow.attach(model, optimizer, Lifecycle((("gating", Gating(), None),), source="test"), total_steps=9)
    assert not optimizer._optimizer_step_post_hooks
    with rankflow.attach(model, optimizer, "hold", total_steps=9):
        pass


def test_the_model_is_free_even_if_folding_fails(monkeypatch):
    run = Run(Gating(), 8).until(2)

    def broken(self):
        raise RuntimeError("no")

    monkeypatch.setattr(Gates, "fold", broken)
    with pytest.raises(RuntimeError, match="no"):
        run.flow.detach()
    monkeypatch.undo()
    assert not run.flow.attached
    assert not run.optimizer._optimizer_step_post_hooks
    run.flow = rankflow.attach(run.model, run.optimizer, "hold", total_steps=6)


def test_one_shot_changes_are_refused_while_gates_are_on():
    run = Run(Gating(), 8).until(2)
    before = snapshot(run.model)
    for change in (lambda: rankflow.resize(run.model, 1), lambda: rankflow.squeeze_model(run.model, target_rank=1)):
        with pytest.raises(AdapterError, match=r"call its flow.finish\(\)"):
            change()
    assert same(snapshot(run.model), before)
    run.flow.finish()
    rankflow.resize(run.model, 1)


def test_a_gate_of_an_adapter_that_is_not_active_stays():
    model = tiny_llama(dropout=0.0)
    randomise(model)
    gates, optimizer = under(model, Threshold())
    before = gates.values()
    model.set_adapter("other")
    model(**token_batches(1)[0]).loss.backward()
    gates.collect()
    optimizer.step()
    gates.step()
    assert same(gates.values(), before)


def test_bf16_factors():
    model = lora("linear", dtype=torch.bfloat16)
    gates, _ = under(model, Spread())
    loss_of(model, "linear", dtype=torch.bfloat16).backward()
    gates.collect()
    assert all(g.dtype == torch.float32 and bool(g.any()) for g in gates.gradients.values())
    wanted = outputs(model, "linear", dtype=torch.bfloat16)
    gates.fold()
    torch.testing.assert_close(outputs(model, "linear", dtype=torch.bfloat16), wanted)


def test_a_compiled_forward_takes_new_values_without_compiling_again():
    gc.collect()  # runs that other tests gave up may still listen, and keep compiled code eager
    torch._dynamo.reset()
    model = lora("linear", dtype=torch.float32)
    gates, optimizer = under(model, Spread())
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    ids = inputs_of("linear")
    for _ in range(3):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        compiled(ids).logits.square().mean().backward()
        gates.collect()
        assert gates.gradients
        optimizer.step()
        gates.step()
    assert len(graphs) == 1


# -- training ---------------------------------------------------------------------------------------------------------


def test_gates_step_as_adam_at_the_rate_of_their_factors_then_shrink():
    model = lora("linear", dtype=torch.float32)
    gates, optimizer = under(model, Threshold(xi=0.01), lr=3e-2)
    m = v = None
    value = {n: t.double() for n, t in gates.values().items()}
    for t in range(1, 5):
        loss_of(model, "linear", dtype=torch.float32, seed=t).backward()
        gates.collect()
        g = {n: x.double() for n, x in gates.gradients.items()}
        m = {n: 0.1 * x + (0.9 * m[n] if m else 0) for n, x in g.items()}
        v = {n: 0.001 * x * x + (0.999 * v[n] if v else 0) for n, x in g.items()}
        optimizer.param_groups[0]["lr"] = lr = 3e-2 / t
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
        for n in value:
            moved = value[n] - lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            value[n] = moved.sign() * (moved.abs() - 0.01).clamp(min=0)
            torch.testing.assert_close(gates.values()[n].double(), value[n], rtol=1e-5, atol=1e-6)


def test_gradients_that_are_not_finite_do_not_reach_the_gates():
    model = lora("linear", dtype=torch.float32)
    gates, optimizer = under(model, Threshold())
    (loss_of(model, "linear", dtype=torch.float32) * torch.inf).backward()
    gates.collect()
    optimizer.zero_grad()
    gates.step()
    assert all(bool(v.isfinite().all()) for v in gates.values().values())


# -- resizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gates_follow_keep_grow_drop_and_return(kind):
    model = lora(kind, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.gates.install(Spread())
    loss_of(model, kind).backward()
    surgeon.gates.collect()
    optimizer.step()
    optimizer.zero_grad()
    surgeon.gates.step()
    names = list(surgeon.layout)
    before, values, averages = outputs(model, kind), surgeon.gates.values(), _averages(surgeon)
    tied = {n: s.tie for n, s in surgeon.layout.items()}
    surgeon.layout = Layout({n: dataclasses.replace(s, max_rank=8) for n, s in surgeon.layout.items()})
    surgeon.apply(RankPlan({n: (Grow(2),) for n in names}, "grow"), 1)
    torch.testing.assert_close(outputs(model, kind), before)
    grown = surgeon.gates.values()
    for n in names:
        assert torch.equal(grown[n][:4], values[n])
        assert len(grown[n]) == 6
        for entry in ("exp_avg", "exp_avg_sq"):
            assert bool(averages[n][entry].any())
            assert torch.equal(_averages(surgeon)[n][entry], torch.cat([averages[n][entry], torch.zeros(2)]))
    surgeon.apply(RankPlan({n: (Keep((3, 0, 5)),) for n in names}, "keep"), 2)
    for n in names:
        for entry in ("exp_avg", "exp_avg_sq"):
            kept = torch.stack([averages[n][entry][3], averages[n][entry][0], torch.zeros(())])
            assert torch.equal(_averages(surgeon)[n][entry], kept)
    assert all(torch.equal(surgeon.gates.values()[n], grown[n][[3, 0, 5]]) for n in names)
    if surgeon.layout[names[0]].min_rank == 0 and tied[names[0]] is None and len(names) > 1:
        surgeon.apply(RankPlan({names[0]: (Drop(),)}, "drop"), 3)
        assert names[0] not in surgeon.gates.values()
        before = outputs(model, kind)
        surgeon.apply(RankPlan({names[0]: (Grow(2),)}, "return"), 4)
        torch.testing.assert_close(outputs(model, kind), before)
        assert len(surgeon.gates.values()[names[0]]) == 2
    loss_of(model, kind).backward()
    surgeon.gates.collect()
    optimizer.step()
    surgeon.gates.step()
    wanted = outputs(model, kind)
    surgeon.gates.fold()
    torch.testing.assert_close(outputs(model, kind), wanted)


def _averages(surgeon):
    """Adam's of every module's gate values, copied."""
    return {n: copy.deepcopy(of["value"]) for n, of in surgeon.gates.state_dict()["adam"].items()}


def test_a_refactorisation_under_a_gate_is_refused():
    model = lora("linear")
    surgeon = Surgeon(Adapter(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    surgeon.gates.install(Spread())
    name = next(iter(surgeon.layout))
    eye = torch.eye(4, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"mixes the directions of a module under a gate"):
        surgeon.apply(RankPlan({name: (Refactor(eye.flip(0), eye.flip(1)),)}, "mix"))


def test_a_resize_that_fails_leaves_gates_as_they_were(monkeypatch):
    model = lora("linear", dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.gates.install(Spread())
    loss_of(model, "linear", dtype=torch.float32).backward()
    surgeon.gates.collect()
    optimizer.step()
    optimizer.zero_grad()
    surgeon.gates.step()
    before = (
        snapshot(model, optimizer),
        copy.deepcopy(surgeon.gates.state_dict()),
        outputs(model, "linear", dtype=torch.float32),
    )
    monkeypatch.setattr(surgeon, "_verify", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.raises(RuntimeError, match="planted"):
        surgeon.apply(RankPlan({n: (Keep((0, 2)), Grow(1), Open((0, 2), 0.1)) for n in surgeon.layout}, "x"), 1)
    assert same(snapshot(model, optimizer), before[0])
    assert same(surgeon.gates.state_dict(), before[1])
    assert torch.equal(outputs(model, "linear", dtype=torch.float32), before[2])


def test_folding_carries_the_moments_of_a_to_what_its_gradient_now_is():
    model = lora("linear", dtype=torch.float32)
    gates, optimizer = under(model, Spread(), lr=0.0)
    loss_of(model, "linear", dtype=torch.float32).backward()
    gates.collect()
    optimizer.step()
    gates.fold()
    optimizer.zero_grad()
    site = next(iter(Adapter(model).sites.values()))
    loss_of(model, "linear", dtype=torch.float32).backward()
    m, v = optimizer.state[site.A]["exp_avg"], optimizer.state[site.A]["exp_avg_sq"]
    g = site.A.grad
    live = [0, 2, 3]  # the gate of direction 1 was closed: it had no gradient
    torch.testing.assert_close(m[live], 0.1 * g[live], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(v[live], 0.001 * g[live].square(), rtol=1e-4, atol=1e-12)
    assert not bool(m[1].any())
    assert all(bool(t.isfinite().all()) for t in (m, v))


# -- under the controller ---------------------------------------------------------------------------------------------


def lifecycle(kind: Gate) -> Lifecycle:
    return Lifecycle((("gating", Gating(kind=kind, when=When(3, 3)), "60%"), ("hold", Hold(), None)))


@pytest.mark.parametrize("gate", [Threshold(xi=0.15), Noisy(), Rounded()], ids=["threshold", "noisy", "rounded"])
@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, gate, stop):
    whole = Run(lifecycle(gate), 10).until(10)
    part = Run(lifecycle(gate), 10).until(stop)
    state = copy.deepcopy(part.flow.state_dict())
    part.model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    model = tiny_llama()
    rankflow.restore(model, tmp_path)
    resumed = Run(lifecycle(gate), 10, model=model, state=state, seed=7)  # the checkpoint's is what counts
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.scheduler.load_state_dict(part.scheduler.state_dict())
    resumed.until(10)
    assert same_weights(weights(whole.model), weights(resumed.model))
    assert whole.flow.layout == resumed.flow.layout
    events = [e["event"] for e in whole.flow.ledger.events]
    assert events.count("fold") == 1


def test_leaving_folds():
    run = Run(Gating(kind=Threshold(xi=0.1)), 10).until(4)
    wanted = run.model.eval()(**run.batches[0]).loss
    run.flow.detach()
    torch.testing.assert_close(run.model(**run.batches[0]).loss, wanted)
    run.flow = rankflow.attach(run.model, run.optimizer, "hold", total_steps=6)


def test_the_frozen_base_and_other_adapters_never_change():
    run = Run(Gating(kind=Threshold(xi=0.1)), 10)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if ".default." not in n}
    run.until(10)
    run.flow.finish()
    assert same({n: p.detach() for n, p in run.model.named_parameters() if ".default." not in n}, before)


# -- held-out data ----------------------------------------------------------------------------------------------------


def test_outer_gates_learn_from_held_out_batches_alone_and_factors_from_training_batches_alone():
    outer = token_batches(3, seed=7)
    run = Run(Gating(kind=Spread(trained_on="outer", scope="module")), 6, outer_batches=outer)
    start = run.flow._gates.values()
    state = torch.random.get_rng_state()
    raw = weights(run.model)
    grads = {n: p.grad for n, p in run.model.named_parameters()}
    loss = run.flow.outer_step(outer[0])
    assert loss is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_weights(weights(run.model), raw)
    assert all(p.grad is grads[n] for n, p in run.model.named_parameters())
    run.step()
    moved = run.flow._gates.values()
    assert any(not torch.equal(moved[n], start[n]) for n in start)
    # the same run with other training data: the gates' first gradient is that of the held-out batch alone
    silent = Run(Gating(kind=Spread(trained_on="outer", scope="module")), 6, outer_batches=[{**outer[0]}])
    for _ in range(2):
        silent.model(**silent.batches[0]).loss.backward()
    silent.flow._gates.collect()
    assert not silent.flow._gates.gradients


def test_outer_gates_without_held_out_data_are_refused():
    with pytest.raises(ConfigError, match="outer_batches"):
        Run(Gating(kind=Spread(trained_on="outer")), 6)
    with pytest.raises(ConfigError, match="holds no batch"):
        Run(Gating(kind=Spread(trained_on="outer")), 6, outer_batches=[])


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_goes_on_in_the_held_out_data(tmp_path, stop):
    data = torch.utils.data.DataLoader(token_batches(3, seed=7), batch_size=None, shuffle=True)

    def make(**options):
        return Run(lifecycle(Spread(trained_on="outer", scope="module")), 8, outer_batches=data, **options)

    whole = make().until(8)
    part = make().until(stop)
    state = copy.deepcopy(part.flow.state_dict())
    part.model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    rankflow.restore(model := tiny_llama(), tmp_path)
    resumed = make(model=model, state=state, seed=7)  # the checkpoint's is what counts
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.scheduler.load_state_dict(part.scheduler.state_dict())
    resumed.until(8)
    assert same_weights(weights(whole.model), weights(resumed.model))
