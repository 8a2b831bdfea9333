"""What SGLang does with an adapter.

Read: `lora/lora_config.py`, `lora/lora.py`, `lora/mem_pool.py`.

- One scale lora_alpha / r; use_rslora is not read [code].
- Every tensor has to have r rows, or the copy into its buffer fails [code]. With --lora-page-rank-size 8 a rank takes
  whole pages of 8 (pull requests 31305, 36837) [thread].
- q, k and v are joined: one starts from q, needs v, and puts zeros for k; up without gate is left over [code, of one
  version].
- DoRA and added tokens are refused; target_modules has to be a list, or all-linear [code].
- Other types of PEFT's: it asks for lora_alpha and for the type LORA [code]. Matrices between the factors (LoRA-XS,
  NLoRA) go by that type, and whatever is not A it takes for B [reading].
- The config has no field for the invocation tokens of aLoRA, so that the adapter acts on every token [code].
"""

from __future__ import annotations

from rankflow.serving.engine import LINEAR_ONLY, Engine, Fate, Stack
from rankflow.serving.features import MIDDLE, NAMED_ADAPTER, TRAINED_ROWS

_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")  # multi-head latent attention, whose q is a module of its own

ENGINE = Engine(
    "sglang",
    "peft",
    scale="config",
    rslora=False,
    rows="r",
    setting="--max-lora-rank",
    page=8,
    fates={
        **LINEAR_ONLY,
        MIDDLE: Fate.UNKNOWN,
        NAMED_ADAPTER: Fate.UNKNOWN,
        TRAINED_ROWS: Fate.UNKNOWN,
        "DoRA": Fate.REFUSED,
        "modules_to_save": Fate.SILENT,
        "bias": Fate.UNKNOWN,
        "full embeddings": Fate.UNKNOWN,
        "norms": Fate.UNKNOWN,
        "other tensors": Fate.UNKNOWN,
        "target_modules as an expression": Fate.REFUSED,
    },
    stacks=(
        Stack(("k_proj", "v_proj"), ("q_proj",), "joins q, k and v from q on, and leaves out the rest", Fate.SILENT),
        Stack(("q_proj",), ("v_proj",), "joins q, k and v, and does not find v", Fate.REFUSED, unless=_LATENT),
        Stack(("up_proj",), ("gate_proj",), "joins gate and up from gate on, and leaves out the rest", Fate.SILENT),
    ),
)
