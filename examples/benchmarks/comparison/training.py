"""Trains and scores one job. The same loop for every arm."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
import warnings
from typing import Any

import numpy as np
import peft
import torch
import transformers
from harness import forget_peak, processor, resident
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

import rankflow
from comparison.arms import ARMS
from comparison.jobs import Job
from comparison.tasks import Batch, Split, Task, load

POST_RANKS = (1, 2, 4, 8, 16)
METRICS = ("weights", "outputs", "loss")
STUDY = 16  # batches of the gradients that LoRA-GA starts from
POINTS = 20  # of the loss curve


def run(job: Job) -> dict[str, Any]:
    """The fields of the job's line."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    task = load(job.task)
    forget_peak()  # reading the texts took some for a moment
    began, cpu = time.perf_counter(), time.process_time()
    model, losses, events = train(job, task)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peak = round(resident("VmHWM") / 1024)
    fields: dict[str, Any] = {
        **{split: task.score(model, split) for split in ("validation", "test")},
        **sizes(model),
        "losses": losses,
        "events": events,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_mb": peak,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "cpu": processor(),
    }
    if ARMS[job.arm].kind == "post":
        fields["post"] = squeezed(model, task, job)
    return fields


def groups(model: PeftModel, job: Job, task: Task) -> list[dict[str, Any]]:
    """One group of all factors and one of the head; factors whose rate is another one have a group of their own."""
    arm = ARMS[job.arm]
    times = allocated_rates(model, job, task) if arm.rates_of else {}
    factors: dict[float, list[Parameter]] = {job.rate: []}
    head = []
    for name, p in model.named_parameters():
        if "lora_" not in name:
            head += [p] if p.requires_grad else []
            continue
        module = name.partition(".lora_")[0].removeprefix("base_model.model.")
        rate = job.rate * times.get(module, 1.0) * (arm.b_rate if "lora_B" in name else 1.0)
        factors.setdefault(rate, []).append(p)
    each = [{"params": params, "lr": rate} for rate, params in factors.items() if params]
    return [*each, {"params": head, "lr": job.protocol["head_lr"]}] if head else each


def allocated_rates(model: PeftModel, job: Job, task: Task) -> dict[str, float]:
    """By module: (rank that the policy gives it / mean rank)^1/2, which is how a step grows with the rank."""
    copied = copy.deepcopy(model)
    still = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.0)
    with rankflow.attach(
        copied,
        still,
        ARMS[ARMS[job.arm].rates_of].settings(job.rank, job.params),
        total_steps=job.steps,
        batches=_some(task, "train", job),
        seed=job.seed,
    ) as flow:
        ranks = dict(flow.layout.ranks)
    return {name: math.sqrt(rank / job.rank) for name, rank in ranks.items()}


def train(job: Job, task: Task) -> tuple[PeftModel, list[float], int]:
    """The trained model, the mean loss of every twentieth of the run, and how often ranks changed."""
    arm = ARMS[job.arm]
    model = adapted(job, task).train()
    optimizer = torch.optim.AdamW(groups(model, job, task), weight_decay=0.0)
    warm = max(1, round(job.protocol["warmup"] * job.steps))
    has_head = any(p.requires_grad and "lora_" not in name for name, p in model.named_parameters())
    alone = round(arm.head_first * job.steps) if has_head else 0

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else (job.steps - step) / (job.steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = task.batches(job.seed, job.protocol["batch"])
    flow = attach(model, optimizer, job, task) if arm.kind == "policy" and not alone else None
    torch.manual_seed(job.seed)
    losses = []
    for step, batch in enumerate(itertools.islice(batches, job.steps)):
        if alone and step in (0, alone):
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.requires_grad_(step == alone)
            if step and arm.kind == "policy":
                flow = attach(model, optimizer, job, task, step)
        loss = model(**batch).loss
        loss.backward()
        if flow is not None:
            flow.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.protocol["clip"])
        optimizer.step()
        if flow is not None:
            flow.after_step()
        if arm.kind == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    if flow is not None:
        flow.finish()
    events = sum(e["event"] == "resize" for e in flow.ledger.events) if flow is not None else 0
    return model, [round(float(np.mean(part)), 4) for part in np.array_split(losses, POINTS) if len(part)], events


