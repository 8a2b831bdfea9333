"""What vLLM does with an adapter.

Read: `lora/peft_helper.py`, `lora/lora_model.py`, `config/lora.py`.

- One scale lora_alpha / r for all modules, over sqrt(r) with use_rslora; both patterns are dropped (`from_dict` keeps
  the fields it knows) [code]. use_rslora is not heeded for experts (issue 55545) [thread].
- r has to be at most max_lora_rank, one of `ranks`, 16 unless set; buffers have that many rows and take each tensor's
  own, so that one with more than r passes the check and fails in the copy [reading].
- Refused: modules_to_save, DoRA, bias, tensors that are no factors, but for copies of base embeddings, which are
  skipped [code; that full ones which are no copies are refused is by reading].
- Names: `parse_fine_tuned_lora_name` takes names with and without `base_model.model.`, and nothing between lora_A and
  weight [code].
- Other types of PEFT's: their configs have no lora_alpha, which it asks for; AdaLoRA's names without `.weight`, and
  matrices between the factors (LoRA-XS, NLoRA), are refused [code].
- The config has no field for the invocation tokens of aLoRA, so that the adapter acts on every token [code].
"""

from __future__ import annotations

from rankflow.serving.engine import LINEAR_ONLY, Engine, Fate

ENGINE = Engine(
    "vllm",
    "peft",
    scale="config",
    rslora_experts=False,
    rows="at most r",
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    setting="--max-lora-rank",
    fates={
        **LINEAR_ONLY,
        "DoRA": Fate.REFUSED,
        "modules_to_save": Fate.REFUSED,
        "bias": Fate.REFUSED,
        "full embeddings": Fate.REFUSED,
        "norms": Fate.REFUSED,
        "other tensors": Fate.REFUSED,
    },
)
