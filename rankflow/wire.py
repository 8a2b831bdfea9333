"""What processes tell one another, and what is said when one of them does not answer."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch import distributed as dist

from rankflow.errors import DistributedError

_TIMEOUT = datetime.timedelta(minutes=5)  # one process may evaluate or save while the others wait


class Wire:
    """Objects go over a gloo group of their own, sums over the group that gradients are reduced in.

    Raises:
        DistributedError: from every call: one of them is gone, or silent for too long.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def gather(self, message: Any) -> list[Any]:
        """What each said, in every process."""
        said: list[Any] = [None] * self.size
        with _readable():
            dist.all_gather_object(said, message, group=self._group)
        return said

    def broadcast(self, message: Any) -> Any:
        """What process 0 said."""
        said = [message]
        with _readable():
            dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def sum(self, t: Tensor) -> Tensor:
        """In place, over processes."""
        with _readable():
            dist.all_reduce(t)
        return t

    def give(self, t: Tensor) -> None:
        """Process 0's `t`, in place, to all."""
        with _readable():
            dist.broadcast(t, src=0)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise DistributedError(
            f"another process has ended or does not answer; its own output says why ({str(e).splitlines()[0]})"
        ) from e
