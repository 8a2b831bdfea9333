"""What TensorRT-LLM does with an adapter.

Read: `lora_manager.py`.

- lora_alpha over the tensor's own rank, its root with use_rslora; alpha_pattern is not read [code]. Before pull request
  2366 the single r, and before issue 1668 no rsLoRA [thread].
- max_lora_rank is 64 unless set [code].
- Where some of q, k and v are missing from the whole adapter, it puts zeros as wide as the model [code].
- DoRA is loaded. LoRA of lm_head and of embeddings is skipped, other names are refused [code]; a full lm_head or
  embed_tokens counts while an engine is built, and not afterwards [reading].
- Names: its pattern takes names with and without `base_model.model.`, and nothing between lora_A and weight [reading].
- Other types of PEFT's, AdaLoRA, and matrices between the factors (LoRA-XS, NLoRA): names of tensors that it does not
  know are refused [code].
- The config has no field for the invocation tokens of aLoRA, so that the adapter acts on every token [code].
"""

from __future__ import annotations

from rankflow.serving.engine import LINEAR_ONLY, Engine, Fate, Stack

ENGINE = Engine(
    "tensorrt-llm",
    "peft",
    scale="tensor",
    setting="--max_lora_rank",
    fates={
        **LINEAR_ONLY,
        "embeddings": Fate.SILENT,
        "lm_head": Fate.SILENT,
        "bias": Fate.REFUSED,
        "modules_to_save": Fate.UNKNOWN,
        "full embeddings": Fate.UNKNOWN,
        "norms": Fate.REFUSED,
        "other tensors": Fate.REFUSED,
    },
    stacks=(
        Stack(
            ("q_proj", "k_proj", "v_proj"),
            ("q_proj", "k_proj", "v_proj"),
            "puts zeros as wide as the model for what is missing, which fits no model with fewer key heads",
            Fate.UNKNOWN,
        ),
    ),
)
