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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Together:
    """Outputs that take their names one right after the other; made by `together`."""

    def __init__(self, held: ExitStack):
        self._held = held
        self._outputs: list[tuple[Path, Path]] = []

    def begin(self, partial: Path, out: Path) -> None:
        """`partial`, which is there, is to become `out`; if it does not, it is removed."""
        self._held.callback(_remove, partial)
        self._held.enter_context(_locked(partial))
        self._outputs.append((partial, out))

    def commit(self) -> None:
        with ExitStack() as undo:
            for partial, out in self._outputs:
                if partial.is_file() and (partial, out) == self._outputs[-1]:
                    partial.replace(out)  # in one step everywhere, and nothing after it makes it be undone
                else:
                    undo.callback(_take_place(partial, out, self._held))
            undo.pop_all()
        for _, out in self._outputs:
            _sync(out.parent)


@contextmanager
def together() -> Iterator[Together]:
    """Outputs of which all appear, or none: they take their names when the block ends, in the order they were begun.

    All of them are whole and on disk by then. If one cannot take its name, those before it give theirs back to what was
    there. What remains possible: a process that is killed between two of these renames, or a disk that fails the second
    and the way back as well, leaves the earlier ones new and the later ones as they were. Each is whole all the same.
    """
    with ExitStack() as held:
        group = Together(held)
        yield group
        group.commit()


@contextmanager
def atomic_folder(out: Path, group: Together | None = None) -> Iterator[Path]:
    """A new folder beside `out` to write into; it takes `out`'s name when the block ends well, else it is removed.

    An earlier `out` is there until the moment the new one is whole and on disk. Where the system cannot exchange two
    folders in one step (Linux can, on its own file systems), there is a moment between two renames without either.

    Args:
        group: other outputs; the name is taken when all of them are whole.
    """
    with nullcontext(group) if group is not None else together() as outputs:
        out = out.resolve()  # a link stays, and what it leads to is replaced
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(out, "")
        partial.mkdir()
        outputs.begin(partial, out)
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)


@contextmanager
def atomic_file(out: Path, group: Together | None = None) -> Iterator[Path]:
    """A new file beside `out` to write; it takes `out`'s name, whole and on disk, when the block ends well.

    Args:
        group: as for `atomic_folder`.
    """
    with nullcontext(group) if group is not None else together() as outputs:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(out, out.suffix)
        partial.touch()
        outputs.begin(partial, out)
        yield partial
        _sync(partial)


def _beside(out: Path, suffix: str) -> Path:
    """The name of a new file or folder that is to become `out`; what killed processes left of such ones is removed."""
    stem = out.name.removesuffix(suffix) if suffix else out.name
    ours = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.part{re.escape(suffix)}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _locked(left):  # not of a process that is still at it
            _remove(left)
    return out.with_name(f".{stem}.{uuid.uuid4().hex[:8]}.part{suffix}")


def _remove(path: Path) -> None:
    """Whatever it is, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
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


def _take_place(new: Path, old: Path, held: ExitStack) -> Callable[[], object]:
    """`new` takes the name of `old`; what undoes it. What `old` was is then called `new`, or goes with what is held."""
    if not old.exists():
        new.rename(old)
        return lambda: old.rename(new)
    if _exchange(new, old):
        return lambda: _exchange(new, old)
    retired = new.with_name(f"{new.stem}.old")
    old.rename(retired)
    try:
        new.rename(old)
    except BaseException:
        retired.rename(old)
        raise
    held.callback(_remove, retired)

    def back() -> None:
        old.rename(new)
        retired.rename(old)

    return back


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
