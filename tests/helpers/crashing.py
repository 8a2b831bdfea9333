"""Disks that fill up and processes that are killed, at every call that writes: `python tests/helpers/crashing.py`
kills.

Each trial is a process of its own, forked from one that has everything imported, so that a hundred take seconds.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from whole_files import READERS, put

from rankflow import squeeze
from rankflow.formats.io import atomic

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where syncing costs nothing
Tick = Callable[[], None]


class _Counted:
    """A file whose every write is counted."""

    def __init__(self, file: Any, tick: Tick):
        self._file, self._tick = file, tick

    def write(self, data: Any) -> int:
        self._tick()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Counted:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._file.__exit__(*error)


@contextlib.contextmanager
def ticking(tick: Tick) -> Iterator[None]:
    """`tick` is called before everything that changes the disk, but for taking things away."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            return function(*args, **kwargs)

        return call

    opened = io.open

    def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return opened(file, mode, *args, **kwargs)
        tick()
        return _Counted(opened(file, mode, *args, **kwargs), tick)

    with contextlib.ExitStack() as patched:
        for name in ("fsync", "replace", "rename", "mkdir", "write"):
            patched.enter_context(mock.patch.object(os, name, counted(getattr(os, name))))
        for name in ("_exchange", "_put_new"):
            patched.enter_context(mock.patch.object(atomic, name, counted(getattr(atomic, name))))
        patched.enter_context(mock.patch.object(io, "open", opening))
        patched.enter_context(mock.patch.object(builtins, "open", opening))
        yield


def tree(folder: Path, *, hidden: bool = True) -> dict[str, str]:
    """Path -> digest, of everything there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if hidden or not name.startswith("."):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


# -- killed ---------------------------------------------------------------------------------------------------------


def _settle(threads: int) -> None:
    """Wait for threads that are about to end: a process forked off meanwhile may inherit a lock that one of them held
    (MKL's allocator has such) and nobody lets go of."""
    until = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < until:
        time.sleep(0.0002)


def _trial(work: Callable[[], object], die: Callable[[], contextlib.AbstractContextManager[None]] | float) -> bool:
    """Whether a process that does `work` was killed: from within, or after so many seconds."""
    child = os.fork()
    if child == 0:
        with contextlib.nullcontext() if isinstance(die, float) else die():
            work()
        os._exit(0)
    if isinstance(die, float):
        time.sleep(die)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _dying(at: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Killed at the call of that number."""

    def start() -> contextlib.AbstractContextManager[None]:
        calls = iter(range(10**9))

        def tick() -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        return ticking(tick)

    return start


class Job(NamedTuple):
    """A squeeze to be killed: the reader of its source, its output, and a residual's name if it keeps one."""

    reader: str
    out: str
    residual: str | None = None
    to: str | None = None


JOBS = {
    "peft": Job("peft", "out"),
    "bin": Job("bin", "out"),
    "kohya": Job("kohya", "out.safetensors"),
    "gguf": Job("gguf", "out.gguf", to="gguf"),
    "residual": Job("mixed", "out", residual="residual.safetensors"),
}


def killed(name: str, *, exchange: bool, trials: int, seed: int) -> tuple[list[str], int]:
    """What was wrong after squeezes were killed at every call, and at `trials` moments; and how often they were."""
    job, problems, times = JOBS[name], [], 0
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY) as folder:
        src = put(Path(folder) / "src", READERS[job.reader]())
        outs = Path(folder) / "outs"
        source = src if (src / "adapter_config.json").is_file() else next(src.iterdir())
        out = outs / job.out

        def write(rank: int, **options: Any) -> None:
            base = src / "base" if job.to == "gguf" else None
            residual = None if job.residual is None else outs / job.residual
            squeeze(source, out, target_rank=rank, keep_residual=residual, to_format=job.to, base=base, **options)

        def work() -> None:
            write(3, force=True)

        threads = len(os.listdir("/proc/self/task"))
        outs.mkdir()
        results = []
        for rank in (2, 3):
            write(rank, force=True)
            results.append(tree(outs))
        old, new = results

        def check(when: str, had: bool) -> None:
            before = old if had else {}
            found = tree(outs, hidden=False)
            # Between two renames: the new residual is there, and what it is of not yet
            between = before | {job.residual: new[job.residual]} if job.residual else before
            if found not in (before, between, new):
                problems.append(f"{name}, killed {when}: {sorted(found)} is neither the old output nor the new one")
            known = {job.out, job.residual}
            left = [path.name for path in outs.iterdir() if path.name not in known]
            if not all(part.startswith((f".{out.stem}.", ".residual.")) for part in left):
                problems.append(f"{name}, killed {when}: left {left}")
            work()  # what a killed one left is no hindrance, and does not stay
            if tree(outs) != new:
                problems.append(f"{name}, killed {when}: afterwards there is {sorted(tree(outs))}")

        def prepare(had: bool) -> None:
            shutil.rmtree(outs)
            outs.mkdir()
            if had:
                write(2)
            _settle(threads)

        patch = contextlib.nullcontext() if exchange else mock.patch.object(atomic, "_exchange", return_value=False)
        with patch:
            for had in (False, True):
                for at in range(10**6):
                    prepare(had)
                    if not _trial(work, _dying(at)):
                        break
                    times += 1
                    check(f"at call {at}, {'replacing' if had else 'new'}", had)
                for _ in range(trials):
                    prepare(had)
                    moment = rng.uniform(0, 0.06)
                    times += _trial(work, moment)
                    check(f"after {moment:.4f} s, {'replacing' if had else 'new'}", had)
    return problems, times


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--jobs", nargs="*", default=list(JOBS))
    options.add_argument("--trials", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    wrong = []
    for job in given.jobs:
        problems, times = killed(job, exchange=True, trials=given.trials, seed=given.seed)
        print(f"{job}: killed {times} times")
        wrong += problems
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
