"""One file an engine that serves adapters: its record `ENGINE`, and where each fact in it is from.

The marks of facts: [code] the engine's source was read; [reading] it follows from that source but was not traced to the
end; [thread] maintainers or users say so. Engines move: a fact is as of the middle of 2026.

No engine but peft stacks a base's layers anew (layer_replication) or ties what ensure_weight_tying ties [code for the
configs; what becomes of tensors of layers that are not there is by reading]. None but peft loads what PEFT saves of
other types than LORA (VeRA, LoHa, RandLoRA, ..) [code]. What a wrapper of training left in a name is a module that no
engine has. `rankflow.formats.peft_fields` lists all fields of PEFT's config.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from rankflow.errors import ConfigError
from rankflow.plugins import Plugins, files_of
from rankflow.serving.engine import Engine


@cache
def engines() -> Mapping[str, Engine]:
    """Name -> record of every engine that has a file in this folder."""
    return {file.ENGINE.name: file.ENGINE for file in files_of(sys.modules[__name__])}


def engine_names() -> list[str]:
    """The engines that `engine_named` knows: those of this folder, and those that were added to them."""
    return [*engines(), *_ADDED.names()]


def engine_named(name: str) -> Engine:
    """The record of an engine.

    Raises:
        ConfigError: there is none of that name, or the package that adds it cannot be imported.
    """
    if name in engines():
        _ADDED.refuse_clash(name)
        return engines()[name]
    if name not in _ADDED.names():
        raise ConfigError(f"no engine is called {name!r}; there are {', '.join(engine_names())}")
    return _ADDED.load(name)


def register_engine(engine: Engine) -> None:
    """Add an engine for as long as this process lives.

    Raises:
        ConfigError: its name is taken.
    """
    _ADDED.register(engine.name, engine)


def _check_added(name: str, found: Any) -> None:
    if not isinstance(found, Engine) or found.name != name:
        raise ConfigError(f"this must be an Engine that is called {name}")


_ADDED = Plugins("rankflow.engines", engines, _check_added)
