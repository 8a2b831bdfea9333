"""Every field of PEFT's LoRA config, by what it says: of the tensors, of the training, or of what the adapter does.

Formats without such a config lose what a field says, and engines heed some fields and drop others. So each has its
place here; one that has none is of a PEFT that came later, and nobody knows what is lost with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankflow.formats.peft_config import VARIANTS

# Read into ranks, scales and names, or refused (PEFT 0.21.2, `tuners/lora/config.py`)
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "init_lora_weights",
    "fan_in_fan_out",
    *VARIANTS,
)
# How the adapter was made and where from, or what means something beside another field alone; tensors are the same
HARMLESS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # nothing is dropped but in training
    "layers_to_transform",  # the tensors tell
    "layers_pattern",
    "megatron_core",  # a module's name, for megatron_config
    "loftq_config",  # starts of training from here on
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",  # for use_qalora
    "runtime_config",  # never saved
    "merge_weights",  # of PEFT 0.1 and 0.2: merging while evaluating
    "enable_lora",  # of PEFT 0.1 and 0.2, read or refused with its tensors
    # AdaLoRA's, which is a LoRA config with more
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
)
# What the adapter does otherwise where the field is set. `True`: tensors beside the factors go with it
ACTS: Mapping[str, bool] = {
    "bias": True,
    "lora_bias": True,
    "use_dora": True,
    "modules_to_save": True,
    "trainable_token_indices": True,
    "alora_invocation_tokens": False,  # acts from the last of these tokens on, and not before
    "layer_replication": False,  # is for a base whose layers are stacked anew
    "ensure_weight_tying": False,  # acts on what is tied to its modules too
    "megatron_config": False,  # is for Megatron's parallel layers
}


def is_set(value: object) -> bool:
    """Return whether a field has a value that asks for something."""
    return bool(value) and value != "none"


def acting(config: Mapping[str, Any]) -> list[str]:
    """The fields of a config that make its adapter do something that no tensor tells."""
    return [field for field, told in ACTS.items() if not told and is_set(config.get(field))]


def unknown(config: Mapping[str, Any]) -> list[str]:
    """The fields that are set and of which nothing is known here."""
    return sorted(f for f, value in config.items() if is_set(value) and f not in (*READ, *HARMLESS, *ACTS))
