"""One job is one run and one line of a results file; a line is found again by a hash of all that determines it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison.arms import ARMS, PROTOCOL
from comparison.settings import SETTINGS, Setting

TASK_VERSION = 1  # goes up when texts, splits or masks change

Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """`rank`: mean rank at the end. `rate`: the adapter's learning rate."""

    task: str
    arm: str
    rank: int
    rate: float
    seed: int
    steps: int

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.task]

    @property
    def protocol(self) -> dict[str, Any]:
        return {**PROTOCOL, **self.setting.protocol}

    @property
    def params(self) -> int:
        return self.rank * self.setting.per_rank

    @property
    def settings(self) -> dict[str, Any]:
        return ARMS[self.arm].settings(self.rank, self.params)

    @property
    def digest(self) -> str:
        """Of the whole configuration: a job whose policy file, protocol or task has changed is another job."""
        arm = ARMS[self.arm]
        whole = [
            asdict(self),
            self.protocol,
            [arm.kind, arm.start_rank(self.rank), arm.version, TASK_VERSION],
            self.settings,
            *arm.special,
        ]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.task} {self.arm} rank {self.rank} lr {self.rate:g} seed {self.seed} steps {self.steps}"


class Results:
    """The lines of a folder's `*.jsonl`, by digest. Every line is written whole and synced, so that several processes
    may append and a torn last line, of one that was killed, costs that line only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: dict[str, Line] = {}
        self.reload()

    def reload(self) -> None:
        self.lines = {line["digest"]: line for path in sorted(self.folder.glob("*.jsonl")) for line in _read(path)}

    def of(self, job: Job) -> Line | None:
        return self.lines.get(job.digest) if ARMS[job.arm].available else None

    def append(self, job: Job, **fields: Any) -> None:
        line = {"digest": job.digest, **asdict(job), **fields}
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / f"{job.task}.jsonl", line)
        self.lines[job.digest] = line


def append_line(path: Path, line: Line) -> None:
    """In one call, on a line of its own even after a torn one."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, (b"\n" if torn else b"") + json.dumps(line, allow_nan=False).encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> Iterator[Line]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn: the job is simply missing
        if isinstance(line, dict) and "digest" in line:
            yield line
