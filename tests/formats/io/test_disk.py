"""What is on disk when: the order of writes, syncs and renames; file systems that lack some of it; ledgers of any
length, and what is none."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from whole_files import READERS, put

from rankflow import ConfigError, squeeze
from rankflow.errors import CheckpointError
from rankflow.formats.io import atomic
from rankflow.formats.io.atomic import atomic_file, atomic_folder, together
from rankflow.formats.io.disk import locked
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Refactor
from rankflow.plans.plan import RankPlan
from rankflow.training.ledger import Ledger

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
LAYOUT = Layout({"a": Slot(4, 16, 8, 2.0)})
PLAN = RankPlan({"a": (Refactor(torch.eye(4, 2, dtype=torch.float64), torch.eye(2, 4, dtype=torch.float64)),)}, "cut")


@contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """(what was done, the name it was done to), in order."""
    log: list[tuple[str, str]] = []

    def spy(call: Callable[..., Any], what: str, name_of: Callable[..., str]) -> Callable[..., Any]:
        def spied(*args: Any, **options: Any) -> Any:
            log.append((what, name_of(*args)))
            return call(*args, **options)

        return spied

    def opened(fd: int, *_: object) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    def target(_: Path, to: Path, *__: object) -> str:
        return Path(to).name

    patches = [
        mock.patch.object(os, "fsync", spy(os.fsync, "sync", opened)),
        mock.patch.object(os, "write", spy(os.write, "write", opened)),
        mock.patch.object(os, "replace", spy(os.replace, "rename", target)),
        mock.patch.object(os, "rename", spy(os.rename, "rename", target)),
        mock.patch.object(atomic, "_renamed", spy(atomic._renamed, "rename", target)),
    ]
    for patch in patches:
        patch.start()
    try:
        yield log
    finally:
        for patch in patches:
            patch.stop()


def part(name: str, out: str) -> bool:
    return name.startswith(f".{out}.") and ".part" in name


@linux
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_a_file_is_synced_then_named_then_its_folder_is_synced(tmp_path: Path, there: bool):
    if there:
        (tmp_path / "x.txt").write_text("old")
    with recorded() as log, atomic_file(tmp_path / "x.txt") as partial:
        partial.write_text("new")
    (first, half), *rest = log
    assert first == "sync"
    assert part(half, "x")
    assert rest == [("rename", "x.txt"), ("sync", tmp_path.name)]


@linux
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_the_files_of_a_folder_then_itself_then_the_one_above(tmp_path: Path, there: bool):
    if there:
        (tmp_path / "out").mkdir()
    with recorded() as log, atomic_folder(tmp_path / "out") as partial:
        for name in "ab":
            (partial / name).write_text(name)
    assert sorted(log[:2]) == [("sync", "a"), ("sync", "b")]
    assert log[2][0] == "sync"
    assert part(log[2][1], "out")
    assert log[3:] == [("rename", "out"), ("sync", tmp_path.name)]


@linux
def test_new_folders_are_synced_in_those_above_them(tmp_path: Path):
    with recorded() as log, atomic_file(tmp_path / "one" / "two" / "x.txt") as partial:
        partial.write_text("new")
    assert log[:2] == [("sync", tmp_path.name), ("sync", "one")]
    assert log[-1] == ("sync", "two")


@linux
def test_a_new_ledger_is_on_disk_with_its_folders_and_matrices_go_before_their_line(tmp_path: Path):
    ledger = Ledger(tmp_path / "run" / "l.jsonl", keep_matrices=True)
    with recorded() as log:
        ledger.append("attach", 0, layout=LAYOUT.to_json())
    assert log == [("sync", tmp_path.name), ("write", "l.jsonl"), ("sync", "l.jsonl"), ("sync", "run")]
    with recorded() as log:
        ledger.append("resize", 7, PLAN)
    matrices = "l-step-000007.safetensors"
    assert log == [
        ("sync", f".{matrices}.part"),
        ("rename", matrices),
        ("sync", "run"),
        ("write", "l.jsonl"),
        ("sync", "l.jsonl"),
    ]


def test_two_plans_of_one_step_keep_matrices_of_their_own(tmp_path: Path):
    ledger = Ledger(tmp_path / "l.jsonl", keep_matrices=True)
    ledger.append("attach", 0, layout=LAYOUT.to_json())
    other = RankPlan({"a": (Refactor(*(3 * torch.eye(2, dtype=torch.float64),) * 2),)}, "turn")
    events = [ledger.append("resize", 7, plan) for plan in (PLAN, other)]
    for event, plan in zip(events, (PLAN, other), strict=True):
        (kept,), (op,) = ledger.plan(event).ops["a"], plan.ops["a"]
        assert isinstance(kept, Refactor)
        assert isinstance(op, Refactor)
        assert torch.equal(kept.N, op.N)


# -- what a file system may lack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_writing_goes_on_where_folders_cannot_be_synced(tmp_path: Path, code: int):
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    src = put(tmp_path / "src", READERS["peft"]())
    with mock.patch.object(os, "fsync", fsync):
        squeeze(src, tmp_path / "deep" / "out", target_rank=2)
        Ledger(tmp_path / "run" / "l.jsonl").append("skip", 1, reason="a")
    assert (tmp_path / "deep" / "out" / "adapter_config.json").is_file()
    assert len(Ledger(tmp_path / "run" / "l.jsonl").events) == 1


def write(out: Path, content: str = "new", meanwhile: Callable[[], object] = lambda: None) -> None:
    with atomic_file(out) as partial:
        partial.write_text(content)
        meanwhile()


def write_folder(out: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    with atomic_folder(out) as partial:
        (partial / "x").write_text("new")
        meanwhile()


def test_where_files_cannot_be_synced_it_is_said(tmp_path: Path):
    fsync = mock.patch.object(os, "fsync", side_effect=OSError(errno.EINVAL, "Invalid argument"))
    with fsync, pytest.warns(UserWarning, match="cannot sync files"):
        write(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "new"


def test_a_disk_that_fails_is_not_taken_for_one_that_cannot(tmp_path: Path):
    fsync = mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error"))
    with fsync, pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="locks files in another way")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF])
def test_writing_goes_on_without_locks_and_takes_nothing_away_then(tmp_path: Path, code: int):
    left = tmp_path / ".x.0123abcd.part.txt"  # may be of a living process
    left.write_text("half")
    with mock.patch("fcntl.flock", side_effect=OSError(code, os.strerror(code))):
        with locked(left) as held:
            assert not held
        with atomic_file(tmp_path / "x.txt") as partial:
            partial.write_text("new")
    assert (tmp_path / "x.txt").read_text() == "new"
    assert left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="its rule is made up here")
def test_files_are_synced_by_what_may_write_to_them_as_windows_wants_it(tmp_path: Path):
    import fcntl

    real = os.fsync

    def fsync(fd: int) -> None:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if regular and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(fd)

    src = put(tmp_path / "src", READERS["mixed"]())
    with mock.patch.object(os, "fsync", fsync):
        squeeze(src, tmp_path / "out", target_rank=2, keep_residual=tmp_path / "residual.safetensors")
        ledger = Ledger(tmp_path / "l.jsonl", keep_matrices=True)
        ledger.append("attach", 0, layout=LAYOUT.to_json())
        ledger.append("resize", 1, PLAN)
    assert (tmp_path / "out").is_dir()


# -- what takes a name ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one call", "links and folders", "neither"])
def calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a system has to take a name only if it is free."""
    patches = [mock.patch.object(atomic, "_renamed", return_value=False)] if request.param != "one call" else []
    if request.param == "neither":
        patches.append(mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, "Operation not permitted")))
    for patch in patches:
        patch.start()
    yield
    for patch in patches:
        patch.stop()


