"""Many small independent jobs, one torch thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Progress = Callable[[int, int], None]  # (modules done, modules in all)
T = TypeVar("T")


class Crew:
    """Work spread over modules: one thread each, every torch operation on one.

    Threads inside such small factorisations only get into each other's way.
    """

    def __init__(self, progress: Progress | None, total: int):
        self._progress = progress or (lambda done, total: None)
        self._total = total
        self._done = 0

    def each(self, work: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
        """Results by name, in the order of `names`; the first failure stops everything not yet begun."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = {name: pool.submit(work, name) for name in names}
            for future in as_completed(futures.values()):
                future.result()
                self._done += 1
                self._progress(self._done, self._total)
            return {name: future.result() for name, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
