"""Read JSON from strangers: refuse keys that stand twice, deep nesting, NaN and infinities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

_DEEPEST = 64
_LARGEST = 1 << 26  # bytes of a file that says what others are


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: it is not text, or is larger than any such file.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{size:,} bytes, of at most {_LARGEST:,}")
    return path.read_text(encoding="utf-8")


def strict_loads(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: it is not JSON, has a key twice in one object, NaN or an infinity, or is nested too deeply to be
            written again.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(data, _DEEPEST)
    return data


def strict_object(text: str | bytes) -> dict[str, Any]:
    """Do what `strict_loads` does, for JSON that has to be an object.

    Raises:
        ValueError: as `strict_loads`, or it is something else.
    """
    data = strict_loads(text)
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:80]!r} stands twice")
        found[key] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is too large a number")
    return value


def _check_depth(data: Any, left: int) -> None:
    if left == 0:
        raise ValueError("nested too deeply")
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            _check_depth(value, left - 1)
