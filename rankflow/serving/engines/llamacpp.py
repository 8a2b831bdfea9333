"""What llama.cpp does with an adapter.

Read: `convert_lora_to_gguf.py`, `llama-adapter.h`.

- The converter keeps lora_alpha alone, and the runtime scales by it over the tensor's own rank, or by 1 if it is 0;
  use_rslora and alpha_pattern are lost [code].
- What is no factor is refused, but for copies of base weights and norms, which are skipped [code].
- Names: the converter takes names with and without `base_model.model.`, and nothing between lora_A and weight
  [reading].
- Other types of PEFT's: the converter asks for lora_alpha; AdaLoRA's names without `.weight`, and matrices between the
  factors (LoRA-XS, NLoRA), are refused [code].
- The invocation tokens of aLoRA are read (`adapter.alora.invocation_tokens`, pull request 15327) [thread].
"""

from __future__ import annotations

from rankflow.serving.engine import PLAIN_ONLY, Engine, Fate
from rankflow.serving.features import MEGATRON, REPLICATED, TRAINED_ROWS, TYING

ENGINE = Engine(
    "llamacpp",
    "gguf",
    scale="tensor",
    rslora=False,
    fates={
        "convolutions": Fate.REFUSED,
        "attention": Fate.REFUSED,
        "experts": Fate.REFUSED,
        **PLAIN_ONLY,
        **dict.fromkeys((REPLICATED, TYING, MEGATRON), Fate.SILENT),
        TRAINED_ROWS: Fate.REFUSED,
        "DoRA": Fate.REFUSED,
        "modules_to_save": Fate.REFUSED,
        "bias": Fate.REFUSED,
        "full embeddings": Fate.REFUSED,
        "norms": Fate.SILENT,
        "other tensors": Fate.REFUSED,
    },
)
