"""What each engine that serves adapters does with them: the files it reads, how it scales, what it leaves out.

Where a fact is from, by its mark: [code] the engine's source was read; [reading] it follows from that source but was
not traced to the end; [thread] maintainers or users say so. Engines move: a fact is as of the middle of 2026.

vllm         `lora/peft_helper.py`, `lora/lora_model.py`, `config/lora.py`. One scale lora_alpha / r for all modules,
             over sqrt(r) with use_rslora; both patterns are dropped (`from_dict` keeps the fields it knows) [code]. r
             has to be at most max_lora_rank, one of the ranks below, 16 unless set; buffers have that many rows and
             take each tensor's own, so that one with more than r passes the check and fails in the copy [reading].
             Refused: modules_to_save, DoRA, bias, tensors that are no factors, but for copies of base embeddings, which
             are skipped [code; that full ones which are no copies are refused is by reading]. use_rslora is not heeded
             for experts (issue 55545) [thread].
sglang       `lora/lora_config.py`, `lora/lora.py`, `lora/mem_pool.py`. One scale lora_alpha / r; use_rslora is not
             read [code]. Every tensor has to have r rows, or the copy into its buffer fails [code]. q, k and v are
             joined: one starts from q, needs v, and puts zeros for k; up without gate is left over [code, of one
             version]. DoRA and added tokens are refused; target_modules has to be a list, or all-linear [code]. With
             --lora-page-rank-size 8 a rank takes whole pages of 8 (pull requests 31305, 36837) [thread].
lorax        `adapters/lora.py`, `utils/sgmv.py`. One scale lora_alpha / r, use_rslora heeded; A of one type of module
             is stacked over all layers, so ranks have to agree after padding (to 8, above that to multiples of 16),
             and a type that a layer lacks is left out everywhere [code]. r is overwritten by the padded rank while
             types are loaded one after the other, so that all but the first are scaled by the wrong one [reading].
             Kernels for ranks up to 128; what is no linear layer, magnitudes, biases and full tensors are not looked
             at [code].
tensorrt-llm `lora_manager.py`. lora_alpha over the tensor's own rank, its root with use_rslora; alpha_pattern is not
             read [code]. Before pull request 2366 the single r, and before issue 1668 no rsLoRA [thread].
             max_lora_rank is 64 unless set [code]. Where some of q, k and v are missing from the whole adapter, it
             puts zeros as wide as the model [code]. DoRA is loaded. LoRA of lm_head and of embeddings is skipped,
             other names are refused [code]; a full lm_head or embed_tokens counts while an engine is built, and not
             afterwards [reading].
llamacpp     `convert_lora_to_gguf.py`, `llama-adapter.h`. The converter keeps lora_alpha alone, and the runtime
             scales by it over the tensor's own rank, or by 1 if it is 0; use_rslora and alpha_pattern are lost
             [code]. What is no factor is refused, but for copies of base weights and norms, which are skipped [code].
diffusers    Alphas of a file, or the PEFT config in its header; without either 1, which versions before pull request
             14409 get wrong where ranks differ [thread]. `loaders/lora_pipeline.py` takes every `dora_scale` out of a
             file, `loaders/lora_conversion_utils.py` every `.diff_b` of FLUX and every `.diff` of a norm, with no more
             than a line in the log [code]. Modules of a text encoder are looked for by the names that the transformers
             at hand has for them (diffusers issue 13984) [thread]. Names of the models' own checkpoints, kohya's among
             them, are translated as a file is loaded, for U-Nets, FLUX, Wan, HunyuanVideo, LTX, Lumina, HiDream,
             Qwen-Image, Z-Image and others, but not for SD3, which then gets nothing [code].
comfyui      `weight_adapter/lora.py`, `lora.py`. A module's alpha over its rank, 1 without; headers are not read
             [code]. Of adapters' names in those of factors it knows `default` [code]. Knows `dora_scale` and no
             `lora_magnitude_vector`, nor biases of factors, and goes on without what it does not know, with a line in
             the log. CLIP's modules are `text_model.encoder.layers..` to it in every spelling (`model_lora_keys_clip`)
             [code].
peft         What it writes; all of it is heeded. Factors are looked for after `base_model.model.` alone; an adapter's
             name in theirs may be `default` (run with 0.21.2).

What acts otherwise than by factors, by field (`rankflow.formats.peft_fields` has them all): the invocation tokens of
aLoRA are read by llamacpp (`adapter.alora.invocation_tokens`, pull request 15327) [thread], and the configs of vllm,
sglang, lorax and tensorrt-llm have no such field, so that the adapter acts on every token [code]. No one but peft
stacks a base's layers anew (layer_replication) or ties what ensure_weight_tying ties [code for the configs; what
becomes of tensors of layers that are not there is by reading].

Names of tensors: vllm's `parse_fine_tuned_lora_name` takes names with and without `base_model.model.`, and nothing
between lora_A and weight [code]; so do llamacpp's converter and tensorrt-llm's pattern [reading]. lorax asks for
`base_model.model.` and gets no factor without [code]. What a wrapper of training left in a name is a module that no
engine has.

Nothing but peft loads what PEFT saves of other types than LORA (VeRA, LoHa, RandLoRA, ..) [code]: their configs have no
lora_alpha, which vllm, sglang, lorax and llamacpp's converter ask for, sglang asks for the type too, and tensorrt-llm
refuses names of tensors that it does not know. AdaLoRA has a lora_alpha, but names without `.weight`: vllm,
tensorrt-llm and llamacpp refuse them, sglang its type, and lorax finds no factor and serves the base alone [code]. An
r x r matrix between the factors (LoRA-XS, NLoRA) goes by the type LORA: vllm, tensorrt-llm and llamacpp refuse its
name, lorax and peft load A and B without it [code], and sglang takes whatever is not A for B [reading].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from rankflow.errors import ConfigError


class Fate(Enum):
    """Whether an engine says that it does not do what an adapter asks for."""

    REFUSED = "refused"
    SILENT = "silent"
    UNKNOWN = "not known"


# What of PEFT's is read here as the LoRA that it equals, and is none to an engine
ADALORA = "AdaLoRA's factors, which are named otherwise"
OTHER_TYPES = "adapters of a PEFT type other than LORA"
MIDDLE = "what stands between A and B"

# What acts otherwise than by A and B
ALORA = "the invocation tokens of an aLoRA"
REPLICATED = "layers stacked anew (layer_replication)"
TRAINED_ROWS = "single rows of embeddings (trainable_token_indices)"
TYING = "the tying of layers (ensure_weight_tying)"
MEGATRON = "Megatron's layers (megatron_config)"
DORA_SCALE = "DoRA's magnitudes (dora_scale)"
MAGNITUDE = "DoRA's magnitudes (lora_magnitude_vector)"
FLUX_BIASES = "FLUX's updates of biases (.diff_b)"
BIASES = "updates of biases (.diff_b)"
NORM_UPDATES = "updates of norms (.diff)"
FULL_UPDATES = "full updates (.diff)"

# What is in names, and goes as the file is written anew
WRAPPED = "modules under names that wrappers of training left (torch.compile, FSDP, DDP)"
NO_PREFIX = "factors whose names do not begin with base_model.model."
NAMED_ADAPTER = "factors with an adapter's name in theirs (lora_A.default.weight)"
OTHER_ADAPTER = "factors of an adapter that is not called default"
OTHER_NAMES = "modules under names that another library, or another version of it, gave them"
SD3_NAMES = "modules under the names of SD3's own checkpoint (joint_blocks)"


@dataclass(frozen=True)
class Stack:
    """Layers that an engine joins: one with any of `modules`, and none of `unless`, has to have all of `needs`."""

    modules: tuple[str, ...]
    needs: tuple[str, ...]
    otherwise: str
    fate: Fate
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """What one engine accepts.

    writes: the format that is written for it; "" keeps a source that it reads. reads: the formats it loads.
    scale: how it scales a module of a PEFT adapter: by its own alpha and rank, patterns heeded (`module`), by the
    config's lora_alpha and r (`config`), or by lora_alpha and the tensor's rank (`tensor`). rslora: if it heeds that.
    rows: how many a tensor may have: any number, at most r, exactly r, or one number for all modules of a type.
    ranks: the maximal ranks it can be set to, all if empty; above the last nothing is served. setting: what sets it.
    page: of how many ranks the pages are in which it may keep them; 0 if it has none. rslora_experts: as rslora, for
    the experts of a mixture.
    fates: what is not loaded, by the words of `rankflow.serving.check.FEATURES`. stacks: layers that it joins.
    every_layer: whether a type of module that one layer lacks is left out of all. library_names: whether it looks for
    modules by the names that the libraries at hand have for them.
    """

    name: str
    writes: str
    reads: tuple[str, ...] = ("peft",)
    scale: Literal["module", "config", "tensor"] = "module"
    rslora: bool = True
    rslora_experts: bool = True
    rows: Literal["any", "at most r", "r", "one a type"] = "any"
    ranks: tuple[int, ...] = ()
    setting: str = ""
    page: int = 0
    fates: Mapping[str, Fate] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    every_layer: bool = False
    library_names: bool = False

    @property
    def pads(self) -> bool:
        """Whether what is written for it has one rank, scale 1 and no patterns."""
        return self.writes == "peft" and self.scale != "module"

    @property
    def fills(self) -> bool:
        """Whether a module of rank 0 is written as zeros, since the engine wants it to be there."""
        return self.every_layer or bool(self.stacks)

    def scale_of(self, config: Mapping[str, Any], rank: int, *, expert: bool = False) -> float:
        """By what it multiplies B A of a module whose tensors have `rank`, with this PEFT config.

        Raises:
            ValueError: it takes each module's own.
        """
        if self.scale == "module":
            raise ValueError(self.name)
        over = config["r"] if self.scale == "config" else rank
        heeds = self.rslora and (self.rslora_experts or not expert)
        return config["lora_alpha"] / (math.sqrt(over) if heeds and config.get("use_rslora") else over)

    def unheeded(self, config: Mapping[str, Any], *, expert: bool = False) -> list[str]:
        """The settings of a PEFT config that would change scales and are not looked at."""
        dropped = {"config": ("rank_pattern", "alpha_pattern"), "tensor": ("alpha_pattern",), "module": ()}[self.scale]
        heeded = self.rslora and (self.rslora_experts or not expert)
        return [name for name in (*dropped, *([] if heeded else ["use_rslora"])) if config.get(name)]

    def room(self, most: int) -> int | None:
        """The rank that modules of at most `most` are given room for; None if no setting of the engine serves them."""
        return next((rank for rank in self.ranks if rank >= most), None) if self.ranks else most

    def rank_for(self, most: int) -> int:
        """The rank that modules of at most `most` are padded to.

        Raises:
            ConfigError: no setting of the engine serves so many.
        """
        room = self.room(most)
        if room is None:
            raise ConfigError(
                f"{self.name} serves ranks up to {self.ranks[-1]}, and the adapter has {most}; squeeze it, with "
                f"--max-rank {self.ranks[-1]} or a smaller target"
            )
        return room

    def hint(self, most: int) -> str:
        """How to start the engine for modules of at most that rank; empty where nothing is to be set."""
        if not self.setting:
            return ""
        hint = f"start {self.name} with {self.setting} {self.rank_for(most)} or more"
        if not self.page or most % self.page == 0:
            return hint
        return f"{hint}; in pages of {self.page} ranks it takes {-(-most // self.page) * self.page}"


_REFUSED, _SILENT, _UNKNOWN = Fate.REFUSED, Fate.SILENT, Fate.UNKNOWN
_SINGLE = ("kohya", "comfyui", "diffusers")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")  # multi-head latent attention, whose q is a module of its own
_PLAIN_ONLY = {
    ADALORA: _REFUSED,
    OTHER_TYPES: _REFUSED,
    MIDDLE: _REFUSED,
    NAMED_ADAPTER: _REFUSED,
    WRAPPED: _SILENT,
}
_OF_PEFT_ALONE = {
    ALORA: _SILENT,
    REPLICATED: _SILENT,
    TRAINED_ROWS: _REFUSED,
    TYING: _UNKNOWN,
    MEGATRON: _UNKNOWN,
}
_LINEAR_ONLY = {"convolutions": _REFUSED, "attention": _REFUSED, "experts": _UNKNOWN, **_PLAIN_ONLY, **_OF_PEFT_ALONE}

_ALL = (
    Engine(
        "vllm",
        "peft",
        scale="config",
        rslora_experts=False,
        rows="at most r",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        setting="--max-lora-rank",
        fates={
            **_LINEAR_ONLY,
            "DoRA": _REFUSED,
            "modules_to_save": _REFUSED,
            "bias": _REFUSED,
            "full embeddings": _REFUSED,
            "norms": _REFUSED,
            "other tensors": _REFUSED,
        },
    ),
    Engine(
        "sglang",
        "peft",
        scale="config",
        rslora=False,
        rows="r",
        setting="--max-lora-rank",
        page=8,
        fates={
            **_LINEAR_ONLY,
            MIDDLE: _UNKNOWN,
            NAMED_ADAPTER: _UNKNOWN,
            TRAINED_ROWS: _UNKNOWN,
            "DoRA": _REFUSED,
            "modules_to_save": _SILENT,
            "bias": _UNKNOWN,
            "full embeddings": _UNKNOWN,
            "norms": _UNKNOWN,
            "other tensors": _UNKNOWN,
            "target_modules as an expression": _REFUSED,
        },
        stacks=(
            Stack(("k_proj", "v_proj"), ("q_proj",), "joins q, k and v from q on, and leaves out the rest", _SILENT),
            Stack(("q_proj",), ("v_proj",), "joins q, k and v, and does not find v", _REFUSED, unless=_LATENT),
            Stack(("up_proj",), ("gate_proj",), "joins gate and up from gate on, and leaves out the rest", _SILENT),
        ),
    ),
    Engine(
        "lorax",
        "peft",
        scale="config",
        rows="one a type",
        ranks=(8, 16, 32, 64, 128),
        fates={
            "convolutions": _SILENT,
            "attention": _SILENT,
            "experts": _SILENT,
            "embeddings": _SILENT,
            ADALORA: _SILENT,
            OTHER_TYPES: _REFUSED,
            MIDDLE: _SILENT,
            NO_PREFIX: _SILENT,
            NAMED_ADAPTER: _SILENT,
            WRAPPED: _SILENT,
            **_OF_PEFT_ALONE,
            TRAINED_ROWS: _SILENT,
            "DoRA": _SILENT,
            "modules_to_save": _SILENT,
            "bias": _SILENT,
            "full embeddings": _SILENT,
            "norms": _SILENT,
            "other tensors": _SILENT,
        },
        every_layer=True,
    ),
    Engine(
        "tensorrt-llm",
        "peft",
        scale="tensor",
        setting="--max_lora_rank",
        fates={
            **_LINEAR_ONLY,
            "embeddings": _SILENT,
            "lm_head": _SILENT,
            "bias": _REFUSED,
            "modules_to_save": _UNKNOWN,
            "full embeddings": _UNKNOWN,
            "norms": _REFUSED,
            "other tensors": _REFUSED,
        },
        stacks=(
            Stack(
                ("q_proj", "k_proj", "v_proj"),
                ("q_proj", "k_proj", "v_proj"),
                "puts zeros as wide as the model for what is missing, which fits no model with fewer key heads",
                _UNKNOWN,
            ),
        ),
    ),
    Engine(
        "llamacpp",
        "gguf",
        scale="tensor",
        rslora=False,
        fates={
            "convolutions": _REFUSED,
            "attention": _REFUSED,
            "experts": _REFUSED,
            **_PLAIN_ONLY,
            **dict.fromkeys((REPLICATED, TYING, MEGATRON), _SILENT),
            TRAINED_ROWS: _REFUSED,
            "DoRA": _REFUSED,
            "modules_to_save": _REFUSED,
            "bias": _REFUSED,
            "full embeddings": _REFUSED,
            "norms": _SILENT,
            "other tensors": _REFUSED,
        },
    ),
    Engine(
        "diffusers",
        "diffusers",
        reads=_SINGLE,
        library_names=True,
        fates={
            WRAPPED: _SILENT,
            OTHER_ADAPTER: _SILENT,
            OTHER_NAMES: _UNKNOWN,
            SD3_NAMES: _SILENT,
            **dict.fromkeys((ALORA, REPLICATED, TYING, MEGATRON), _UNKNOWN),
            DORA_SCALE: _SILENT,
            FLUX_BIASES: _SILENT,
            BIASES: _UNKNOWN,
            NORM_UPDATES: _SILENT,
            FULL_UPDATES: _UNKNOWN,
            "other tensors": _UNKNOWN,
        },
    ),
    Engine(
        "comfyui",
        "",
        reads=_SINGLE,
        fates={
            WRAPPED: _SILENT,
            OTHER_NAMES: _SILENT,
            OTHER_ADAPTER: _SILENT,
            **dict.fromkeys((ALORA, REPLICATED, TYING, MEGATRON, MAGNITUDE, "bias"), _SILENT),
            "other tensors": _UNKNOWN,
        },
    ),
    Engine("peft", "peft", fates=dict.fromkeys((MIDDLE, WRAPPED, NO_PREFIX, OTHER_ADAPTER), _SILENT)),
)
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in _ALL}


def engine_named(name: str) -> Engine:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
    return ENGINES[name]
