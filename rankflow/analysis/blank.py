"""The layout that a new adapter would have on a model, from the model's config alone: no weight is read or made."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from rankflow.errors import ConfigError, first_line
from rankflow.formats.io.pretrained import build, load_config
from rankflow.lora.adapter import Adapter
from rankflow.plans.plan import Layout


def blank_layout(folder: Path, target_modules: Sequence[str] | None, rank: int) -> Layout:
    """`target_modules` are PEFT's, all linears if None; every module starts at `rank`.

    Raises:
        ConfigError: the folder's config names no architecture that transformers has, or PEFT finds nothing to adapt.
    """
    config = load_config(folder, what="transformers model", local_files_only=True)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it has since renamed
        model = build(config, folder)
        wanted = list(target_modules) if target_modules else "all-linear"
        try:
            return Adapter(get_peft_model(model, LoraConfig(r=rank, target_modules=wanted))).layout()  # type: ignore[arg-type]
        except ValueError as e:
            raise ConfigError(f"{folder}: PEFT cannot adapt {target_modules or 'it'}: {first_line(e)}") from None