@pytest.mark.usefixtures("calls")
def test_what_came_meanwhile_stays(tmp_path: Path):
    with pytest.raises(ConfigError, match="has come to be there meanwhile"):
        write(tmp_path / "out", meanwhile=lambda: (tmp_path / "out").write_text("mine"))
    with pytest.raises(ConfigError, match="has come to be there meanwhile"):
        write_folder(tmp_path / "folder", (tmp_path / "folder").mkdir)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "folder"}
    assert (tmp_path / "out").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.usefixtures("calls")
def test_a_free_name_is_taken(tmp_path: Path):
    write(tmp_path / "out")
    write_folder(tmp_path / "folder")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "folder"}
    assert (tmp_path / "out").read_text() == (tmp_path / "folder" / "x").read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such modes")
def test_modes_and_owners_are_kept_of_files_and_of_those_in_folders(tmp_path: Path):
    file, folder = tmp_path / "x.txt", tmp_path / "out"
    folder.mkdir()
    for path, mode in ((file, 0o640), (folder / "a", 0o604)):
        path.write_text("old")
        path.chmod(mode)
    folder.chmod(0o750)
    root = os.geteuid() == 0
    if root:
        os.chown(file, 1234, 2345)
    with together() as group, atomic_file(file, group) as partial, atomic_folder(folder, group) as inside:
        partial.write_text("new")
        (inside / "a").write_text("new")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, folder, folder / "a")] == [0o640, 0o750, 0o604]
    assert not root or (file.stat().st_uid, file.stat().st_gid) == (1234, 2345)
    assert file.read_text() == (folder / "a").read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path):
    (tmp_path / "real").mkdir()
    for name, there in (("old.txt", True), ("new.txt", False)):
        target, link = tmp_path / "real" / name, tmp_path / name
        if there:
            target.write_text("old")
        link.symlink_to(target)
        with atomic_file(link) as partial:
            partial.write_text("new")
        assert link.is_symlink()
        assert target.read_text() == "new"


