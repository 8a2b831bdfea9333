"""Every way that single files spell the factors of a module."""

from __future__ import annotations

import re
from typing import NamedTuple

_FACTORS = (
    re.compile(r"^(?P<stem>.+)\.lora_(?P<part>down|up|mid)\.weight$"),
    re.compile(r"^(?P<stem>.+)\.lora_(?P<part>A|B)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$"),
    re.compile(r"^(?P<stem>.+?)(?P<style>_lora|\.lora|\.lora_linear_layer)\.(?P<part>down|up)\.weight$"),
)
_PARTS = {"A": "down", "B": "up"}


class Factor(NamedTuple):
    """What a key says: the module's part of it, which factor it is, and whether in the style of `to_q_lora.up`."""

    stem: str
    part: str  # down, up or mid
    old: bool


def factor_of(key: str) -> Factor | None:
    for pattern in _FACTORS:
        if found := pattern.match(key):
            part = found["part"]
            return Factor(found["stem"], _PARTS.get(part, part), found.groupdict().get("style") == "_lora")
    return None
