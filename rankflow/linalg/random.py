"""Random numbers of our own: the same on every process and after a resume, the global RNG never touched."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but `key`, e.g. (seed, step, module)."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
