"""The layout that a new adapter would have on a model, from the model's config alone: no weight is read or made."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from rankflow.adapters import Adapter
from rankflow.errors import ConfigError
from rankflow.plan import Layout


def blank_layout(folder: Path, target_modules: Sequence[str] | None, rank: int) -> Layout:
    """`target_modules` are PEFT's, all linears if None; every module starts at `rank`.

    Raises:
        ConfigError: the folder's config names no architecture that transformers has, or PEFT finds nothing to adapt.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"{folder}: no transformers model ({str(e).splitlines()[0]})") from None
    named = next(iter(config.architectures or ()), "AutoModel")
    cls = getattr(transformers, named, None)
    if cls is None:
        raise ConfigError(f"{folder}: transformers has no architecture {named!r}")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it has since renamed
            model = transformers.AutoModel.from_config(config) if named == "AutoModel" else cls(config)
            wanted = list(target_modules) if target_modules else "all-linear"
            return Adapter(get_peft_model(model, LoraConfig(r=rank, target_modules=wanted))).layout()  # type: ignore[arg-type]
    except ValueError as e:
        raise ConfigError(f"{folder}: PEFT cannot adapt {target_modules or 'it'}: {str(e).splitlines()[0]}") from None
