"""Own loops of other kinds: accelerate, autocast, a loss scaler; and what users do to a model in mid-run."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from loops import GROW_THEN_SQUEEZE, Run, same_weights, tiny_llama, token_batches, weights
from peft import LoraConfig

import rankflow

STEPS = 20


@pytest.fixture
def accelerator():
    """Makes accelerators, and clears the state they share, which would leak into the next test."""
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated(accelerator: Accelerator, policy):
    model = tiny_llama(dropout=0.0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    flow = rankflow.attach(model, optimizer, policy, total_steps=STEPS)
    for batch in token_batches(STEPS * accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            flow.before_step()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            flow.after_step()
            optimizer.zero_grad()
    return model, flow


def test_accelerate_accumulates_and_ends_as_a_plain_loop_does(accelerator):
    model, flow = accelerated(accelerator(gradient_accumulation_steps=2), GROW_THEN_SQUEEZE)
    plain = Run(GROW_THEN_SQUEEZE, STEPS, model=tiny_llama(dropout=0.0), scheduled=False).until(STEPS)
    assert flow.step == STEPS
    assert flow.layout == plain.flow.layout
    assert same_weights(weights(plain.model), weights(model))


def test_accelerate_in_bf16(accelerator):
    _, flow = accelerated(accelerator(mixed_precision="bf16"), GROW_THEN_SQUEEZE)
    assert flow.step == STEPS
    assert flow.layout.total_rank == 20


def test_bf16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = Run(GROW_THEN_SQUEEZE, STEPS).until(STEPS)
    assert run.flow.layout.total_rank == 20
    assert all(p.dtype == torch.float32 for p in run.flow.parameters())


@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scaler_changes_no_decision_and_no_penalty(unscale):
    """The same run with the loss scaled by 1024: same ranks, same weights (a power of two is exact)."""
    policy = {
        "policy": "increlora",
        "budget": {"mean_rank": 4},
        "when": {"start": 3, "every": 3},
        "params": {"window": 2, "score_fraction": 1.0, "orth": 0.1},
    }
    ends = []
    for scaling in (False, True):
        model = tiny_llama().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
        flow = rankflow.attach(model, optimizer, policy, total_steps=12)
        for i, batch in enumerate(token_batches(12)):
            torch.manual_seed(i)
            scaler.scale(model(**batch).loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            flow.before_step(scaler)
            scaler.step(optimizer)
            scaler.update()
            flow.after_step()
            optimizer.zero_grad()
        ends.append((flow.layout.ranks, weights(model)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.allclose(ends[0][1][n], ends[1][1][n], atol=1e-6) for n in ends[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_with_a_scaler_that_skips_steps_on_a_gpu():
    model = tiny_llama().cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows at first, so steps are skipped
    flow = rankflow.attach(model, optimizer, GROW_THEN_SQUEEZE, total_steps=STEPS)
    for batch in token_batches(3 * STEPS):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(**{k: v.cuda() for k, v in batch.items()}).loss
        scaler.scale(loss).backward()
        flow.before_step(scaler)
        scaler.step(optimizer)
        scaler.update()
        flow.after_step()
        optimizer.zero_grad()
        if flow.step == STEPS:
            break
    assert flow.step == STEPS
    assert flow.layout.total_rank == 20


def test_an_adapter_added_in_mid_run_is_left_alone():
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(4)
    run.model.add_adapter("third", LoraConfig(r=5, target_modules=["q_proj"]))
    run.model.set_adapter("default")
    before = {n: t for n, t in weights(run.model).items() if ".third." in n}
    run.until(STEPS)
    assert run.flow.layout.total_rank == 20
    after = weights(run.model)
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("metric", ["weights", "outputs"])
def test_an_adapter_switched_away_at_a_due_step_skips_the_decision(metric):
    policy = {"policy": "squeeze", "budget": {"mean_rank": 2}, "when": {"every": 2}, "params": {"metric": metric}}
    run = Run(policy, 6, model=big()).until(1)
    run.model.set_adapter("other")
    run.model(**run.batches[0]).loss.backward()
    run.flow.before_step()
    run.optimizer.step()
    with pytest.warns(UserWarning, match="disabled"):
        run.flow.after_step()
    run.model.set_adapter("default")
    assert run.flow.layout.total_rank == 40


def big():
    return tiny_llama(r=4)


def test_factors_frozen_in_mid_run_stay_frozen_through_a_resize():
    run = Run(GROW_THEN_SQUEEZE, STEPS).until(1)
    name = next(iter(run.flow.layout))
    site = run.flow._adapter.sites[name]
    site.A.requires_grad_(False)
    run.until(STEPS)
    assert not site.A.requires_grad
    assert site.B.requires_grad
