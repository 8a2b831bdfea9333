"""One file an engine that serves adapters: its record `ENGINE`, and where each fact in it is from.

The marks of facts: [code] the engine's source was read; [reading] it follows from that source but was not traced to the
end; [thread] maintainers or users say so. Engines move: a fact is as of the middle of 2026.

No engine but peft stacks a base's layers anew (layer_replication) or ties what ensure_weight_tying ties [code for the
configs; what becomes of tensors of layers that are not there is by reading]. None but peft loads what PEFT saves of
other types than LORA (VeRA, LoHa, RandLoRA, ..) [code]. What a wrapper of training left in a name is a module that no
engine has. `rankflow.formats.peft_fields` lists all fields of PEFT's config.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from rankflow.errors import ConfigError
from rankflow.serving.engine import Engine


@cache
def engines() -> Mapping[str, Engine]:
    """Name -> record of every engine that has a file in this folder."""
    files = (importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__))
    return {file.ENGINE.name: file.ENGINE for file in files}


def engine_named(name: str) -> Engine:
    """The record of an engine.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in engines():
        raise ConfigError(f"no engine is called {name!r}; there are {', '.join(engines())}")
    return engines()[name]