def adapted(job: Job, task: Task) -> PeftModel:
    arm = ARMS[job.arm]
    rank = arm.start_rank(job.rank)
    scale = job.protocol["scale"]
    base = task.model(job.seed)
    common: dict[str, Any] = {
        "task_type": task.task_type,
        "target_modules": task.modules,
        "modules_to_save": task.head,
    }
    if arm.kind == "adalora":  # the paper's thirds: a tenth of warm-up, three tenths at the final ranks
        config = AdaLoraConfig(
            init_r=rank,
            target_r=job.rank,
            lora_alpha=scale * rank,
            tinit=job.steps // 10,
            tfinal=3 * job.steps // 10,
            deltaT=max(1, job.steps // 50),
            total_step=job.steps,
            **common,
        )
    else:
        config = LoraConfig(r=rank, lora_alpha=scale * rank, **common, **arm.config)
    if arm.modules < 1:
        every = [name for name, _ in base.named_modules() if name.endswith(tuple(f".{end}" for end in task.modules))]
        config.target_modules = set(random.Random(job.seed).sample(every, round(arm.modules * len(every))))
    torch.manual_seed(job.seed)
    start = arm.config.get("init_lora_weights")
    if start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: _gradients(base, _some(task, "train", job, STUDY)))
    if start == "eva":
        config.eva_config = EvaConfig(use_label_mask=False)  # that mask is of labels by the token
    model = get_peft_model(base, config)
    if start == "eva":
        _eva(model, _some(task, "train", job))
    return model


def _eva(model: PeftModel, batches: list[Batch]) -> None:
    """PEFT's own, which leaves padding out where there are tokens; of pictures every patch counts."""
    if "input_ids" in batches[0]:
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return
    initialize_lora_eva_weights(
        model,
        batches,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, -2),
        show_progress_bar=False,
    )


def _gradients(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        model(**batch).loss.backward()


def attach(model: PeftModel, optimizer: Optimizer, job: Job, task: Task, done: int = 0) -> rankflow.Controller:
    """`done`: steps of the run before this."""
    return rankflow.attach(
        model,
        optimizer,
        ARMS[job.arm].run_as(job.settings),
        total_steps=job.steps - done,
        batches=_some(task, "train", job),
        outer_batches=_some(task, "outer", job),
        seed=job.seed,
    )


def _some(task: Task, split: Split, job: Job, n: int = 64) -> list[Batch]:
    """Batches for studies: other training batches than the run's, or the held-out ones."""
    if split == "train":
        return list(itertools.islice(task.batches(job.seed + 1_000, job.protocol["batch"]), n))
    return task.held_out(split, job.protocol["batch"])


def sizes(model: PeftModel) -> dict[str, Any]:
    """Total rank and adapter parameters as served: directions that PEFT's AdaLoRA has masked do not count."""
    ranks: dict[str, int] = {}
    params = 0
    for name, layer in model.named_modules():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if hasattr(layer, "lora_E"):
            rank = int((layer.lora_E["default"] != 0).sum())
            each = a.shape[1] + b.shape[0] + 1
        else:
            rank = a.weight.shape[0]
            each = a.weight[0].numel() + b.weight.shape[0]
        ranks[name.partition("encoder.")[2] or name.removeprefix("base_model.model.")] = rank
        params += rank * each
    return {"total_rank": sum(ranks.values()), "params": params, "ranks": ranks}


def squeezed(model: PeftModel, task: Task, job: Job) -> dict[str, dict[str, Any]]:
    """Scores of the trained adapter squeezed to each rank with each metric: one event, no training after it.

    The statistics come from training batches with the optimizer standing still.
    """
    out: dict[str, dict[str, Any]] = {}
    batches = _some(task, "train", job, 20)
    for metric, rank in itertools.product(METRICS, POST_RANKS):
        if rank >= job.rank:
            continue
        small = copy.deepcopy(model).train()
        still = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.0)
        policy = {
            "policy": "squeeze",
            "budget": {"max_params": rank * job.setting.per_rank},
            "when": {"start": len(batches), "every": 1},
            "params": {"metric": metric, "window": len(batches)},
        }
        with rankflow.attach(small, still, policy, total_steps=len(batches), seed=job.seed) as flow:
            for batch in batches:
                small(**batch).loss.backward()
                flow.before_step()
                still.step()
                flow.after_step()
                still.zero_grad()
        out.setdefault(metric, {})[str(rank)] = {**task.score(small, "test"), "params": sizes(small)["params"]}
    return out
