"""Photographs that scikit-learn and scikit-image carry in their wheels, and ways to spoil them. Nothing is downloaded.

Images are float32 ``[3, height, width]`` in [0, 1]. A degradation is (image, generator) -> image of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor
from torch.nn import functional as F

Degradation = Callable[[Tensor, Generator], Tensor]


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """(for training, held out)."""
    train = [
        data.astronaut(),
        data.chelsea(),
        data.stereo_motorcycle()[0],
        data.rocket(),
        load_sample_image("china.jpg"),
    ]
    return [_image(a) for a in train], [_image(a) for a in (data.coffee(), load_sample_image("flower.jpg"))]


def _image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels[..., :3])).permute(2, 0, 1).float() / 255


def crops(images: list[Tensor], n: int, size: int, g: Generator) -> Tensor:
    """``[n, 3, size, size]`` from the images in turn, anywhere, flipped at random."""
    out = []
    for i in range(n):
        image = images[i % len(images)]
        top, left = (_int(0, side - size, g) for side in image.shape[1:])
        crop = image[:, top : top + size, left : left + size]
        out.append(crop.flip(2) if _uniform(0, 1, g) < 0.5 else crop)
    return torch.stack(out)


def spoil(images: Tensor, degradation: Degradation, g: Generator) -> Tensor:
    return torch.stack([degradation(image, g).clamp(0, 1) for image in images])


# -- what pre-training sees -----------------------------------------------------------------------------------------


def blur(image: Tensor, g: Generator) -> Tensor:
    sigma = _uniform(0.5, 2.0, g)
    line = torch.exp(-torch.arange(-6.0, 7.0).square() / (2 * sigma**2))
    return _filter(image, torch.outer(line, line))


def noise(image: Tensor, g: Generator) -> Tensor:
    return image + _uniform(5, 30, g) / 255 * torch.randn(image.shape, generator=g)


def rain(image: Tensor, g: Generator) -> Tensor:
    drops = (torch.rand(1, *image.shape[1:], generator=g) < _uniform(0.002, 0.01, g)).float()
    streaks = _filter(drops, _line(_int(9, 17, g), _uniform(-0.4, 0.4, g) + math.pi / 2)) * _uniform(2, 5, g)
    return image + streaks


def blocking(image: Tensor, g: Generator) -> Tensor:
    """As JPEG does: 8 x 8 blocks, their cosine transform rounded, the more coarsely the higher the frequency."""
    i = torch.arange(8.0)
    dct = torch.cos(math.pi / 8 * (i + 0.5) * i[:, None]) * torch.where(i == 0, 1, 2**0.5)[:, None] / 8**0.5
    step = _uniform(0.05, 0.2, g) * (1 + i + i[:, None]) / 4
    _, h, w = image.shape
    padded = F.pad(image[None], (0, -w % 8, 0, -h % 8), mode="replicate")[0]
    blocks = padded.unfold(1, 8, 8).unfold(2, 8, 8)
    rounded = dct.T @ ((dct @ blocks @ dct.T / step).round() * step) @ dct
    return rounded.permute(0, 1, 3, 2, 4).reshape(padded.shape)[:, :h, :w]


def random_order(image: Tensor, g: Generator) -> Tensor:
    """A random subset of them in random order, as in CoLoRA's pre-training (PROD, arXiv 2408.01099)."""
    for i in torch.randperm(4, generator=g)[: _int(1, 4, g)]:
        image = (blur, noise, rain, blocking)[int(i)](image, g).clamp(0, 1)
    return image


# -- what it never sees ---------------------------------------------------------------------------------------------


def haze(image: Tensor, g: Generator) -> Tensor:
    """J t + airlight (1 - t) with transmission t = exp(-density * depth) of a smooth random depth."""
    depth = F.interpolate(torch.rand(1, 1, 3, 3, generator=g), image.shape[1:], mode="bicubic", align_corners=True)[0]
    t = torch.exp(-_uniform(0.5, 1.5, g) * depth)
    airlight = _uniform(0.75, 0.95, g)
    return image * t + airlight * (1 - t)


def motion(image: Tensor, g: Generator) -> Tensor:
    return _filter(image, _line(_int(7, 13, g), _uniform(0, math.pi, g)))


HELD_OUT: dict[str, Degradation] = {"haze": haze, "motion": motion}


# -- parts ----------------------------------------------------------------------------------------------------------


def _uniform(low: float, high: float, g: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=g))


def _int(low: int, high: int, g: Generator) -> int:
    """From `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _line(length: int, angle: float) -> Tensor:
    """A line through the middle of a ``[17, 17]`` kernel."""
    kernel = torch.zeros(17, 17)
    for t in torch.linspace(-length / 2, length / 2, 4 * length).tolist():
        kernel[round(8 + t * math.sin(angle)) % 17, round(8 + t * math.cos(angle)) % 17] += 1
    return kernel


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    kernel = (kernel / kernel.sum()).expand(len(image), 1, *kernel.shape)
    half = kernel.shape[-1] // 2
    return F.conv2d(F.pad(image[None], [half] * 4, mode="reflect"), kernel, groups=len(image))[0]
