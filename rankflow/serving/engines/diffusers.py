"""What diffusers does with an adapter.

- Alphas of a file, or the PEFT config in its header; without either 1, which versions before pull request 14409 get
  wrong where ranks differ [thread].
- `loaders/lora_pipeline.py` takes every `dora_scale` out of a file, `loaders/lora_conversion_utils.py` every `.diff_b`
  of FLUX and every `.diff` of a norm, with no more than a line in the log [code].
- Modules of a text encoder are looked for by the names that the transformers at hand has for them (diffusers issue
  13984) [thread].
- Names of the models' own checkpoints, kohya's among them, are translated as a file is loaded, for U-Nets, FLUX, Wan,
  HunyuanVideo, LTX, Lumina, HiDream, Qwen-Image, Z-Image and others, but not for SD3, which then gets nothing [code].
"""

from __future__ import annotations

from rankflow.formats.base import SavedAdapter
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter, mixed
from rankflow.serving.engine import SINGLE_FILES, Engine, Fate, Problem
from rankflow.serving.features import (
    ALORA,
    BIASES,
    DORA_SCALE,
    FLUX_BIASES,
    FULL_UPDATES,
    MEGATRON,
    NORM_UPDATES,
    OTHER_ADAPTER,
    OTHER_NAMES,
    REPLICATED,
    SD3_NAMES,
    TYING,
    WRAPPED,
)


class Diffusers(Engine):
    def scale_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Ranks that differ in a file that tells no scale."""
        if not isinstance(adapter, DiffusersAdapter) or not mixed(adapter.layout.ranks):
            return []
        if METADATA in adapter.metadata or any(module.alpha_key for module in adapter.entries.values()):
            return []
        does = "takes the commonest rank for the scale of all, before its pull request 14409"
        return [Problem("ranks that differ, and no alpha", does, Fate.SILENT, self.rewrite(adapter))]


ENGINE = Diffusers(
    "diffusers",
    "diffusers",
    reads=SINGLE_FILES,
    library_names=True,
    fates={
        WRAPPED: Fate.SILENT,
        OTHER_ADAPTER: Fate.SILENT,
        OTHER_NAMES: Fate.UNKNOWN,
        SD3_NAMES: Fate.SILENT,
        **dict.fromkeys((ALORA, REPLICATED, TYING, MEGATRON), Fate.UNKNOWN),
        DORA_SCALE: Fate.SILENT,
        FLUX_BIASES: Fate.SILENT,
        BIASES: Fate.UNKNOWN,
        NORM_UPDATES: Fate.SILENT,
        FULL_UPDATES: Fate.UNKNOWN,
        "other tensors": Fate.UNKNOWN,
    },
)
