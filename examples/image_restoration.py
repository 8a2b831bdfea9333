"""Ranks by contribution where CoLoRA comes from: a restorer meets a degradation that it was never trained on.

A small convolutional network is pre-trained on photographs that are blurred, noisy, rained on and blocky, in random
order. Then it is adapted to another degradation from a few pairs: not at all, in full, with LoRA of one rank, and with
LoRA of as many parameters whose ranks the `colora` policy shares out. Offline, on one core, in a few minutes.

Run: python examples/image_restoration.py
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import rankflow
from degradations import HELD_OUT, Degradation, crops, photographs, random_order, spoil

SIZE = 48  # side of a training crop
BATCH = 8
PAIRS = 64  # that adaptation may see
CONTRIBUTION = {
    "policy": "colora",
    "budget": {"fraction": 1.0},  # as many parameters as the uniform adapter has
    "limits": {"*": {"min": 1}},
    "when": {"start": "20%", "every": "100%"},
    "params": {"points": 8, "batches": 4},
}
Pairs = list[tuple[Tensor, Tensor]]  # (spoilt, clean), a batch each
console = Console()


class Block(nn.Module):
    """A gated residual block, as in NAFNet (arXiv 2204.04676) but with a plain convolution for its depthwise one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.gather = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.spread(self.norm(x.movedim(1, -1)).movedim(-1, 1)).chunk(2, 1)
        return x + self.gather(left * right)


