"""Half precision, a loss scaler that skips steps, gradient checkpointing, weights that are elsewhere: runs under all of
them keep their function when they grow, lose what is best to lose when they shrink, and resume bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers import randomise
from loops import GROW_THEN_SQUEEZE, Run, resumed, same_weights, tiny_llama, token_batches, trained
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

import rankflow
from rankflow.lora.site import Site

STEPS = 20
STOPS = (8, 15)  # while it grows, while it shrinks


def coarse(parameters: list[nn.Parameter]) -> Optimizer:
    """Half precision has no square of a small gradient."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-4)


def halved(dtype: torch.dtype, seed: int = 0) -> PeftModel:
    return tiny_llama(seed=seed).to(dtype)


def checkpointed(reentrant: bool, seed: int = 0) -> PeftModel:
    model = tiny_llama(seed=seed)
    base = model.get_base_model()
    base.enable_input_require_grads()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def offloaded(seed: int = 0) -> PeftModel:
    """What is frozen in the first layer comes for each forward and goes again; factors stay."""
    model = tiny_llama(seed=seed)
    for name, module in model.named_modules():
        frozen = [p for p in module.parameters(recurse=False) if not p.requires_grad]
        if "layers.0." in name and "lora_" not in name and frozen:
            cpu_offload(module, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    return model


class Scaled(Run):
    """float16 autocast under a scaler whose first steps overflow."""

    def __init__(self, *args: Any, scaler: torch.amp.GradScaler, **options: Any):
        super().__init__(*args, **options)
        self.scaler = scaler
        self.skipped = 0

    def step(self, corrupt: Callable[[], None] | None = None) -> None:
        i = self.flow.step
        torch.manual_seed(1000 + i)
        for micro in self.batches[2 * i : 2 * i + 2]:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = self.model(**micro).loss / 2
            self.scaler.scale(loss).backward()
        self.flow.before_step(self.scaler)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.flow.after_step()
        self.optimizer.zero_grad()
        self.skipped += self.flow.step == i


def scaler(start: float = 2.0**40) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=start)


def delta(site: Site) -> Tensor:
    return site.scaling * (site.b().detach().double() @ site.a().detach().double())


def watched(run: Run, eps: float) -> list[str]:
    """Let every event of the run be looked at from both sides; what kinds of them there were."""
    after_step, seen = run.flow.after_step, []
    sites = run.flow._adapter.sites

    def looked_at() -> None:
        before, ranks = {n: delta(s) for n, s in sites.items()}, run.flow.layout.ranks
        after_step()
        for n, site in sites.items():
            size = before[n].norm()
            lost = (delta(site) - before[n]).norm()
            if site.rank >= ranks[n]:
                assert lost == 0, f"{n} was not to change"
            else:
                best = torch.linalg.svdvals(before[n])[site.rank :].norm()
                assert lost <= best + eps * size, n
            if site.rank != ranks[n]:
                seen.append("grow" if site.rank > ranks[n] else "shrink")

    run.flow.after_step = looked_at  # type: ignore[method-assign]
    return seen


CASES: dict[str, tuple[Callable[[int], PeftModel], dict[str, Any], float]] = {
    "bf16": (lambda seed: halved(torch.bfloat16, seed), {"make": coarse}, 2**-7),
    "fp16": (lambda seed: halved(torch.float16, seed), {"make": coarse}, 2**-10),
    "reentrant": (lambda seed: checkpointed(True, seed), {}, 1e-6),
    "not reentrant": (lambda seed: checkpointed(False, seed), {}, 1e-6),
    "offloaded": (offloaded, {}, 1e-6),
}


@pytest.mark.filterwarnings("ignore:.*(use_reentrant|requires_grad=True)")
@pytest.mark.parametrize("case", CASES)
def test_a_run_grows_squeezes_and_resumes(case, tmp_path: Path):
    model, options, eps = CASES[case]
    whole = Run(GROW_THEN_SQUEEZE, STEPS, model=model(0), **options)
    seen = watched(whole, eps)
    whole.until(STEPS)
    assert {"grow", "shrink"} == set(seen)
    assert whole.flow.layout.total_rank == 20
    assert {p.dtype for p in whole.flow.parameters()} == {p.dtype for p in model(0).parameters() if p.requires_grad}
    for stop in STOPS:
        first = Run(GROW_THEN_SQUEEZE, STEPS, model=model(0), **options).until(stop)
        folder = tmp_path / str(stop)
        second = resumed(first, GROW_THEN_SQUEEZE, STEPS, folder, fresh=lambda: model(0), **options).until(STEPS)
        assert same_weights(trained(whole.model), trained(second.model))


@pytest.mark.parametrize("case", CASES)
def test_growth_changes_the_function_by_rounding_at_most(case):
    make, _, eps = CASES[case]
    model = make(0)
    randomise(model)
    model.eval()
    batch = token_batches(1)[0]
    before = model(**batch).logits.detach()
    rankflow.resize(model, 5)
    after = model(**batch).logits.detach()
    assert float((after - before).abs().max()) <= 2 * eps * float(before.abs().max())


@pytest.mark.parametrize("case", ["reentrant", "not reentrant", "offloaded"])
def test_what_only_moves_memory_changes_no_rank_and_no_weight(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(GROW_THEN_SQUEEZE, STEPS, model=CASES[case][0](0)).until(STEPS)
    plain = Run(GROW_THEN_SQUEEZE, STEPS).until(STEPS)
    assert run.flow.layout == plain.flow.layout
    for one, other in zip(trained(run.model).values(), trained(plain.model).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fp16_autocast_under_a_scaler_that_skips_steps(tmp_path: Path):
    whole = Scaled(GROW_THEN_SQUEEZE, STEPS, scaler=scaler(), scheduled=False)
    seen = watched(whole, 1e-6)
    whole.until(STEPS)
    assert whole.skipped > 2, "the case needs steps that were not taken"
    assert {"grow", "shrink"} == set(seen)
    assert whole.flow.layout.total_rank == 20
    assert {p.dtype for p in whole.flow.parameters()} == {torch.float32}
    for stop in STOPS:
        first = Scaled(GROW_THEN_SQUEEZE, STEPS, scaler=scaler(), scheduled=False).until(stop)
        again = scaler()
        again.load_state_dict(first.scaler.state_dict())
        second = resumed(
            first, GROW_THEN_SQUEEZE, STEPS, tmp_path / str(stop), kind=Scaled, scaler=again, scheduled=False
        )
        assert same_weights(trained(whole.model), trained(second.until(STEPS).model))
