"""How should an adapter start? Ranks and rows of A from the gradient of the frozen weights, in many variants, against
tuned LoRA of the same size. MiniLM and the tasks of quality.py, offline, in plain PEFT.

python examples/benchmarks/start_search.py run recovery 0 batches=4         # one run: task, seed, what is varied
python examples/benchmarks/start_search.py run newsgroups 0,1,2 head=30 uniform=1 rows=random   # LoRA, head first
python examples/benchmarks/start_search.py tables

Every run is one line of results/start_search.jsonl and is not repeated. LoRA's own lines come from quality.py's
results: the same seed means the same head, batches and dropout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from comparison.arms import PROTOCOL
from comparison.jobs import Job, Results, append_line
from comparison.settings import SETTINGS
from comparison.tables import markdown
from comparison.tasks import Batch, load
from comparison.training import adapted
from harness import console
from peft import PeftModel
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "start_search.jsonl"
RATES = {"recovery": 4e-3, "newsgroups": 2e-3, "rotten_tomatoes": 2e-3}  # LoRA's own best at rank 4
STEPS = 200

app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Start:
    """What is varied. The values here are the recipe that the search began with."""

    rank: int = 4  # mean rank: the adapter has the parameters of LoRA at this rank
    rate: float = 1.0  # times LoRA's own best
    head: int = 30  # of the run's steps, in which only the head learns; 0 for a task without one
    rewarm: int = 0  # steps over which the adapter's rate rises once it begins
    batches: int = 16  # of 8 texts, over which the gradient G of each frozen weight W is averaged
    uniform: int = 0  # 1: every module has the mean rank; 0: ranks in proportion to score ** power
    score: str = "gora"  # gora: mean |W * G| / sqrt(in + out); nuclear, whitened: of the leading singular values
    power: float = 1.0
    low: float = 0.5  # limits of a rank, times the mean
    high: float = 4.0
    rows: str = "gradient"  # of A: leading right singular vectors of G; whitened: of G C^-1/2, times C^-1/2; random
    damping: float = 0.01  # of C, the inputs' second moments, times their mean
    random: float = 0.0  # share of rows that stay random
    scale: str = "module"  # E z^2, z = A x, is a random A's: module: on average over rows; row: in each; none: norm
    eta: float = 0.0  # B = -eta G A^+, so that DeltaW is eta steps ahead; 0 is B = 0

    @classmethod
    def parse(cls, changes: Iterable[str]) -> Start:
        types: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        pairs = [change.split("=") for change in changes]
        return cls(**{name: types[name](value) for name, value in pairs})

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the recipe that the search began with."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def looks(self) -> bool:
        return not self.uniform or self.rows != "random" or self.eta > 0


@dataclass
class Seen:
    """Of one linear: `weight` and `gradient` [out, in], `inputs`: second moments [in, in]."""

    weight: Tensor
    gradient: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Seen:
        """Nothing yet."""
        return cls(weight, torch.zeros_like(weight), weight.new_zeros(weight.shape[1], weight.shape[1]))

    @property
    def cost(self) -> int:
        return sum(self.weight.shape)

    @property
    def random_energy(self) -> float:
        """E z^2 of a row of a fresh LoRA's A, uniform in +-1/sqrt(in)."""
        return float(self.inputs.diagonal().mean()) / 3

    def root(self, damping: float) -> Tensor:
        """C^-1/2, damped."""
        values, vectors = torch.linalg.eigh(self.inputs.double())
        return (vectors * (values.clamp(min=0) + damping * values.mean()).rsqrt()) @ vectors.mT

    def rows(self, start: Start) -> Tensor:
        """Directions in the order of their singular values, [.., in]."""
        if start.rows == "whitened":
            root = self.root(start.damping)
            return (torch.linalg.svd(self.gradient.double() @ root, full_matrices=False).Vh @ root).float()
        return torch.linalg.svd(self.gradient, full_matrices=False).Vh

    def score(self, start: Start) -> float:
        if start.score == "gora":
            worth = float((self.weight * self.gradient).abs().mean()) / math.sqrt(self.cost)
        else:
            seen = self.gradient.double()
            values = torch.linalg.svdvals(seen @ self.root(start.damping) if start.score == "whitened" else seen)
            worth = float(values[: round(start.high * start.rank)].sum()) / self.cost
        return worth**start.power

    def scaled(self, rows: Tensor, start: Start) -> Tensor:
        if start.scale == "none":
            return nn.functional.normalize(rows, dim=1) / math.sqrt(3)
        energy = ((rows @ self.inputs) * rows).sum(1, keepdim=True)
        return rows * (self.random_energy / (energy if start.scale == "row" else energy.mean())).sqrt()