class Restorer(nn.Module):
    """What is to be added to an image ``[batch, 3, height, width]``, both multiples of 4, to make it whole."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoder1 = Block(width)
        self.down1 = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.encoder2 = Block(2 * width)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 2, stride=2)
        self.middle1 = Block(4 * width)
        self.middle2 = Block(4 * width)
        self.up2 = nn.Conv2d(4 * width, 8 * width, 1)
        self.decoder2 = Block(2 * width)
        self.up1 = nn.Conv2d(2 * width, 4 * width, 1)
        self.decoder1 = Block(width)
        self.outro = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.encoder1(self.intro(image))
        coarse = self.encoder2(self.down1(fine))
        x = self.middle2(self.middle1(self.down2(coarse)))
        x = self.decoder2(F.pixel_shuffle(self.up2(x), 2) + coarse)
        x = self.decoder1(F.pixel_shuffle(self.up1(x), 2) + fine)
        return image + self.outro(x)


class Arm(NamedTuple):
    name: str
    lr: float
    policy: Any  # None: no adapter, all weights


# The best learning rates on other crops of seed 0, of 1e-3 and 3e-3 in full and of 5e-3, 1e-2 and 2e-2 with uniform
# ranks, which ranks by contribution then share
ARMS = [
    Arm("uniform ranks", 5e-3, "hold"),
    Arm("ranks by contribution", 5e-3, CONTRIBUTION),
    Arm("in full", 3e-3, None),
]


class Adapted(NamedTuple):
    model: nn.Module
    trained: int  # parameters
    ranks: dict[str, int]
    seconds: float


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    spoilt, clean = batch
    return F.l1_loss(model(spoilt), clean)


def pretrain(photos: list[Tensor], steps: int, seed: int) -> Restorer:
    torch.manual_seed(seed)
    random = Generator().manual_seed(seed)
    model = Restorer()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in track(range(steps), "pre-training on random degradations", console=console):
        clean = crops(photos, BATCH, SIZE, random)
        loss_of(model, (spoil(clean, random_order, random), clean)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def adapt(base: Restorer, arm: Arm, pairs: tuple[Tensor, Tensor], steps: int, rank: int, seed: int) -> Adapted:
    """The base model adapted to `pairs`; every arm sees the same batches in the same order."""
    torch.manual_seed(seed)
    random = Generator().manual_seed(seed)
    model: nn.Module = copy.deepcopy(base)
    if arm.policy is not None:
        convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=convolutions))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), arm.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    began = time.process_time()
    flow = None
    if arm.policy is not None:
        batches = list(zip(*(part.split(BATCH) for part in pairs), strict=True))
        flow = rankflow.attach(model, optimizer, arm.policy, total_steps=steps, batches=batches, loss_fn=loss_of)
    for _ in track(range(steps), f"adapting: {arm.name}", console=console):
        pick = torch.randperm(len(pairs[0]), generator=random)[:BATCH]
        loss_of(model, (pairs[0][pick], pairs[1][pick])).backward()
        if flow is not None:
            flow.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if flow is not None:
            flow.after_step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - began
    ranks = {} if flow is None else flow.layout.ranks
    if flow is not None:
        flow.finish()
    return Adapted(model.eval(), sum(p.numel() for p in model.parameters() if p.requires_grad), ranks, seconds)


@torch.inference_mode()
def psnr(model: nn.Module, pairs: Pairs) -> Tensor:
    """Peak signal-to-noise ratio of every restored image, in dB ``[images]``."""
    errors = [(model(spoilt).clamp(0, 1) - clean).square().flatten(1).mean(1) for spoilt, clean in pairs]
    return -10 * torch.log10(torch.cat(errors))


def held_out_pairs(photos: list[Tensor], degradation: Degradation, n: int) -> Pairs:
    random = Generator().manual_seed(7)
    clean = crops(photos, n, 2 * SIZE, random)
    return list(zip(spoil(clean, degradation, random).split(BATCH), clean.split(BATCH), strict=True))


# -- what is shown --------------------------------------------------------------------------------------------------


def report(task: str, scores: dict[str, Tensor], adapted: dict[str, list[Adapted]], weights: int) -> Table:
    """Means over seeds and images; differences to uniform ranks are paired by seed and image."""
    images = scores["uniform ranks"].shape[1]
    table = Table(title=f"{task}: {images} crops of held-out photographs, {len(adapted['in full'])} seeds")
    for heading in ("adapted", "trained", "PSNR, dB", "over uniform ranks, by seed", "CPU s"):
        table.add_column(heading, justify="left" if heading == "adapted" else "right")
    for name, score in scores.items():
        runs = adapted.get(name, [])
        gain = (score - scores["uniform ranks"]).mean(1)
        table.add_row(
            name,
            f"{runs[0].trained:,} ({runs[0].trained / weights:.1%})" if runs else "",
            f"{score.mean():.2f}",
            " ".join(f"{g:+.2f}" for g in gain.tolist()) if runs and name != "uniform ranks" else "",
            f"{sum(run.seconds for run in runs) / len(runs):.0f}" if runs else "",
        )
    return table


@torch.inference_mode()
def draw_images(models: dict[str, nn.Module], pairs: Pairs, path: Path) -> None:
    """One held-out image a row: as it is given, as each model restores it, as it was."""
    spoilt, clean = (batch[:3] for batch in pairs[0])
    columns = {
        "degraded": spoilt,
        **{name: model(spoilt).clamp(0, 1) for name, model in models.items()},
        "clean": clean,
    }
    figure, axes = plt.subplots(len(clean), len(columns), figsize=(2 * len(columns), 2.1 * len(clean)))
    for i, (name, images) in enumerate(columns.items()):
        axes[0, i].set_title(name, fontsize=9)
        for row, image, truth in zip(axes[:, i], images, clean, strict=True):
            row.imshow(image.permute(1, 2, 0))
            row.set_xticks([])
            row.set_yticks([])
            if name != "clean":
                row.set_xlabel(f"{-10 * torch.log10((image - truth).square().mean()):.1f} dB", fontsize=8)
    _save(figure, path)


def draw_ranks(ranks: dict[str, int], uniform: int, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 3.2))
    axis.bar(list(ranks), list(ranks.values()), color="tab:blue", label="by contribution")
    axis.axhline(uniform, color="tab:orange", label="uniform, as many parameters")
    axis.tick_params(axis="x", rotation=60, labelsize=8)
    axis.set_ylabel("rank")
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=HELD_OUT, default="haze", help="the degradation to adapt to")
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100, help="of adaptation")
    parser.add_argument("--rank", type=int, default=4, help="of the uniform adapter")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm, on the same pre-trained network")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/image_restoration"))
    options = parser.parse_args(arguments)
    images = 24
    if options.quick:
        options.pretrain_steps, options.steps, options.seeds, images = 4, 10, 1, 8
    torch.set_num_threads(1)
    plt.switch_backend("agg")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    options.out.mkdir(parents=True, exist_ok=True)

    photos, unseen = photographs()
    degradation = HELD_OUT[options.task]
    test = held_out_pairs(unseen, degradation, images)
    base = pretrain(photos, options.pretrain_steps, seed=0).eval()

    adapted: dict[str, list[Adapted]] = {arm.name: [] for arm in ARMS}
    for seed in range(options.seeds):
        random = Generator().manual_seed(100 + seed)
        clean = crops(photos, PAIRS, SIZE, random)
        pairs = spoil(clean, degradation, random), clean
        for arm in ARMS:
            adapted[arm.name].append(adapt(base, arm, pairs, options.steps, options.rank, seed))

    scores = {"as it is given": psnr(nn.Identity(), test)[None], "not at all": psnr(base, test)[None]}
    scores |= {name: torch.stack([psnr(run.model, test) for run in runs]) for name, runs in adapted.items()}
    console.print(report(options.task, scores, adapted, sum(p.numel() for p in base.parameters())))
    shown = {"not at all": base, **{name: runs[0].model for name, runs in adapted.items()}}
    draw_images(shown, test, options.out / f"{options.task}.png")
    ranks = adapted["ranks by contribution"][0].ranks
    draw_ranks(ranks, options.rank, options.out / f"{options.task}-ranks.png")
    console.print(f"ranks by contribution: {' '.join(f'{name} {rank}' for name, rank in ranks.items())}")
    console.print(f"Before and after: {options.out / options.task}.png; ranks: {options.out / options.task}-ranks.png")


if __name__ == "__main__":
    main()
