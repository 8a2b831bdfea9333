from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    KINDS,
    base_of,
    config_of,
    lora,
    loss_of,
    minilm_base,
    outputs,
    randomise,
    reload,
    same,
    snapshot,
    wrap,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from rankflow.errors import AdapterError, ConfigError, OptimizerError, PlanError, RankFlowError
from rankflow.linalg.decompose import spectrum
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Drop, Grow, Keep, Refactor, Train
from rankflow.plans.plan import RankPlan
from rankflow.surgery.resize import resize
from rankflow.surgery.surgeon import Surgeon


def adamw(model: nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **options})


def train(model, optimizer, kind="linear", steps=2, first=10, dtype=torch.float64) -> None:
    for i in range(first, first + steps):
        loss_of(model, kind, seed=i, dtype=dtype).backward()
        optimizer.step()
        optimizer.zero_grad()


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        n: s.scaling * s.b().detach().double() @ s.a().detach().double() for n, s in adapter.sites.items() if s.present
    }


def cut_ops(site, k):
    cut = spectrum(site.a(), site.b(), site.scaling).cut(k)
    return [Refactor(cut.N, cut.M), *([Grow(cut.fresh)] if cut.fresh else [])]


def assert_agreement(model, optimizer, surgeon) -> None:
    """Model, config, optimizer and layout say the same, worked out from the outside."""
    adapter = surgeon.adapter
    assert adapter.layout().ranks == surgeon.layout.ranks
    for name, site in adapter.sites.items():
        if not site.present:
            continue
        assert site.a().shape[-2] == site.b().shape[-1] == site.layer.r["default"] == surgeon.layout[name].rank
        divisor = math.sqrt(site.rank) if site.layer.use_rslora["default"] else site.rank
        assert site.layer.lora_alpha["default"] / divisor == pytest.approx(site.scaling, rel=1e-15)
    if optimizer is None:
        return
    held = [p for g in optimizer.param_groups for p in g["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} <= {id(p) for p in held}
    assert len({id(p) for p in held}) == len(held)
    live = {id(p) for p in model.parameters()}
    assert {id(p) for p in held} <= live
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    for p, state in optimizer.state.items():
        for value in state.values():
            assert value.ndim == 0 or value.shape == p.shape
    order = {id(p): i for i, p in enumerate(model.parameters())}
    assert [order[id(p)] for p in held] == sorted(order[id(p)] for p in held)


# -- what a resize does to the function -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["zero_b", "grad"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_changes_no_output_and_no_old_entry(kind, init, changes):
    model = lora(kind, **changes)
    optimizer = adamw(model)
    train(model, optimizer, kind)
    surgeon = Surgeon(Adapter(model), optimizer)
    before = outputs(model, kind).detach()
    old = {n: (s.a().detach().clone(), s.b().detach().clone()) for n, s in surgeon.adapter.sites.items()}
    ops = {}
    for n, s in surgeon.adapter.sites.items():
        sketch = torch.randn(*s.a().shape[:-2], 6, s.a().shape[-1], dtype=torch.float64) if init == "grad" else None
        ops[n] = [Grow(1, init, sketch)]
    surgeon.apply(RankPlan(ops))
    torch.testing.assert_close(outputs(model, kind).detach(), before, rtol=1e-12, atol=1e-12)
    for n, s in surgeon.adapter.sites.items():
        assert torch.equal(s.a()[..., :4, :], old[n][0])
        assert torch.equal(s.b()[..., :4], old[n][1])
        assert (s.b()[..., 4:] == 0).all()
        new = s.a().detach()[..., 4:, :]
        assert new.abs().sum() > 0
        if init == "grad":  # outside what A spans already
            cosine = new @ old[n][0].mT / new.norm(dim=-1, keepdim=True) / old[n][0].norm(dim=-1)[..., None, :]
            torch.testing.assert_close(cosine, torch.zeros_like(cosine), atol=1e-9, rtol=0)
    assert_agreement(model, optimizer, surgeon)


@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_makes_exactly_the_predicted_error(kind):
    model = lora(kind)
    surgeon = Surgeon(Adapter(model), adamw(model))
    before = deltas(surgeon.adapter)
    predicted = {n: spectrum(s.a(), s.b(), s.scaling).error(2) for n, s in surgeon.adapter.sites.items()}
    surgeon.apply(RankPlan({n: cut_ops(s, 2) for n, s in surgeon.adapter.sites.items()}))
    after = deltas(surgeon.adapter)
    for n, error in predicted.items():
        assert float((after[n] - before[n]).norm()) == pytest.approx(error, rel=1e-10)
        best = torch.linalg.svdvals(before[n])[..., 2:].square().sum().sqrt()  # Eckart-Young, expert by expert
        assert error == pytest.approx(float(best), rel=1e-10)
    assert_agreement(model, None, surgeon)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_directions_are_bit_identical_in_order(kind):
    model = lora(kind, dtype=torch.float32)
    surgeon = Surgeon(Adapter(model), adamw(model))
    old = {n: (s.a().detach().clone(), s.b().detach().clone()) for n, s in surgeon.adapter.sites.items()}
    surgeon.apply(RankPlan({n: [Keep((3, 1))] for n in old}))
    for n, s in surgeon.adapter.sites.items():
        assert torch.equal(s.a(), old[n][0][..., [3, 1], :])
        assert torch.equal(s.b(), old[n][1][..., [3, 1]])


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_adapter_is_plain_peft_to_a_stranger(kind, changes):
    impossible = {"use_dora": ("attention", "experts"), "lora_bias": ("embedding", "attention", "experts")}
    if any(kind in impossible.get(key, ()) for key in changes):
        pytest.skip("not supported by PEFT")
    model = lora(kind, **changes)
    optimizer = adamw(model)
    train(model, optimizer, kind)
    surgeon = Surgeon(Adapter(model), optimizer)
    free = [n for n, slot in surgeon.layout.items() if slot.min_rank == 0][1:2]
    tied = {n for n, slot in surgeon.layout.items() if slot.tie}
    ops = {
        n: [Keep((0, 2))] if i % 2 or n in tied else cut_ops(s, 3)
        for i, (n, s) in enumerate(surgeon.adapter.sites.items())
    }
    surgeon.apply(RankPlan({**ops, **{n: [Drop()] for n in free}}))
    train(model, optimizer, kind)
    loaded = reload(model, kind)
    torch.testing.assert_close(outputs(loaded, kind), outputs(model, kind), rtol=1e-11, atol=1e-11)
    assert Adapter(loaded).layout().ranks == {n: r for n, r in surgeon.layout.ranks.items() if r}
    surgeon.apply(RankPlan({n: [Grow(2)] for n in free}))
    train(model, optimizer, kind)
    torch.testing.assert_close(outputs(reload(model, kind), kind), outputs(model, kind), rtol=1e-11, atol=1e-11)
    assert_agreement(model, optimizer, surgeon)


def test_dropping_and_growing_again_in_one_plan():
    model = lora("linear", use_dora=True)
    optimizer = adamw(model)
    train(model, optimizer)
    surgeon = Surgeon(Adapter(model), optimizer)
    name = next(iter(surgeon.layout))
    magnitude = surgeon.adapter.sites[name].tensors()["magnitude"]
    surgeon.apply(RankPlan({name: [Drop(), Grow(2)]}))
    site = surgeon.adapter.sites[name]
    assert site.rank == 2
    assert not site.B.any()
    assert site.tensors()["magnitude"] is magnitude
    assert_agreement(model, optimizer, surgeon)
    other = list(surgeon.layout)[1]
    surgeon.apply(RankPlan({other: [Drop()]}))
    surgeon.apply(RankPlan({other: [Grow(2), Drop()]}))
    assert not surgeon.adapter.sites[other].present
    assert_agreement(model, optimizer, surgeon)


def test_growth_depends_on_seed_step_and_module_and_on_no_other_random_state():
    def grown(seed, step, noise):
        model = lora("linear")
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        surgeon = Surgeon(Adapter(model), seed=seed)
        last = list(surgeon.layout)[-1]
        surgeon.apply(RankPlan({last: [Drop()]}), step)
        surgeon.apply(RankPlan({n: [Grow(2)] for n in surgeon.layout}), step)
        assert torch.equal(state, torch.random.get_rng_state())
        return {n: s.a().detach()[-2:] for n, s in surgeon.adapter.sites.items()}

    one = grown(0, 5, 1)
    assert same(one, grown(0, 5, 2))
    assert not same(one, grown(1, 5, 1))
    assert not same(one, grown(0, 6, 1))
    q0, q1 = (one[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert not torch.equal(q0, q1)


# -- all or nothing ---------------------------------------------------------------------------------------------------


def refused(surgeon, optimizer, plan, error, match):
    model = surgeon.adapter.model
    before, layout, version = snapshot(model, optimizer), surgeon.layout, surgeon.version
    young = copy.deepcopy(surgeon.ramps.state_dict())
    with pytest.raises(error, match=match):
        surgeon.apply(plan)
    assert same(snapshot(model, optimizer), before)
    assert (surgeon.layout, surgeon.version, surgeon.ramps.state_dict()) == (layout, version, young)


@pytest.fixture
def ready():
    model = lora("linear", dtype=torch.float32)
    optimizer = adamw(model, fused=True)
    train(model, optimizer, dtype=torch.float32)
    return model, optimizer, Surgeon(Adapter(model), optimizer)


Q0 = "model.layers.0.self_attn.q_proj"
EYE = torch.eye(4, dtype=torch.float64)


def test_plans_that_do_not_fit_are_refused(ready):
    _, optimizer, surgeon = ready
    refused(surgeon, optimizer, RankPlan({Q0: [Keep((0, 9))]}), PlanError, rf"{Q0}.*component 9 but rank is 4")
    refused(surgeon, optimizer, RankPlan({"nobody": [Drop()]}), PlanError, "nobody")
    refused(surgeon, optimizer, RankPlan({Q0: [Grow(99)]}), PlanError, "limits allow")
    refused(surgeon, optimizer, RankPlan({n: [Drop()] for n in surgeon.layout}), PlanError, "no module")
    stacked = Refactor(EYE.expand(2, 4, 4), EYE.expand(2, 4, 4))
    refused(surgeon, optimizer, RankPlan({Q0: [stacked]}), PlanError, Q0)
    surgeon.apply(RankPlan({Q0: [Keep((0, 1, 2))]}))
    refused(surgeon, optimizer, RankPlan({Q0: [Refactor(EYE, EYE)]}), PlanError, r"\[4, 4\].*rank is 3")


def test_a_model_changed_by_somebody_else_is_refused(ready):
    model, optimizer, surgeon = ready
    plan = RankPlan({Q0: [Keep((0, 1))]})
    model.merge_adapter()
    refused(surgeon, optimizer, plan, AdapterError, "merged")
    model.unmerge_adapter()
    Surgeon(surgeon.adapter, optimizer).apply(RankPlan({Q0: [Keep((0, 1, 2))]}))
    refused(surgeon, optimizer, plan, PlanError, rf"{Q0}: rank is 4 in the layout but 3 in the model")


def test_numbers_that_are_not_finite_are_refused(ready):
    _, optimizer, surgeon = ready
    huge = Refactor(EYE * 1e300, EYE * 1e-300)
    refused(surgeon, optimizer, RankPlan({Q0: [huge, huge]}), AdapterError, f"{Q0}.*not be finite")
    with torch.no_grad():
        surgeon.adapter.sites[Q0].B[0, 0] = math.nan
    refused(surgeon, optimizer, RankPlan({Q0: [Keep((0, 1))]}), AdapterError, f"{Q0}: B would not be finite")
    surgeon.apply(RankPlan({Q0: [Keep((1, 2))]}))  # the bad direction goes


def test_an_optimizer_that_lost_a_parameter_is_refused(ready):
    _, optimizer, surgeon = ready
    optimizer.param_groups[0]["params"].pop(3)
    refused(surgeon, optimizer, RankPlan({Q0: [Keep((0,))]}), OptimizerError, "does not hold")


def big_plan(surgeon):
    names = list(surgeon.layout)
    return RankPlan(
        {
            names[0]: [Keep((0, 2))],
            names[1]: [Grow(2)],  # comes back
            names[2]: [Drop()],
            names[3]: [*cut_ops(surgeon.adapter.sites[names[3]], 2), Grow(1)],
            names[4]: [Train(False)],
            names[5]: [Grow(1), Train(False)],
        }
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_failure_at_any_write_undoes_them_all(kind, when, monkeypatch):
    if kind == "linear":
        model = lora(kind, dtype=torch.float32, use_dora=True, lora_dropout=0.1)
    else:
        model = lora(kind, dtype=torch.float32)
    model.add_adapter("other", config_of(kind, r=2))
    model.set_adapter("default")
    optimizer = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    surgeon = Surgeon(Adapter(model), optimizer, warmup=3)
    names = list(surgeon.layout)
    surgeon.apply(RankPlan({names[1]: [Drop()], names[0]: [Keep((0, 1, 2)), Grow(1)]}))
    train(model, optimizer, kind, dtype=torch.float32)
    loss_of(model, kind, dtype=torch.float32).backward()
    plan = big_plan(surgeon) if kind == "linear" else RankPlan({"emb": [Keep((1,))], "out": [Grow(2)]})
    before, layout, young = snapshot(model, optimizer), surgeon.layout, surgeon.ramps.state_dict()
    keys = [list(m.lora_A.keys()) for m in model.modules() if hasattr(m, "lora_A")]
    write, count = Transaction.write, 0

    class Boom(Exception):
        pass

    def failing(self, do, undo):
        nonlocal count
        count += 1
        if count == fail_at and when == "before":
            self._undo.append(undo)
            raise Boom
        write(self, do, undo)
        if count == fail_at:
            raise Boom

    monkeypatch.setattr(Transaction, "write", failing)
    fail_at = 1
    while True:
        count = 0
        try:
            surgeon.apply(plan, 7)
        except Boom:
            assert same(snapshot(model, optimizer), before), fail_at
            assert [list(m.lora_A.keys()) for m in model.modules() if hasattr(m, "lora_A")] == keys
            assert (surgeon.layout, surgeon.ramps.state_dict()) == (layout, young)
            fail_at += 1
            continue
        break
    assert fail_at > 10
    assert not same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    train(model, optimizer, kind, dtype=torch.float32)


def test_what_does_not_verify_is_undone(ready, monkeypatch):
    _, optimizer, surgeon = ready
    monkeypatch.setattr(type(surgeon.optimizer_state), "verify", lambda self, swaps: "model.x: exp_avg is [3]")
    refused(surgeon, optimizer, RankPlan({Q0: [Keep((0, 1))]}), RankFlowError, "model.x: exp_avg.*undone")


# -- what must not be disturbed ---------------------------------------------------------------------------------------


def test_new_parameters_have_no_gradient_and_everything_else_keeps_its_own(ready):
    model, _, surgeon = ready
    loss_of(model, "linear", dtype=torch.float32).backward()
    before = snapshot(model)
    surgeon.apply(RankPlan({Q0: [Keep((0, 1))]}))
    assert surgeon.adapter.sites[Q0].A.grad is None
    after = snapshot(model)
    for key, value in before.items():
        if Q0 not in key and key not in ("config", "order"):
            assert same(after[key], value), key


def test_a_retained_loss_survives_a_resize(ready):
    model, optimizer, surgeon = ready
    loss = loss_of(model, "linear", dtype=torch.float32)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    loss_of(model, "linear", dtype=torch.float32).backward()
    assert all(p.grad.shape == p.shape for p in surgeon.adapter.parameters())
    optimizer.step()
    loss.backward()
    train(model, optimizer, dtype=torch.float32)


def test_versions_count_resizes(ready):
    _, _, surgeon = ready
    assert surgeon.version == 0
    surgeon.apply(RankPlan({}))
    surgeon.apply(RankPlan({Q0: [Train(False)]}))
    assert surgeon.version == 0
    surgeon.apply(RankPlan({Q0: [Keep((0,))]}))
    assert surgeon.version == 1


def test_training_is_switched_off_with_gradients_and_on_again(ready):
    model, optimizer, surgeon = ready
    loss_of(model, "linear", dtype=torch.float32).backward()
    layout = surgeon.apply(RankPlan({Q0: [Train(False)]}))
    site = surgeon.adapter.sites[Q0]
    assert not layout[Q0].trainable
    assert [(p.requires_grad, p.grad) for p in site.tensors().values()] == [(False, None)] * 2
    frozen = site.A.detach().clone()
    optimizer.zero_grad()
    train(model, optimizer, dtype=torch.float32)
    assert torch.equal(site.A, frozen)
    surgeon.apply(RankPlan({Q0: [Keep((0, 1))]}))
    assert not site.A.requires_grad
    surgeon.apply(RankPlan({Q0: [Drop()]}))
    surgeon.apply(RankPlan({Q0: [Train(True)]}))
    surgeon.apply(RankPlan({Q0: [Grow(2)]}))
    assert site.A.requires_grad
    assert_agreement(model, optimizer, surgeon)


def test_what_was_frozen_before_training_was_switched_off_stays_frozen_when_it_is_switched_on_again():
    model = lora("linear")
    adapter = Adapter(model)
    adapter.sites[Q0].A.requires_grad_(False)  # and so the optimizer never holds it
    optimizer = adamw(model)
    surgeon = Surgeon(adapter, optimizer)
    for plan in (Train(False), Train(False), Keep((0, 1)), Train(True)):
        surgeon.apply(RankPlan({Q0: [plan]}))
    site = adapter.sites[Q0]
    assert (site.A.requires_grad, site.B.requires_grad) == (False, True)
    assert_agreement(model, optimizer, surgeon)
    train(model, optimizer)


def test_training_what_the_optimizer_never_held_is_refused():
    model = lora("linear")
    adapter = Adapter(model)
    for p in adapter.sites[Q0].tensors().values():
        p.requires_grad_(False)
    optimizer = adamw(model)
    surgeon = Surgeon(adapter, optimizer)
    surgeon.apply(RankPlan({Q0: [Keep((0, 1))]}))  # frozen and outside: resized all the same
    assert not adapter.sites[Q0].A.requires_grad
    refused(surgeon, optimizer, RankPlan({Q0: [Train(True)]}), OptimizerError, f"{Q0}.*does not hold")
    train(model, optimizer)


def test_what_the_owner_changed_meanwhile_is_taken_over(ready):
    model, _, surgeon = ready
    surgeon.adapter.sites[Q0].A.requires_grad_(False)
    model.half()
    layout = surgeon.apply(RankPlan({Q0: [Grow(1)]}))
    site = surgeon.adapter.sites[Q0]
    assert (site.A.requires_grad, site.B.requires_grad) == (False, True)
    assert site.A.dtype == torch.float16
    assert layout[Q0].itemsize == 2


def test_half_precision_factors_with_full_precision_state():
    model = wrap(base_of("linear", dtype=torch.bfloat16), config_of("linear"), autocast_adapter_dtype=False)
    randomise(model)
    optimizer = adamw(model)
    train(model, optimizer, dtype=torch.bfloat16)
    for state in optimizer.state.values():
        state.update({k: v.float() for k, v in state.items()})
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.apply(RankPlan({n: [*cut_ops(s, 2), Grow(1)] for n, s in surgeon.adapter.sites.items()}))
    for p in surgeon.adapter.parameters():
        assert p.dtype == torch.bfloat16
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_before_the_first_step_there_is_no_state_to_carry():
    model = lora("linear", trained=False)
    optimizer = adamw(model)
    surgeon = Surgeon(Adapter(model), optimizer)
    surgeon.apply(RankPlan({n: cut_ops(s, 2) for n, s in surgeon.adapter.sites.items()}))
    surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))
    assert not optimizer.state
    before = {n: s.B.detach().clone() for n, s in surgeon.adapter.sites.items()}
    train(model, optimizer)
    for n, s in surgeon.adapter.sites.items():  # squeezing a fresh adapter (B = 0) leaves one that learns
        assert ((s.B - before[n]).norm(dim=0) > 0).all()


def test_other_adapters_dropout_and_saved_modules_stay():
    model = lora("linear", dtype=torch.float32, lora_dropout=0.1, modules_to_save=["lm_head"]).train()
    model.add_adapter("other", config_of("linear", r=2))
    optimizer = adamw(model)
    surgeon = Surgeon(Adapter(model), optimizer)
    kept = {
        n: (id(p), p.detach().clone()) for n, p in model.named_parameters() if ".default" not in n or "lm_head" in n
    }
    dropouts = {n: id(m) for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    config = model.peft_config["other"].to_dict()
    surgeon.apply(RankPlan({n: [Grow(1)] if i % 2 else [Keep((0,))] for i, n in enumerate(surgeon.layout)}))
    assert same({n: (id(p), p.detach()) for n, p in model.named_parameters() if n in kept}, kept)
    assert {n: id(m) for n, m in model.named_modules() if isinstance(m, nn.Dropout)} == dropouts
    assert model.peft_config["other"].to_dict() == config


def test_staging_elsewhere_gives_the_same():
    results = []
    for device in (None, "cpu"):
        model = lora("linear")
        optimizer = adamw(model)
        train(model, optimizer)
        surgeon = Surgeon(Adapter(model), optimizer, stage_device=device)
        surgeon.apply(RankPlan({n: [*cut_ops(s, 2), Grow(1)] for n, s in surgeon.adapter.sites.items()}))
        results.append([p.detach().clone() for p in surgeon.adapter.parameters()])
    assert same(*results)


def test_limits_are_taken_from_the_layout_that_was_set(ready):
    _, optimizer, surgeon = ready
    layout = surgeon.layout
    slots = {n: replace(s, max_rank=5) for n, s in layout.items()}
    surgeon.layout = type(layout)(slots)
    refused(surgeon, optimizer, RankPlan({Q0: [Grow(2)]}), PlanError, "0 to 5")
    assert surgeon.apply(RankPlan({Q0: [Grow(1)]}))[Q0].max_rank == 5
    with pytest.raises(PlanError, match=Q0):
        surgeon.layout = layout


# -- sequences --------------------------------------------------------------------------------------------------------

CHOICES = ["keep", "cut", "grow", "drop", "return", "train", "regrow", "save"]


@pytest.mark.parametrize("kind", ["linear", "conv", "experts"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_ops_keeps_everything_in_agreement(kind, data):
    model = lora(kind, use_rslora=data.draw(st.booleans()))
    optimizer = adamw(model, weight_decay=0.1, fused=data.draw(st.booleans()))
    surgeon = Surgeon(Adapter(model), optimizer, warmup=2)
    for step in range(data.draw(st.integers(2, 5))):
        ops = {}
        for name, slot in surgeon.layout.items():
            choice = data.draw(st.sampled_from(CHOICES), label=name)
            site = surgeon.adapter.sites[name]
            room = slot.max_rank - slot.rank
            if slot.rank == 0:
                if choice == "return":
                    ops[name] = [Grow(data.draw(st.integers(1, 3)))]
            elif choice == "keep":
                ops[name] = [Keep(tuple(data.draw(st.permutations(range(slot.rank)))[: max(1, slot.rank - 1)]))]
            elif choice == "cut":
                ops[name] = cut_ops(site, data.draw(st.integers(1, slot.rank)))
            elif choice == "grow" and room:
                ops[name] = [Grow(data.draw(st.integers(1, min(2, room))))]
            elif choice == "drop" and slot.min_rank == 0:
                ops[name] = [Drop()]
            elif choice == "train":
                ops[name] = [Train(not slot.trainable)]
            elif choice == "regrow":
                ops[name] = [Drop(), Grow(1)]
        plan = RankPlan(ops)
        try:
            target = plan.apply_to(surgeon.layout)
        except PlanError:
            with pytest.raises(PlanError):
                surgeon.apply(plan, step)
            continue
        assert surgeon.apply(plan, step) == target
        assert_agreement(model, optimizer, surgeon)
        if any(p.requires_grad for p in surgeon.adapter.parameters()):
            loss_of(model, kind, seed=step).backward()
            surgeon.ramps.before_step()
            optimizer.step()
            surgeon.ramps.after_step()
            optimizer.zero_grad()
        assert all(torch.isfinite(p).all() for p in surgeon.adapter.parameters())
    torch.testing.assert_close(outputs(reload(model, kind), kind), outputs(model, kind), rtol=1e-11, atol=1e-11)
    if not any(p.requires_grad for p in model.parameters()):
        return
    saved = copy.deepcopy(optimizer.state_dict())
    again = adamw(model, weight_decay=0.1, fused=optimizer.defaults["fused"])
    if len(again.param_groups[0]["params"]) == len(optimizer.param_groups[0]["params"]):
        again.load_state_dict(saved)
        for one, other in zip(again.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            assert one is other
            assert same(again.state.get(one, {}), optimizer.state.get(other, {}))


@pytest.mark.parametrize("which", ["minilm", "llama"])
def test_a_run_with_everything_on(which):
    """Dropout, weight decay, accumulation, clipping, rsLoRA with mixed alphas, two adapters, a real encoder."""
    base = minilm_base() if which == "minilm" else base_of("linear", dtype=torch.float32)
    targets = ["query", "value", "intermediate.dense"] if which == "minilm" else ["q_proj", "v_proj", "up_proj"]
    options = {"r": 4, "lora_dropout": 0.1, "use_rslora": True, "lora_alpha": 8}
    config = LoraConfig(target_modules=targets, alpha_pattern={targets[0]: 5, targets[1]: 3.5}, **options)
    model = wrap(base, config)
    model.add_adapter("other", LoraConfig(target_modules=targets[:2], r=2))
    model.set_adapter("default")
    model.train()
    optimizer = adamw(model, weight_decay=0.1, fused=True)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=2)
    scalings = {n: s.scaling for n, s in surgeon.layout.items()}
    ids = torch.randint(1, 60, (4, 8), generator=torch.Generator().manual_seed(0))
    names = list(surgeon.layout)
    for step in range(6):
        for micro in range(2):
            out = model(input_ids=ids.roll(step + micro))
            (out.last_hidden_state if which == "minilm" else out.logits).square().mean().div(2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        surgeon.ramps.before_step()
        optimizer.step()
        surgeon.ramps.after_step()
        optimizer.zero_grad()
        ops = [
            {n: [Grow(2)] for n in names[::2]},
            {n: cut_ops(s, 3) for n, s in surgeon.adapter.sites.items() if step == 1},
            {names[1]: [Drop()], names[2]: [Keep((2, 0))]},
            {names[0]: [Drop()]},
            {names[1]: [Grow(3)]},
            {names[0]: [Grow(2)]},
        ][step]
        surgeon.apply(RankPlan(ops), step)
        assert_agreement(model, optimizer, surgeon)
    assert {n: s.scaling for n, s in surgeon.layout.items()} == scalings
    assert all(torch.isfinite(p).all() for p in model.parameters())


# -- one shot ---------------------------------------------------------------------------------------------------------


def test_one_shot_resizes_by_number_name_or_glob():
    model = lora("linear")
    optimizer = adamw(model)
    train(model, optimizer)
    before = deltas(Adapter(model))
    layout = resize(model, 2, optimizer)
    assert set(layout.ranks.values()) == {2}
    for n, d in deltas(Adapter(model)).items():
        U, S, Vh = torch.linalg.svd(before[n])
        torch.testing.assert_close(d, U[:, :2] @ torch.diag(S[:2]) @ Vh[:2], rtol=1e-9, atol=1e-12)
    out = outputs(model, "linear").detach()
    layout = resize(model, {"*": 4, "*.v_proj": 3, Q0: 5}, optimizer)
    assert layout[Q0].rank == 5
    assert {s.rank for n, s in layout.items() if n.endswith("v_proj")} == {3}
    torch.testing.assert_close(outputs(model, "linear").detach(), out, rtol=1e-12, atol=1e-12)
    assert resize(model, {"*.layers.1.*": 0}).total_rank == 5 + 3 + 4
    resize(model, {Q0: 5})
    train(model, optimizer)


def test_one_shot_leaves_directions_and_their_state_where_they_were():
    """A basis of its own would make Adam, which works entry by entry, solve another problem from there on."""
    model = lora("linear")
    optimizer = adamw(model)
    train(model, optimizer)
    sites, kept = Adapter(model).sites, [0, 2, 3]
    with torch.no_grad():
        for site in sites.values():
            site.b()[:, 1] *= 1e-9
    before = {
        n: [t.detach().clone() for t in (s.a(), s.b(), optimizer.state[s.b()]["exp_avg"])] for n, s in sites.items()
    }
    resize(model, 3, optimizer)
    for name, site in sites.items():
        a, b, average = before[name]
        now = site.a(), site.b(), optimizer.state[site.b()]["exp_avg"]
        for new, old in zip(now, (a[kept], b[:, kept], average[:, kept]), strict=True):
            torch.testing.assert_close(new.detach(), old, rtol=1e-6, atol=1e-6 * old.abs().max().item())


def test_one_shot_refuses_what_cannot_be():
    model = lora("linear")
    before = snapshot(model)
    for ranks, error, match in (
        ({"*.nobody": 2}, ConfigError, "nobody.*matches no module"),
        (0, PlanError, "no module"),
        (-1, ConfigError, "-1"),
        ({Q0: 99}, PlanError, "limits allow"),
    ):
        with pytest.raises(error, match=match):
            resize(model, ranks)
    with pytest.raises(ConfigError, match=r"outputs.*needs statistics"):
        resize(model, 2, metric="outputs")
    with pytest.raises(AdapterError, match="other"):
        resize(model, 2, adapter_name="other")
    assert same(snapshot(model), before)


def test_one_shot_of_a_fresh_adapter_leaves_one_that_learns():
    model = lora("linear", trained=False)
    resize(model, 2)
    optimizer = adamw(model, lr=1e-2)
    first = loss_of(model, "linear").item()
    for _ in range(10):
        train(model, optimizer, steps=1, first=3)
    assert loss_of(model, "linear").item() < first
