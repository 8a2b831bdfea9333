"""Random numbers keyed by their use: the same on every process and after a resume; global state stays as it is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def keyed_generator(*key: object) -> torch.Generator:
    """Return a CPU generator that depends on nothing but `key`, e.g. (seed, step, module)."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def own_random_numbers(*key: object) -> Iterator[None]:
    """Seed the global random state of torch, CUDA, Python and numpy by `key` in the block, then restore it."""
    # Data collators draw from numpy's global state, so that is the one to keep.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        seed = int(torch.randint(2**31, (), generator=keyed_generator(*key, "study")))
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
