"""Cont-Squeeze (LoRA-Squeeze, arXiv 2602.10993): train at a high rank, squeeze, train on at the low one. Offline.

Fine-tunes all-MiniLM-L6-v2 on Rotten Tomatoes at rank 32 and keeps a checkpoint, adapter and optimizer. From there it
is squeezed to rank 4 and trained on, with the optimizer's state carried through the squeeze and without, beside LoRA
born at rank 4 that trains for as many steps in all.

Run: python examples/continue_at_rank.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import AdamW
from torch.utils.data import DataLoader

import rankflow
from data import LINEARS, Reviews, minilm_classifier, reviews

console = Console()


def optimizer_of(model: PeftModel, lr: float) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model: PeftModel, optimizer: AdamW, data: Reviews, steps: int, what: str) -> None:
    """`steps` of batch 16 with the learning rate going down to 0."""
    model.train()
    torch.manual_seed(0)
    loader = iter(DataLoader(data, batch_size=16, shuffle=True, drop_last=True))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in track(range(steps), what, transient=True):
        model(**next(loader)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.inference_mode()
def score(model: PeftModel, data: Reviews) -> tuple[float, float]:
    """Share of `data` classified rightly, and the mean loss."""
    model.eval()
    hits, loss = 0, 0.0
    for batch in track(DataLoader(data, batch_size=64), "evaluating", transient=True):
        out = model(**batch)
        hits += int((out.logits.argmax(-1) == batch["labels"]).sum())
        loss += float(out.loss) * len(batch["labels"])
    return hits / len(data), loss / len(data)


def fresh(rank: int) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
    return get_peft_model(minilm_classifier(), config)


def loaded(checkpoint: Path, lr: float) -> tuple[PeftModel, AdamW]:
    model = PeftModel.from_pretrained(minilm_classifier(), checkpoint, is_trainable=True)
    optimizer = optimizer_of(model, lr)
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr  # the first run's had come down to 0
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--high", type=int, default=32, help="rank to begin with")
    parser.add_argument("--rank", type=int, default=4, help="rank to go on at")
    parser.add_argument("--before", type=int, default=200, help="steps at the high rank")
    parser.add_argument("--steps", type=int, default=100, help="steps at the low one")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/continue_at_rank"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads stall each other on small machines
    data, held_out = reviews()
    rows: list[tuple[str, int, tuple[float, float]]] = []

    high = fresh(options.high)
    optimizer = optimizer_of(high, options.lr)
    train(high, optimizer, data, options.before, f"rank {options.high}")
    checkpoint = options.out / "checkpoint"
    high.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    rows.append((f"trained at rank {options.high}", options.before, score(high, held_out)))

    for carried in (True, False):
        model, optimizer = loaded(checkpoint, options.lr)
        rankflow.squeeze_model(model, target_rank=options.rank, optimizer=optimizer)
        if not carried:
            optimizer = optimizer_of(model, options.lr)
            rows.append((f"squeezed to rank {options.rank}", options.before, score(model, held_out)))
        what = "optimizer state carried" if carried else "a new optimizer"
        train(model, optimizer, data, options.steps, what)
        rows.append((f"and trained on, {what}", options.before + options.steps, score(model, held_out)))
        model.save_pretrained(options.out / ("carried" if carried else "new"))

    born = fresh(options.rank)
    train(born, optimizer_of(born, options.lr), data, options.before + options.steps, f"born at rank {options.rank}")
    rows.append((f"born at rank {options.rank}", options.before + options.steps, score(born, held_out)))

    error = (0.25 / len(held_out)) ** 0.5
    table = Table(title=f"{len(held_out)} held-out reviews; accuracies ± {error:.3f} at most", title_justify="left")
    for heading in ("adapter", "steps", "accuracy", "loss"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for name, steps, (accuracy, loss) in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, str(steps), f"{accuracy:.3f}", f"{loss:.4f}")
    console.print(table)
    console.print(f"Adapters: {options.out}")


if __name__ == "__main__":
    main()
