"""Messages between processes, and errors that say which process does not answer and what for.

Every call begins with one small message from each, which says what it is about: the step, what is asked for, and how
long what follows is. Where these differ nobody goes on, so that nobody takes an answer for that to another question.
"""

from __future__ import annotations

import datetime
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rankflow.errors import ConfigError, DistributedError

VARIABLE = "RANKFLOW_TIMEOUT"
_DEFAULT = 60.0  # seconds
_HEAD = 256  # bytes of the first message: what it is about, then in the last 8 how long the next is


def grouped() -> bool:
    """Whether this process is one of a group that torch.distributed has made."""
    return dist.is_available() and dist.is_initialized()


def limit(seconds: float | None) -> float:
    """Seconds that a process waits for the others: `seconds`, or what the environment says, or 60.

    Raises:
        ConfigError: not a positive number of seconds.
    """
    given = os.environ.get(VARIABLE, _DEFAULT) if seconds is None else seconds
    try:
        found = float(given)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        where = VARIABLE if seconds is None else "timeout"
        raise ConfigError(f"{where}: {given!r} is not a number of seconds to wait for other processes")
    return found


class Wire:
    """Sends objects over a gloo group of its own, and sums over the group that gradients are reduced in.

    `about` is what its owner is at, for the others to compare and for whoever waits in vain to say.

    Raises:
        DistributedError: from every call: a process is gone, or at something else, or silent for longer than `seconds`.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.about = "attach"
        self._seconds = limit(seconds)
        with self._readable("the others to attach an adapter"):
            self._group: Any = dist.new_group(
                backend="gloo", timeout=datetime.timedelta(seconds=self._seconds), group_desc="rankflow"
            )

    def gather(self, what: str, message: Any) -> list[Any]:
        """The messages of all processes about `what`, in the order of ranks."""
        mine = pickle.dumps(message)
        lengths = self._meet(what, len(mine))
        longest = max(lengths)
        said = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8)
        with self._readable(what):
            dist.all_gather(said, padded, group=self._group)
        return [pickle.loads(t[:n].numpy().tobytes()) for t, n in zip(said, lengths, strict=True)]

    def broadcast(self, what: str, message: Any) -> Any:
        """The message of process 0."""
        mine = pickle.dumps(message)
        length = self._meet(what, len(mine))[0]
        if self.rank == 0:
            said = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        else:
            said = torch.empty(length, dtype=torch.uint8)
        with self._readable(what):
            dist.broadcast(said, src=0, group=self._group)
        return pickle.loads(said.numpy().tobytes())

    def sum(self, what: str, t: Tensor) -> Tensor:
        """Add `t` up over processes, in place."""
        self._meet_for(what, t)
        with self._readable(what):
            dist.all_reduce(t)
        return t

    def give(self, what: str, t: Tensor) -> None:
        """Copy process 0's `t` to all processes, in place."""
        self._meet_for(what, t)
        with self._readable(what):
            dist.broadcast(t, src=0)

    def meet(self, what: str) -> None:
        """Wait until all processes come to `what`, which is then done by other means."""
        self._meet(what, 0)

    def _meet_for(self, what: str, t: Tensor) -> None:
        lengths = self._meet(what, t.numel())
        if len(set(lengths)) > 1:
            raise DistributedError(f"{self.about}: {what}: processes have {lengths} numbers, which should be as many")

    def _meet(self, what: str, length: int) -> list[int]:
        """Check that all processes are at `what`. Returns the length of what each is about to say."""
        at = f"{self.about}: {what}"
        text = at.encode()[: _HEAD - 8].ljust(_HEAD - 8, b"\0")
        head = torch.frombuffer(bytearray(text + length.to_bytes(8, "little")), dtype=torch.uint8)
        heads = [torch.empty(_HEAD, dtype=torch.uint8) for _ in range(self.size)]
        with self._readable(what):
            dist.all_gather(heads, head, group=self._group)
        said = [t.numpy().tobytes() for t in heads]
        places = [each[:-8].rstrip(b"\0").decode(errors="replace") for each in said]
        if len(set(places)) > 1:
            listed = "; ".join(f"process {rank} is at {place}" for rank, place in enumerate(places))
            raise DistributedError(
                f"processes have parted: {listed}. Each has to make the same calls at the same steps, with as many "
                "batches"
            )
        return [int.from_bytes(each[-8:], "little") for each in said]

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            raise DistributedError(
                f"process {self.rank} waited for {what} ({self.about}), and another process has ended or does not "
                f"answer within {self._seconds:g} seconds; its own output says why. If it is only busy (evaluating, "
                f"saving, loading), give it longer: timeout=..., or {VARIABLE} in the environment "
                f"({str(e).splitlines()[0]})"
            ) from e
