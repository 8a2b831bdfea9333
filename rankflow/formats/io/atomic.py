"""Write files and folders beside their place, and move them into it once they are whole and on disk.

Whatever happens, a full disk or a killed process, at the place itself there is what was there before, or the new one
whole. What a killed process leaves is a hidden `.<name>.<8 hex digits>.part` beside it, which the next one that writes
to that place takes away. What was there when writing began gives way, and hands on its mode and owner; where nothing
was, what has come meanwhile stays. A link is followed. What is no file, a device or a pipe, is written to as it is,
once all else is in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from rankflow.errors import ConfigError
from rankflow.formats.io.disk import NOT_TO_BE_HAD, locked, make_folder, sync

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_LONGEST_STEM = 50  # characters, so that the name of a part is none too long where that of the output is not


class Together:
    """Outputs that appear all at once or not at all; made by `together`."""

    def __init__(self, held: ExitStack):
        self._held = held
        self._outputs: list[tuple[Path, Path, bool]] = []  # (partial, out, whether that was there)
        self._plain: list[tuple[Path, Path]] = []

    def begin(self, partial: Path, out: Path) -> None:
        """Begin an output: `partial`, which exists, will become `out`, or is removed."""
        self._held.callback(_remove, partial)
        self._held.enter_context(locked(partial))
        self._outputs.append((partial, out, os.path.lexists(out)))

    def begin_plain(self, out: Path) -> Path:
        """Begin an output whose content will be written to `out`, a device or a pipe."""
        partial = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="rankflow-"))) / f"out{out.suffix}"
        self._plain.append((partial, out))
        return partial

    def commit(self) -> None:
        with ExitStack() as undo:
            for i, (partial, out, there) in enumerate(self._outputs):
                if partial.is_file() and i == len(self._outputs) - 1:  # in one step, and nothing after it undoes it
                    partial.replace(out) if there else _put_new(partial, out)
                else:
                    undo.callback(_take_place(partial, out, there, self._held))
            undo.pop_all()
        for _, out, _ in self._outputs:
            sync(out.parent)
        for partial, out in self._plain:
            _pour(partial, out)


@contextmanager
def together() -> Iterator[Together]:
    """Make all outputs of a block appear, or none. They take their names when the block ends, in the order they were
    begun.

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
    """Yield a new folder beside `out` to write into. It takes `out`'s name when the block ends well, else it is
    removed.

    An earlier `out` is there until the moment the new one is whole and on disk. Where the system cannot exchange two
    folders in one step (Linux can, on its own file systems), there is a moment between two renames without either.

    Args:
        group: other outputs; the name is taken when all of them are whole.
    """
    with nullcontext(group) if group is not None else together() as outputs:
        out = out.resolve()  # a link stays, and what it leads to is replaced
        make_folder(out.parent)
        partial = _beside(out, "")
        partial.mkdir()
        outputs.begin(partial, out)
        yield partial
        _keep_owners(partial, out)
        for file in partial.iterdir():
            sync(file)
        sync(partial)


@contextmanager
def atomic_file(out: Path, group: Together | None = None) -> Iterator[Path]:
    """Yield a new file beside `out` to write. It takes `out`'s name, whole and on disk, when the block ends well.

    Args:
        group: as for `atomic_folder`.
    """
    with nullcontext(group) if group is not None else together() as outputs:
        if is_plain(out):
            yield outputs.begin_plain(out)
            return
        out = out.resolve()
        make_folder(out.parent)
        partial = _beside(out, out.suffix)
        partial.touch()
        outputs.begin(partial, out)
        yield partial
        _keep_owners(partial, out)
        sync(partial)


def is_plain(path: Path) -> bool:
    """Return whether a path is written to directly: `-` (stdout), a device or a pipe."""
    return str(path) == "-" or _standard(path) or (path.exists() and not path.is_file() and not path.is_dir())


def _standard(path: Path) -> bool:
    """Return whether a path names a stream that this process has open, which may be a file."""
    return str(path) in ("/dev/stdout", "/dev/stderr") or str(path).startswith(("/dev/fd/", "/proc/self/fd/"))


def _beside(out: Path, suffix: str) -> Path:
    """Return the name of a new file or folder that will become `out`, and remove what killed processes left of such
    ones."""
    stem = (out.name.removesuffix(suffix) if suffix else out.name)[:_LONGEST_STEM]
    ours = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.part{re.escape(suffix)}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), locked(left) as held:
            if held:  # so it is not of a process that is still at it
                _remove(left)
    return out.with_name(f".{stem}.{uuid.uuid4().hex[:8]}.part{suffix}")


def _remove(path: Path) -> None:
    """Remove a file, folder or link, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _keep_owners(new: Path, old: Path) -> None:
    """Copy modes and owners from what is replaced, and from files in it that exist again, to what takes its place."""
    for there, here in [(old, new), *((old / file.name, file) for file in (new.iterdir() if new.is_dir() else ()))]:
        if there.is_symlink() or there.is_dir() != here.is_dir() or not there.exists():
            continue
        about = there.stat()
        if hasattr(os, "chown") and (here.stat().st_uid, here.stat().st_gid) != (about.st_uid, about.st_gid):
            with contextlib.suppress(PermissionError):  # only root may give files away
                os.chown(here, about.st_uid, about.st_gid)
        with contextlib.suppress(PermissionError):
            here.chmod(about.st_mode & 0o7777)


def _pour(content: Path, out: Path) -> None:
    """Write to a stream or device, from its present position."""
    with content.open("rb") as file:
        if str(out) in ("-", "/dev/stdout", "/dev/fd/1"):
            sys.stdout.flush()
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
            return
        with open(os.open(out, os.O_WRONLY), "wb") as device:
            shutil.copyfileobj(file, device)


def _take_place(new: Path, old: Path, there: bool, held: ExitStack) -> Callable[[], object]:
    """`new` takes the name of `old`; what undoes it. What `old` was is then called `new`, or goes with what is held."""
    if not there:
        _put_new(new, old)
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


def _put_new(new: Path, place: Path) -> None:
    """`new` takes a name that was free when writing began.

    Raises:
        ConfigError: it is free no longer.
    """
    try:
        if not _renamed(new, place, _RENAME_NOREPLACE):
            _rename_new(new, place)
    except FileExistsError:
        raise ConfigError(f"{place}: has come to be there meanwhile, and stays; write to another name") from None


def _rename_new(new: Path, place: Path) -> None:
    """Do what `_put_new` does, with calls that every system has."""
    if os.name == "nt":
        new.rename(place)  # which replaces nothing there
    elif new.is_dir():
        place.mkdir()  # which fails if there is anything
        try:
            new.rename(place)
        except BaseException:
            place.rmdir()
            raise
    else:
        try:
            os.link(new, place)
        except OSError as e:
            if e.errno not in NOT_TO_BE_HAD | {errno.EPERM, errno.EXDEV, errno.EMLINK}:
                raise
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
            new.rename(place)
        else:
            new.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. Return False if the system cannot."""
    return _renamed(one, other, _RENAME_EXCHANGE)


def _renamed(one: Path, other: Path, how: int) -> bool:
    """Call Linux's renameat2. Return False if the system does not have it.

    Raises:
        OSError: it failed for a reason of its own.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_TO_BE_HAD | {errno.EXDEV}:
        return False
    raise OSError(code, os.strerror(code), str(other))
