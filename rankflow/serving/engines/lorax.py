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

from rankflow.serving.engine import OF_PEFT_ALONE, Engine, Fate
from rankflow.serving.features import ADALORA, MIDDLE, NAMED_ADAPTER, NO_PREFIX, OTHER_TYPES, TRAINED_ROWS, WRAPPED

ENGINE = Engine(
    "lorax",
    "peft",
    scale="config",
    rows="one a type",
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
    every_layer=True,
)
