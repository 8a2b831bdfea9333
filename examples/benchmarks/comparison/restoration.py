"""A small restorer meets haze, which it was never trained on, and adapts to it from 64 pairs.

Its pre-training, two minutes, is done once and kept in ~/.cache/rankflow-benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from image_restoration import PAIRS, SIZE, Restorer, pretrain
from torch import Generator, Tensor, nn
from torch.nn.functional import l1_loss
from transformers.utils.generic import ModelOutput

from comparison.tasks import Batch, Score, Split, Task
from degradations import HELD_OUT, crops, photographs, spoil

HAZE = HELD_OUT["haze"]
PRETRAINING = 500  # steps, on random degradations
CROPS: dict[Split, int] = {"test": 48, "validation": 24, "outer": 32}
SEEDS: dict[Split, int] = {"test": 7, "validation": 8, "outer": 9}  # of the crops and their haze


@dataclass
class Restored(ModelOutput):
    """`loss`: mean absolute error, where there is a target. `image`: [images, 3, height, width]."""

    loss: Tensor | None = None
    image: Tensor | None = None


class Restoring(nn.Module):
    """The restorer with its loss, called as transformers models are."""

    def __init__(self, restorer: nn.Module):
        super().__init__()
        self.restorer = restorer

    def forward(self, image: Tensor, target: Tensor | None = None) -> Restored:
        restored = self.restorer(image)
        return Restored(loss=None if target is None else l1_loss(restored, target), image=restored)


class Restoration(Task):
    task_type = None

    @property
    def modules(self) -> list[str]:
        return [name for name, module in Restorer().named_modules() if isinstance(module, nn.Conv2d)]

    def model(self, seed: int) -> nn.Module:
        restorer = Restorer()
        restorer.load_state_dict(torch.load(pretrained(), weights_only=True))
        return Restoring(restorer)

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """From 64 pairs, the same for `seed` and `seed` + 1,000, whose batches are for studies: there are no others."""
        pairs = _pairs(self.photographs[0], PAIRS, SIZE, Generator().manual_seed(100 + seed % 1_000))
        random = Generator().manual_seed(seed)
        while True:
            chosen = torch.randperm(PAIRS, generator=random)[:size]
            yield {name: images[chosen] for name, images in pairs.items()}

    def held_out(self, split: Split, size: int = 8) -> list[Batch]:
        """Of photographs that no training crop is from; `validation` and `outer` are of those that some are from."""
        photos = self.photographs[1 if split == "test" else 0]
        pairs = _pairs(photos, CROPS[split], 2 * SIZE, Generator().manual_seed(SEEDS[split]))
        parts = zip(*(images.split(size) for images in pairs.values()), strict=True)
        return [dict(zip(pairs, part, strict=True)) for part in parts]

    @cached_property
    def photographs(self) -> tuple[list[Tensor], list[Tensor]]:
        return photographs()

    @torch.inference_mode()
    def score(self, model: nn.Module, split: Split) -> Score:
        """Mean absolute error, and the mean peak signal-to-noise ratio in dB."""
        model.eval()
        loss, psnr, n = 0.0, 0.0, 0
        for batch in self.held_out(split):
            out = model(**batch)
            errors = (out.image.clamp(0, 1) - batch["target"]).square().flatten(1).mean(1)
            psnr += float((-10 * torch.log10(errors)).sum())
            loss += float(out.loss) * len(errors)
            n += len(errors)
        model.train()
        return {"loss": round(loss / n, 6), "psnr": round(psnr / n, 3)}


def pretrained() -> Path:
    """The file of its weights, made where it is missing."""
    path = Path.home() / ".cache" / "rankflow-benchmarks" / f"restorer-{PRETRAINING}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pretrain(photographs()[0], PRETRAINING, seed=0).state_dict(), path)
    return path


def _pairs(photos: list[Tensor], n: int, size: int, random: Generator) -> Batch:
    clean = crops(photos, n, size, random)
    return {"image": spoil(clean, HAZE, random), "target": clean}


def restorer() -> Task:
    return Restoration("restorer", 0, {})
