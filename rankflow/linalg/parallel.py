"""Run many small independent jobs, one torch thread each, and find a device to compute on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from rankflow.errors import ConfigError, first_line

Progress = Callable[[int, int], None]  # (modules done, modules in all)
T = TypeVar("T")


class Pool:
    """Run a function on many modules at once, a thread for each, with one torch thread an operation.

    Threads inside such small factorisations only get into each other's way.
    """

    def __init__(self, progress: Progress | None, total: int):
        self._progress = progress or (lambda done, total: None)
        self._total = total
        self._done = 0

    def each(self, work: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
        """Return the results by name, in the order of `names`. The first failure stops everything that has not
        begun."""
        return self.together(lambda group: [work(name) for name in group], [(name,) for name in names])

    def together(self, work: Callable[[Sequence[str]], Sequence[T]], groups: Iterable[Sequence[str]]) -> dict[str, T]:
        """Return what `each` returns, of modules that are worked on in groups."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = {pool.submit(work, group): group for group in groups}
            for future in as_completed(futures):
                future.result()
                self._done += len(futures[future])
                self._progress(self._done, self._total)
            return {n: one for future, group in futures.items() for n, one in zip(group, future.result(), strict=True)}
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def usable(device: str) -> torch.device:
    """Return the device of that name, after a test that it can hold and read float64 numbers.

    Raises:
        ConfigError: it is none, or is not there.
    """
    try:
        torch.zeros(1, device=device, dtype=torch.float64).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise ConfigError(f"device {device!r} cannot be used: {first_line(e)}") from None
