"""What a file system is asked for beyond reading and writing: that things are on disk for good, locks, and which file
is which. Some (Lustre, NFS, FUSE, SMB) have no locks, or nothing to sync a folder with; there, writing goes on."""

from __future__ import annotations

import errno
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# What is said where a file system does not have a thing; EBADF: NFS, of locks on what is open for reading
NOT_TO_BE_HAD = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
Identity = tuple[int, int]


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk.

    Windows syncs no folder, and a file only where it is open for writing.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    writable = not folder and os.access(path, os.W_OK)
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | getattr(os, "O_BINARY", 0))
    try:
        sync_open(fd, path, folder=folder)
    finally:
        os.close(fd)


def sync_open(fd: int, path: Path, *, folder: bool = False) -> None:
    """Do what `sync` does for an open file or folder. If the file system cannot sync files, warn once that a power cut
    may undo their content."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NOT_TO_BE_HAD:
            raise
        if not folder and stat.S_ISREG(os.fstat(fd).st_mode):  # not a device or a pipe
            message = f"{path.parent}: this file system cannot sync files ({e.strerror}); a power cut may lose the last"
            warnings.warn(message, stacklevel=2)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that do not exist, and wait until each is on disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock in the block. It ends with the process, however that ends. Yield False if the file system has no
    locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    if sys.platform == "win32":
        yield False
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        yield _lock(fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in NOT_TO_BE_HAD | {errno.EBADF}:
            raise
        return False
    return True


def identity(path: Path) -> Identity | None:
    """Return an identity that all names of one file share (links, hard links, mounts), or None if it has none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