def test_a_long_name_can_be_written(tmp_path: Path):
    name = "ü" * 120 + ".txt"  # 244 bytes
    with atomic_file(tmp_path / name) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_a_pipe_and_a_device_are_written_to_as_they_are(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for place in (pipe, Path(os.devnull)):
        with atomic_file(place) as partial:
            partial.write_text("new")
        assert not place.is_file()
    assert os.read(reader, 99) == b"new"
    os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


# -- ledgers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b"one\ntwo",
        b"\n",
        b'{"a": 1}\n{"b"',
        b'{"event": "log", "step": 3}\n{"event"',
        b'{"event": "attach", "place": "here"',
        READERS["peft"]()["adapter_model.safetensors"],
    ],
    ids=["JSON", "text", "empty line", "lines", "other events", "one event", "weights"],
)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_ledger_is_not_touched(tmp_path: Path, content: bytes, linked: bool):
    path = tmp_path / "x"
    path.write_bytes(content)
    given = tmp_path / "l.jsonl" if linked else path
    if linked:
        given.symlink_to(path)
    with pytest.raises(CheckpointError, match="give the ledger another name"):
        Ledger(given)
    assert path.read_bytes() == content


def test_a_folder_is_no_ledger(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is a folder"):
        Ledger(tmp_path)


def test_a_first_line_cut_short_at_any_byte_is_mended(tmp_path: Path):
    path = tmp_path / "l.jsonl"
    Ledger(path).append("attach", 0, layout=LAYOUT.to_json())
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert Ledger(path).events == []
        assert path.read_bytes() == b""


class Watched(list[Any]):
    """A list that counts how many of its elements were walked over."""

    walked = 0

    def __iter__(self) -> Iterator[Any]:
        Watched.walked += len(self)
        return super().__iter__()

    def __getitem__(self, at: Any) -> Any:
        Watched.walked += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)


def calls_of(work: Callable[[], object]) -> tuple[int, int]:
    """How many calls `work` makes, and how many events it walks over."""
    counted, before = [0], Watched.walked

    def count(frame: Any, event: str, argument: Any) -> None:
        counted[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted[0], Watched.walked - before


@pytest.mark.parametrize("together", [False, True])
def test_appending_costs_the_same_at_any_length(tmp_path: Path, together: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("time.time", lambda: 1234567890.123)  # lines of one length
    found = []
    for length in (10, 100_000):
        ledger = Ledger(tmp_path / f"{length}.jsonl")
        ledger.append("attach", 0, layout=LAYOUT.to_json())
        ledger.events = Watched([*ledger.events, *({"event": "skip", "step": 1, "reason": "x"} for _ in range(length))])

        def work(ledger: Ledger = ledger) -> None:
            if together:
                with ledger.together():
                    ledger.append("skip", 123456, reason="y")
            else:
                ledger.append("skip", 123456, reason="y")

        size = ledger.path.stat().st_size if ledger.path else 0
        work()
        found.append((*calls_of(work), ledger.path.stat().st_size - size if ledger.path else 0))
        assert len(ledger.events) == length + 3
    assert found[0] == found[1]


def test_an_event_that_was_not_written_is_taken_back_and_no_snapshot_grows(tmp_path: Path):
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.append("attach", 0, layout=LAYOUT.to_json())
    seen = list(ledger.events)

    def fail() -> None:
        with ledger.together():
            ledger.append("skip", 1, reason="a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert ledger.events == seen == Ledger(tmp_path / "l.jsonl").events