def layers(model: PeftModel) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if "default" in getattr(layer, "lora_A", {})}


def of_adapter(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def look(model: PeftModel, batches: list[Batch]) -> dict[str, Seen]:
    """One pass over the batches in eval mode. Padding is left out of the second moments."""
    model.eval()
    found = layers(model)
    weights = [layer.base_layer.weight for layer in found.values()]
    seen = {name: Seen.of(weight.detach()) for name, weight in zip(found, weights, strict=True)}
    hooks = []
    for name, layer in found.items():

        def note(_: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            kept = args[0].detach()[mask]
            seen[name].inputs += kept.mT @ kept / tokens

        hooks.append(layer.base_layer.register_forward_hook(note))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        mask = batch["attention_mask"].bool()
        for name, gradient in zip(found, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            seen[name].gradient += gradient / len(batches)
    for weight in weights:
        weight.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    model.train()
    return seen


def allocated(seen: dict[str, Seen], start: Start) -> dict[str, int]:
    """Ranks in proportion to the scores (Webster), within limits and the parameters of LoRA at the mean rank."""
    if start.uniform:
        return dict.fromkeys(seen, start.rank)
    low, high = max(1, round(start.low * start.rank)), round(start.high * start.rank)
    scores, ranks = {name: one.score(start) for name, one in seen.items()}, dict.fromkeys(seen, low)
    left = (start.rank - low) * sum(one.cost for one in seen.values())
    while able := [name for name in seen if ranks[name] < high and seen[name].cost <= left]:
        best = max(able, key=lambda name: scores[name] / (ranks[name] + 0.5))
        ranks[best] += 1
        left -= seen[best].cost
    return ranks


def begin(model: PeftModel, seen: dict[str, Seen], start: Start, seed: int) -> dict[str, int]:
    """Give every module its rank and rows; returns the ranks."""
    ranks = allocated(seen, start)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers(model).items():
        one, rank, width = seen[name], ranks[name], seen[name].weight.shape[1]
        old = layer.lora_A["default"].weight.detach()
        fresh = (2 * torch.rand(max(0, rank - len(old)), width, generator=generator) - 1) / math.sqrt(width)
        a = torch.cat([old, fresh])[:rank]
        if start.rows != "random" and (n := rank - round(start.random * rank)):
            a = torch.cat([one.scaled(one.rows(start)[:n], start), a[n:]])
        b = torch.zeros(len(one.weight), rank)
        if start.eta:
            b = -start.eta * one.gradient @ torch.linalg.pinv(a)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
        layer.scaling["default"] = PROTOCOL["scale"]
    return ranks


def train(name: str, seed: int, start: Start) -> dict[str, Any]:
    """The fields of a line: as `comparison.training.train` does it for LoRA, but for the start."""
    task, job = load(name), Job(name, "lora", start.rank, RATES[name] * start.rate, seed, STEPS)
    model = adapted(job, task).train()
    head = 0 if task.task_type is None else start.head
    warm = max(1, round(PROTOCOL["warmup"] * STEPS))
    ranks, looked, optimizer = dict.fromkeys(layers(model), start.rank), 0.0, None
    for parameter in of_adapter(model):
        parameter.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    heads = torch.optim.AdamW(parameters, PROTOCOL["head_lr"], weight_decay=0.0) if parameters else None
    torch.manual_seed(seed)
    losses = []
    for step, batch in enumerate(itertools.islice(task.batches(seed, PROTOCOL["batch"]), STEPS)):
        factor = (step + 1) / warm if step < warm else (STEPS - step) / (STEPS - warm)
        if step == head:
            began = time.process_time()
            if start.looks:
                others = itertools.islice(task.batches(seed + 1_000, PROTOCOL["batch"]), start.batches)
                ranks = begin(model, look(model, list(others)), start, seed)
            looked = time.process_time() - began
            factors = [p.requires_grad_() for p in of_adapter(model)]
            optimizer = torch.optim.AdamW(factors, weight_decay=0.0)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), PROTOCOL["clip"])
        rewarm = min(1.0, (step + 1 - head) / start.rewarm) if start.rewarm else 1.0
        for one, rate in ((heads, PROTOCOL["head_lr"]), (optimizer, job.rate * rewarm)):
            if one is not None:
                one.param_groups[0]["lr"] = rate * factor
                one.step()
                one.zero_grad()
        losses.append(loss.item())
    return {
        **{split: task.score(model, split) for split in ("validation", "test")},
        "params": sum(p.numel() for p in of_adapter(model)),
        "ranks": list(ranks.values()),
        "losses": [round(mean(losses[i : i + 20]), 4) for i in range(0, STEPS, 20)],
        "look_seconds": round(looked, 1),
    }


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


@app.command()
def run(
    task: Annotated[str, typer.Argument(help=", ".join(RATES))],
    seeds: Annotated[str, typer.Argument(help="as in 0,1,2")],
    changes: Annotated[list[str] | None, typer.Argument(help="fields of Start, as in batches=4")] = None,
) -> None:
    """Run what is missing of these seeds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = Start.parse(changes or [])
    for seed in map(int, seeds.split(",")):
        key = {"task": task, "seed": seed, "start": start.changes}
        if any(all(line[name] == value for name, value in key.items()) for line in lines()):
            continue
        began = time.process_time()
        found = train(task, seed, start)
        append_line(LINES, {**key, **found, "cpu_seconds": round(time.process_time() - began, 1)})
        console.print(f"{key}: test {found['test']['loss']:.4f}, LoRA's {lora(task, start, seed)}", markup=False)


def lora(task: str, start: Start, seed: int) -> float | None:
    """Test loss of LoRA at the same multiple of its own best rate."""
    line = Results(RESULTS).of(Job(task, "lora", start.rank, RATES[task] * start.rate, seed, STEPS))
    return line["test"]["loss"] if line is not None else None


@app.command()
def tables() -> None:
    """Print every start's test loss minus that of LoRA of the same seed, size and rate, as Markdown."""
    found = lines()
    starts = sorted({json.dumps(line["start"]) for line in found}, key=lambda text: (len(json.loads(text)), text))
    rows = [(json.loads(text), *(cell(found, task, text) for task in RATES)) for text in starts]
    titles = [f"{SETTINGS[task].title}, {rate:g}" for task, rate in RATES.items()]
    named = [(" ".join(f"`{k}={v}`" for k, v in start.items()) or "as it began", *cells) for start, *cells in rows]
    print(markdown(("changed", *titles), named))


def cell(found: list[dict[str, Any]], task: str, start: str) -> str:
    """Differences in the order of seeds, and the loss itself where LoRA has no line to take off."""
    of = sorted((x for x in found if (x["task"], json.dumps(x["start"])) == (task, start)), key=lambda x: x["seed"])
    pairs = [(x["test"]["loss"], lora(task, Start(**x["start"]), x["seed"])) for x in of]
    cells = [f"{loss - plain:+.4f}" if plain is not None else f"({loss:.4f})" for loss, plain in pairs]
    return ", ".join(cells) or "not run"


if __name__ == "__main__":
    app()
