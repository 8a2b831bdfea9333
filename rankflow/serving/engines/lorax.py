"""What LoRAX does with an adapter.

Read: `adapters/lora.py`, `utils/sgmv.py`.

- One scale lora_alpha / r, use_rslora heeded [code].
- A of one type of module is stacked over all layers, so ranks have to agree after padding (to 8, above that to
  multiples of 16), and a type that a layer lacks is left out everywhere [code]. r is overwritten by the padded rank
  while types are loaded one after the other, so that all but the first are scaled by the wrong one [reading].
- Kernels for ranks up to 128 [code].
- What is no linear layer, magnitudes, biases and full tensors are not looked at [code].
- Names: it asks for `base_model.model.` and gets no factor without [code].
- Other types of PEFT's: it asks for lora_alpha. In AdaLoRA, whose names have no `.weight`, it finds no factor and
  serves the base alone; of LoRA-XS and NLoRA it loads A and B without the matrix between them [code].
- The config has no field for the invocation tokens of aLoRA, so that the adapter acts on every token [code].
"""

from __future__ import annotations

from collections import defaultdict

from rankflow.formats.base import SavedAdapter
from rankflow.plans.names import arrange
from rankflow.serving.engine import OF_PEFT_ALONE, Engine, Fate, Problem
from rankflow.serving.features import (
    ADALORA,
    MIDDLE,
    NAMED_ADAPTER,
    NO_PREFIX,
    OTHER_TYPES,
    TRAINED_ROWS,
    WRAPPED,
    config_of,
)


class Lorax(Engine):
    @property
    def fills(self) -> bool:
        return True

    def rank_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Ranks that cannot be stacked, or are padded and then scaled by."""
        padded: dict[str, set[int]] = defaultdict(set)
        for row in arrange(adapter.layout):
            padded[row.type].add(_as_padded(adapter.layout[row.name].rank))
        remedy = self.rewrite(adapter)
        found = [
            Problem(
                f"rank_pattern: {kind}",
                f"stacks all layers, and these have ranks {sorted(ranks)}",
                Fate.REFUSED,
                remedy,
            )
            for kind, ranks in padded.items()
            if len(ranks) > 1
        ]
        r = config_of(adapter)["r"]
        if _as_padded(r) != r and len(padded) > 1:
            does = f"pads to {_as_padded(r)} and scales all types but the first by that"
            found.append(Problem(f"r = {r}", does, Fate.SILENT, remedy))
        return found

    def layer_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Types of modules that some layer lacks."""
        layers: dict[str, set[str]] = defaultdict(set)
        for row in arrange(adapter.layout):
            layers[row.type].add(row.layer)
        every = set().union(*(found for found in layers.values() if "" not in found))
        return [
            Problem(
                f"{kind} in {len(found)} of {len(every)} layers",
                "leaves a type out of all layers if one lacks it",
                Fate.SILENT,
                "train that type in every layer",
            )
            for kind, found in layers.items()
            if "" not in found and len(found) < len(every)
        ]


def _as_padded(rank: int) -> int:
    return 8 if rank <= 8 else -(-rank // 16) * 16


ENGINE = Lorax(
    "lorax",
    "peft",
    scale="config",
    ranks=(8, 16, 32, 64, 128),
    fates={
        "convolutions": Fate.SILENT,
        "attention": Fate.SILENT,
        "experts": Fate.SILENT,
        "embeddings": Fate.SILENT,
        ADALORA: Fate.SILENT,
        OTHER_TYPES: Fate.REFUSED,
        MIDDLE: Fate.SILENT,
        NO_PREFIX: Fate.SILENT,
        NAMED_ADAPTER: Fate.SILENT,
        WRAPPED: Fate.SILENT,
        **OF_PEFT_ALONE,
        TRAINED_ROWS: Fate.SILENT,
        "DoRA": Fate.SILENT,
        "modules_to_save": Fate.SILENT,
        "bias": Fate.SILENT,
        "full embeddings": Fate.SILENT,
        "norms": Fate.SILENT,
        "other tensors": Fate.SILENT,
    },
)
