"""Load config, tokenizer and model with transformers from a folder that may be a stranger's. Its code is never run.

`trust_remote_code` left out makes transformers ask on the terminal and, told yes, run what the folder holds; it asks
for nested parts of a model too, to which no argument of ours gets. So nothing here can ask, whatever is nested.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, dynamic_module_utils
from transformers.utils import logging as bars

from rankflow.errors import ConfigError, first_line
from rankflow.plans.names import shown

_MOST_PARTS = 10_000  # layers or experts of a model, each of which is built
_COUNTS = re.compile(r"(^|_)n(um)?_(\w+_)?(layer|block|expert)s?$|layers$|^depths?$")  # what fields of them are called


def load(cls: Any, source: str | Path, *, what: str = "", **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)` of one of transformers' auto classes; `what` it is, for messages.

    Raises:
        ConfigError: nothing that it loads, or nothing without code that came with it.
    """
    try:
        with _no_code(), _no_bars(), _tame_logs():
            return cls.from_pretrained(str(source), trust_remote_code=False, **options)
    except Exception as e:  # what a foreign reader makes of a stranger's files is its own affair
        what = what or f"{cls.__name__.removeprefix('Auto').lower()} that transformers loads"
        raise ConfigError(f"{source}: no {what} ({first_line(e)})") from None


def load_config(source: str | Path, **options: Any) -> Any:
    """Return a model's config, after a check that a model of its size can be built.

    Raises:
        ConfigError: as `load`; or a config of more layers or experts than any model has.
    """
    config = load(transformers.AutoConfig, source, **options)
    _check_counts(config.to_dict(), source)
    return config


def build(config: Any, source: str | Path) -> PreTrainedModel:
    """Return the model that a config describes, without the saved weights, on the default device.

    Raises:
        ConfigError: its architecture is none of transformers', or cannot be built.
    """
    cls = architecture(config, source)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # which would be downloaded
    try:
        with _no_code(), _tame_logs():
            if cls is None:
                return transformers.AutoModel.from_config(config, trust_remote_code=False)
            return cls(config)
    except Exception as e:
        raise ConfigError(f"{source}: transformers cannot build its model ({first_line(e)})") from None


def architecture(config: Any, source: str | Path) -> type[PreTrainedModel] | None:
    """Return the class of the model that a config names, or None.

    Raises:
        ConfigError: it names something else than a model of transformers.
    """
    named = config.architectures or None
    if named is None:
        return None
    first = named[0] if isinstance(named, list) else named
    try:
        found = getattr(transformers, first) if isinstance(first, str) else None
    except Exception:  # no such name, or one whose own imports fail
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel):
        raise ConfigError(f"{source}: transformers has no architecture {str(first)[:80]!r}")
    return found


def _check_counts(value: Any, source: str | Path, name: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_counts(inner, source, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_counts(inner, source, name)
    elif isinstance(value, int | float) and _COUNTS.search(name) and not value <= _MOST_PARTS:
        raise ConfigError(f"{source}: {name[:80]} is {value:.6g}; no model has more than {_MOST_PARTS:,}")


@contextmanager
def _no_code() -> Iterator[None]:
    """Make transformers raise an error where it would ask whether to run code."""
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # its own switch, for tests that nobody watches
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def _tame_logs() -> Iterator[None]:
    """Escape what transformers logs about a model, as every string from a file is escaped."""

    def tame(record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage(), lines=True), ()
        return True

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(tame)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(tame)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn transformers' progress bars off, as the caller has its own."""
    had = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            bars.enable_progress_bar()
