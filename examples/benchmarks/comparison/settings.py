"""How each task is trained, where that differs from `PROTOCOL`. Light to import: plans and tables need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Rates = tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """`per_rank`: adapter parameters of one rank in every module. `rates`: tried for every arm in place of its own.

    `extend`: whether a sweep goes on where its best rate is at an edge; where runs are dear it does not.
    """

    title: str
    per_rank: int = 41_472  # of MiniLM's 36 linears
    steps: int = 200
    protocol: Mapping[str, Any] = field(default_factory=dict)
    rates: Rates | None = None
    extend: bool = True
    linears: bool = True  # adapters are on these alone
    classes: bool = True  # a classification, so that its probabilities can be calibrated

    def grid(self, own: Rates) -> Rates:
        return self.rates or own


SETTINGS: dict[str, Setting] = {
    "recovery": Setting("recovery of a pruned MiniLM", classes=False),
    "newsgroups": Setting("20 Newsgroups, MiniLM"),
    "rotten_tomatoes": Setting("Rotten Tomatoes, MiniLM"),
    "reuters": Setting("Reuters R52, MiniLM"),
    "rotten_tomatoes_few": Setting("Rotten Tomatoes, 200 texts, MiniLM"),
    "restorer": Setting(
        "image restorer, haze",
        per_rank=3_678,  # of its 18 convolutions
        steps=100,
        protocol={"modules": "all convolutions"},
        rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
        linears=False,
        classes=False,
    ),
    "vision": Setting(
        "Fashion-MNIST, DINOv2-S",
        per_rank=82_944,  # of its 72 linears
        steps=100,
        protocol={"batch": 16},
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "language": Setting(
        "movie reviews as plain text, SmolLM2-135M",
        per_rank=305_280,  # of its 210 linears
        steps=100,
        protocol={"modules": "all linears of the decoder", "batch": 4},
        rates=(2e-3, 4e-3),
        extend=False,
        classes=False,
    ),
}
