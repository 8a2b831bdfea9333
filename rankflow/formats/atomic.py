"""Files and folders that are never half there: written beside their place, and put into it once they are on disk.

Whatever happens, a full disk or a killed process, at the place itself there is what was there before, or the new one
whole. What a killed process leaves is a hidden `.<name>.<8 hex digits>.part` beside it, which the next one that writes
to that place takes away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into; it takes `out`'s name when the block ends well, else it is removed.

    An earlier `out` is there until the moment the new one is whole and on disk. Where the system cannot exchange two
    folders in one step (Linux can, on its own file systems), there is a moment between two renames without either.
    """
    out = out.resolve()  # a link stays, and what it leads to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(out, "")
    partial.mkdir()
    try:
        with _held(partial):
            yield partial
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            if out.exists():
                _replace_folder(partial, out)
            else:
                partial.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or what was there before


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A new file beside `out` to write; it takes `out`'s name, whole and on disk, when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(out, out.suffix)
    partial.touch()
    try:
        with _held(partial):
            yield partial
            _sync(partial)
            partial.replace(out)
        _sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)


def _beside(out: Path, suffix: str) -> Path:
    """The name of a new file or folder that is to become `out`; what killed processes left of such ones is removed."""
    stem = out.name.removesuffix(suffix) if suffix else out.name
    ours = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.part{re.escape(suffix)}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _held(left):  # not of a process that is still at it
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return out.with_name(f".{stem}.{uuid.uuid4().hex[:8]}.part{suffix}")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock that ends with the process, whatever ends that.

    Raises:
        OSError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _replace_folder(new: Path, old: Path) -> None:
    """`old` becomes `new`; what it was is then called `new`, to be removed."""
    if _exchange(new, old):
        return
    retired = new.with_name(f"{new.stem}.old")
    old.rename(retired)
    try:
        new.rename(old)
    except BaseException:
        retired.rename(old)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be had.

    Raises:
        OSError: it failed for a reason of its own.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
