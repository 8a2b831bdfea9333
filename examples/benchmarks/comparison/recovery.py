"""A task where rank matters: a pruned model learns to embed texts as it did before.

Half of the weights of every linear of all-MiniLM-L6-v2, the smallest of each, are set to zero; adapters on those
linears are trained to give each text the sentence embedding that the unharmed model gives it. What was removed has
full rank, so every direction more brings some of it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, logging
from transformers.utils.generic import ModelOutput

from comparison.tasks import Batch, Score, Split, Task, scored
from data import minilm_path

REMOVED = 0.5


@dataclass
class Embedded(ModelOutput):
    """`loss`: mean cosine distance to the targets, where there are any. `embedding`: [texts, width], of length 1."""

    loss: Tensor | None = None
    embedding: Tensor | None = None


class Embedder(nn.Module):
    """Means over tokens, as all-MiniLM-L6-v2 is meant to be used."""

    def __init__(self) -> None:
        super().__init__()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.bert = AutoModel.from_pretrained(
            minilm_path(),
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            trust_remote_code=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, target: Tensor | None = None) -> Embedded:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embedding = normalize((hidden * attention_mask[..., None]).sum(1), dim=-1)
        loss = None if target is None else (1 - (embedding * target).sum(1)).mean()
        return Embedded(loss=loss, embedding=embedding)


def prune(model: nn.Module, share: float) -> None:
    """Set that share of every linear's weights to zero, the smallest by magnitude."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                w = module.weight
                w.mul_(w.abs() > w.abs().flatten().kthvalue(max(1, round(share * w.numel()))).values)


class Recovery(Task):
    """Batches carry the unharmed model's embeddings instead of labels."""

    task_type = None

    @cached_property
    def unharmed(self) -> nn.Module:
        return Embedder().eval()

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = Embedder()
        prune(model, REMOVED)
        return model

    def held_out(self, split: Split, size: int = 50) -> list[Batch]:
        found = self.__dict__.setdefault("_held_out", {})
        if (split, size) not in found:  # the unharmed model takes its time
            found[split, size] = super().held_out(split, size)
        return found[split, size]

    def _batch(self, ids: list[list[int]], labels: list[int]) -> Batch:
        batch = super()._batch(ids, labels)
        del batch["labels"]
        with torch.no_grad():
            return {**batch, "target": self.unharmed(**batch).embedding}

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> Score:
        """Accuracy: for how many texts the nearest other text of the split is the one the unharmed model finds."""
        model.eval()
        batches = self.held_out(split)
        ours = torch.cat([model(**batch).embedding for batch in batches])
        theirs = torch.cat([batch["target"] for batch in batches])
        model.train()
        hits = int((nearest(ours) == nearest(theirs)).sum())
        return scored(hits, len(ours), float((1 - (ours * theirs).sum(1)).mean()))


def nearest(embeddings: Tensor) -> Tensor:
    """For each of [n, width], which other one is closest."""
    return (embeddings @ embeddings.mT).fill_diagonal_(-2).argmax(1)
