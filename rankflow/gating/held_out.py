"""Held-out batches, one after the other, pass after pass; the position is two numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rankflow.errors import ConfigError
from rankflow.linalg.random import own_random_numbers


class HeldOut:
    """Batches for gates that are trained on data which the factors never see.

    Shuffling and collating draw from random numbers of their own, keyed by (seed, pass, batch), so that a run resumed
    from `position` sees what an uninterrupted one does and the global random state is never touched.
    """

    def __init__(self, batches: Iterable[Any], seed: int):
        self.seed = seed
        self._batches = batches
        self._iterator: Iterator[Any] | None = None
        self._pass, self._index = 0, 0
        self._skipped = 0  # batches from there on that are not to be seen again

    @property
    def position(self) -> list[int]:
        """[pass, batch] of the next batch."""
        return [self._pass, self._index + self._skipped]

    @position.setter
    def position(self, at: list[int]) -> None:
        self._pass, self._index, self._iterator, self._skipped = at[0], 0, None, at[1]

    def take(self) -> Any:
        """Return the next batch.

        Raises:
            ConfigError: there are none.
        """
        while self._skipped:
            self._next()
            self._skipped -= 1
        return self._next()

    def _next(self) -> Any:
        for _ in range(2):
            with own_random_numbers(self.seed, self._pass, self._index, "held-out"):
                if self._iterator is None:
                    self._iterator = iter(self._batches)
                batch = next(self._iterator, None)
            if batch is not None:
                self._index += 1
                return batch
            self._pass, self._index, self._iterator = self._pass + 1, 0, None
        raise ConfigError(
            "outer_batches holds no batch; give a list or a DataLoader of held-out training data, which can be "
            "iterated more than once"
        )
