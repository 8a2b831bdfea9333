"""What ComfyUI does with an adapter.

Read: `weight_adapter/lora.py`, `lora.py`.

- A module's alpha over its rank, 1 without; headers are not read [code].
- Of adapters' names in those of factors it knows `default` [code].
- It knows `dora_scale` and no `lora_magnitude_vector`, nor biases of factors, and goes on without what it does not
  know, with a line in the log [code].
- CLIP's modules are `text_model.encoder.layers..` to it in every spelling (`model_lora_keys_clip`) [code].
"""

from __future__ import annotations

from rankflow.formats.base import SavedAdapter
from rankflow.formats.single_file.diffusers import METADATA, DiffusersAdapter
from rankflow.serving.engine import SINGLE_FILES, Engine, Fate, Problem
from rankflow.serving.features import ALORA, MAGNITUDE, MEGATRON, OTHER_ADAPTER, OTHER_NAMES, REPLICATED, TYING, WRAPPED


class ComfyUI(Engine):
    def scale_problems(self, adapter: SavedAdapter) -> list[Problem]:
        """Scales that a header says, which is not read."""
        told = isinstance(adapter, DiffusersAdapter) and METADATA in adapter.metadata
        return self.misscaled(adapter, lambda *_: 1.0) if told else []


ENGINE = ComfyUI(
    "comfyui",
    "",
    reads=SINGLE_FILES,
    fates={
        WRAPPED: Fate.SILENT,
        OTHER_NAMES: Fate.SILENT,
        OTHER_ADAPTER: Fate.SILENT,
        **dict.fromkeys((ALORA, REPLICATED, TYING, MEGATRON, MAGNITUDE, "bias"), Fate.SILENT),
        "other tensors": Fate.UNKNOWN,
    },
)
