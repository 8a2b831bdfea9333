"""The whole way on real data, offline, in a few minutes on two cores.

Fine-tunes all-MiniLM-L6-v2 on Rotten Tomatoes with LoRA on every attention and feed-forward linear. Ranks grow per
module (IncreLoRA), anneal down (LoRA-Squeeze) and hold; the saved adapter is then squeezed from the command line.

Run: python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Trainer, TrainingArguments, set_seed

from data import LINEARS, Reviews, minilm_classifier, reviews
from rankflow import Ledger, RankFlowCallback
from rankflow.render.run_figure import plot_ledger

console = Console()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: Reviews, what: str) -> tuple[float, float]:
    """Share of `data` classified rightly, and its standard error."""
    model.eval()
    hits = 0
    for batch in track(torch.utils.data.DataLoader(data, batch_size=64), f"evaluating {what}", transient=True):
        hits += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    p = hits / len(data)
    return p, (p * (1 - p) / len(data)) ** 0.5


def train(policy: str, steps: int, out: Path, data: Reviews, seed: int) -> tuple[PeftModel, list[tuple[int, float]]]:
    """The trained model, and (step, loss) every few steps."""
    set_seed(seed)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=LINEARS)
    model = get_peft_model(minilm_classifier(seed), config)
    flow = RankFlowCallback(policy)
    args = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[flow])
    trainer.train()
    model.save_pretrained(out / "adapter")
    return model, [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]


def squeeze(source: Path, rank: int) -> Path:
    out = source.with_name(f"adapter-r{rank}")
    command = ["rankflow", "squeeze", str(source), "--target-rank", str(rank), "-o", str(out), "--force"]
    console.print(f"[dim]$ {' '.join(command)}[/dim]")
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return out


def megabytes(adapter: Path) -> float:
    return (adapter / "adapter_model.safetensors").stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="grow_then_squeeze", help="a shipped policy, or the path of a YAML file")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads stall each other on small machines
    warnings.filterwarnings("ignore", message=".*pin_memory.*")

    data, held_out = reviews()
    console.rule("Training: ranks grow, then anneal")
    model, losses = train(options.policy, options.steps, options.out, data, options.seed)
    ledger = Ledger.read(options.out / "trainer" / "rankflow.jsonl")
    picture = plot_ledger(ledger, options.out / "ranks.png", losses, force=True)

    console.rule("Squeezing the saved adapter")
    adapter = options.out / "adapter"
    rows = [("as trained", adapter, accuracy(model, held_out, "as trained"))]
    for rank in (8, 4, 2, 1):
        small = squeeze(adapter, rank)
        loaded = PeftModel.from_pretrained(minilm_classifier(options.seed), small)
        rows.append((f"rank {rank}", small, accuracy(loaded, held_out, f"rank {rank}")))

    table = Table(title=f"{len(held_out)} held-out reviews", title_justify="left")
    for heading in ("adapter", "accuracy", "standard error", "MB", "saved in"):
        table.add_column(heading, justify="left" if heading in ("adapter", "saved in") else "right")
    for name, path, (p, error) in rows:
        table.add_row(name, f"{p:.3f}", f"± {error:.3f}", f"{megabytes(path):.2f}", str(path))
    console.print(table)
    console.print(f"Ranks over time: {picture}\nWhat was done and why: {options.out / 'trainer' / 'rankflow.jsonl'}")


if __name__ == "__main__":
    main()
