"""A full disk and a killed process leave the old output, or the new one, and nothing that is neither."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from crashing import JOBS, MEMORY, ticking, tree
from safetensors.torch import save_file
from typer.testing import CliRunner
from whole_files import READERS, put

from rankflow import ConfigError, load_quantized, save_quantized, squeeze
from rankflow.calibration import base_model
from rankflow.calibration.statistics import Statistics
from rankflow.cli.app import app
from rankflow.formats.io import atomic
from rankflow.training.ledger import Ledger


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where syncing costs nothing."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


SQUEEZE = ("squeeze", "{src}", "--target-rank", "2", "-o")
COMMANDS: dict[str, tuple[str, Sequence[str], tuple[str, ...]]] = {  # reader, command, outputs
    "squeeze": ("peft", (*SQUEEZE, "{out}/a"), ("a",)),
    "squeeze a .bin": ("bin", (*SQUEEZE, "{out}/a"), ("a",)),
    "squeeze one file": ("kohya", (*SQUEEZE, "{out}/a.safetensors"), ("a.safetensors",)),
    "squeeze --ranks": ("peft", ("squeeze", "{src}", "--ranks", "1,2", "-o", "{out}/a"), ("a-r1", "a-r2")),
    "squeeze --report": ("peft", (*SQUEEZE, "{out}/a", "--report", "{out}/r.json"), ("a", "r.json")),
    "squeeze --keep-residual": (
        "peft",
        (*SQUEEZE, "{out}/a", "--keep-residual", "{out}/t.safetensors"),
        ("a", "t.safetensors"),
    ),
    "squeeze --to-format gguf": (
        "gguf",
        (*SQUEEZE, "{out}/a.gguf", "--to-format", "gguf", "--base", "{src}/base"),
        ("a.gguf",),
    ),
    "squeeze --to-format": ("diffusers", (*SQUEEZE, "{out}/a", "--to-format", "peft"), ("a",)),
    "pad": ("peft", ("pad", "{src}", "--rank", "8", "-o", "{out}/a"), ("a",)),
    "canonicalize": ("peft", ("canonicalize", "{src}", "-o", "{out}/a"), ("a",)),
    "expand": ("residual", ("expand", "{src}", "{src}/../residual.safetensors", "-o", "{out}/a"), ("a",)),
    "calibrate": (
        "statistics",
        ("calibrate", "{src}", "--base", "any", "--data", "any.txt", "-o", "{out}/s.safetensors"),
        ("s.safetensors",),
    ),
    "plan": ("peft", ("plan", "{src}", "--energy", "0.5", "-o", "{out}/p.yaml"), ("p.yaml",)),
}
FAST = ("squeeze", "squeeze a .bin", "squeeze --to-format gguf", "calibrate", "plan")
TOGETHER = ("squeeze --keep-residual",)  # whose outputs are of one make


def prepared(tmp_path: Path, reader: str) -> Path:
    src = put(tmp_path / "src", READERS[reader]())
    if reader == "residual":
        (src / "residual.safetensors").rename(tmp_path / "residual.safetensors")
    single = reader in ("kohya", "diffusers")
    return next(src.iterdir()) if single else src


class Full:
    """A disk that is full at the call of that number, and from then on or for that one."""

    def __init__(self, at: int, *, once: bool = False):
        self.at, self.once, self.calls = at, once, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at or (self.calls > self.at and not self.once):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, case: str, there: bool, monkeypatch: pytest.MonkeyPatch):
    reader, command, outputs = COMMANDS[case]
    measured = [Statistics.load(put(tmp_path / "stats", READERS["statistics"]()) / "stats.safetensors")]
    monkeypatch.setattr(base_model, "calibrate_saved", lambda *args, **options: measured[-1])
    src, out, kept = prepared(tmp_path, reader), tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    words = [word.format(src=src, out=out) for word in command]
    if there:  # the old outputs are those of another rank
        out.mkdir()
        other = [{"2": "3", "1,2": "1,2", "8": "9"}.get(word, word) for word in words]
        measured.append(replace(measured[0], data="other"))
        assert CliRunner().invoke(app, other).exit_code == 0
        measured.pop()
        shutil.rmtree(kept)
        out.rename(kept)
        words.append("--force")
    before = {name: tree_of(kept, name) for name in outputs}
    out.mkdir()
    assert CliRunner().invoke(app, [word for word in words if word != "--force"]).exit_code == 0
    after = {name: tree_of(out, name) for name in outputs}
    assert all(after.values())
    mixed = []
    for once in (True, False):
        for at in range(10**6):
            shutil.rmtree(out)
            shutil.copytree(kept, out)
            disk = Full(at, once=once)
            with ticking(disk):
                result = CliRunner().invoke(app, words)
            found = {name: tree_of(out, name) for name in outputs}
            if disk.calls <= at:
                assert result.exit_code == 0
                break
            if result.exit_code == 0:  # what failed was of no account, as a folder that is there need not be made
                assert all(written_whole(name, found[name], after[name]) for name in outputs)
                continue
            assert result.exit_code == 2, (at, result.output, result.exception)
            assert "No space left" in result.stderr, at
            assert result.stderr.count("\n") == 1, result.stderr
            for name in outputs:
                assert found[name] == before[name] or written_whole(name, found[name], after[name]), (at, name)
            assert {path.name for path in out.iterdir()} <= {*outputs}, at
            if case in TOGETHER and found not in (before, after):
                mixed.append((once, at))
        assert at > 4
    # What fails the second rename once is taken back; a disk that fails that too is none that is merely full
    assert all(not once for once, _ in mixed)
    assert len(mixed) <= 1


def tree_of(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    return tree(path) if path.is_dir() else {name: tree(folder)[name]} if path.exists() else {}


def written_whole(name: str, found: dict[str, str], new: dict[str, str]) -> bool:
    """A report has times in it, so it is never the same twice."""
    return found == new or (name == "r.json" and found.keys() == new.keys())


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("name", ["a", "a.gguf"])
def test_a_small_disk(tmp_path: Path, name: str):
    """The real thing: a file system with room for a page more every time."""
    src, disk = put(tmp_path / "src", READERS["gguf"]()), tmp_path / "disk"
    config = json.loads((src / "base" / "config.json").read_text())
    (src / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99}))
    form = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    tensors = {form.format(i, p): torch.ones(4, 4) for i in range(99) for p in "AB"}
    save_file(tensors, src / "adapter_model.safetensors")
    words = ["squeeze", str(src), "--target-rank", "2", "-o", str(disk / name)]
    if name.endswith(".gguf"):
        words += ["--to-format", "gguf", "--base", str(src / "base")]
    disk.mkdir()
    fitted = False
    for pages in range(2, 16):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k,nr_inodes=64", "none", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount")
        try:
            result = CliRunner().invoke(app, words)
            if result.exit_code:
                assert "No space left" in result.stderr, (pages, result.stderr, result.exception)
                assert not list(disk.iterdir()), pages
            else:
                fitted = True
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        if fitted:
            break
    assert fitted
    assert pages > 2


def test_statistics_on_a_full_disk(tmp_path: Path):
    src = put(tmp_path / "src", READERS["statistics"]())
    found, path = Statistics.load(src / "stats.safetensors"), tmp_path / "s.safetensors"
    path.write_bytes(b"old")
    for at in range(10**6):
        disk = Full(at)
        with ticking(disk), contextlib.suppress(OSError):
            found.save(path, force=True)
        if disk.calls <= at:
            break
        assert path.read_bytes() == b"old" or path.read_bytes() == (src / "stats.safetensors").read_bytes()
        assert {p.name for p in tmp_path.iterdir()} == {"src", "s.safetensors"}
    assert at > 3


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_integers_beside_an_adapter_on_a_full_disk(tmp_path: Path, there: bool):
    src = put(tmp_path / "src", READERS["quantized"]())
    path = src / "rankflow_quantized.safetensors"
    modules = {
        name: {key: getattr(m, key) for key in ("A", "B", "E", "step")} | {"bits": torch.tensor(m.bits)}
        for name, m in load_quantized(src).items()
    }
    flow = SimpleNamespace(stored=modules)
    path.unlink()
    save_quantized(flow, src)  # type: ignore[arg-type]  # all that is looked at
    whole, names = path.read_bytes(), {p.name for p in src.iterdir()}
    old = b"old" if there else None
    for at in range(10**6):
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        disk, failed = Full(at), False
        with ticking(disk):
            try:
                save_quantized(flow, src, force=there)  # type: ignore[arg-type]
            except OSError as e:
                failed = e.errno == errno.ENOSPC
        if disk.calls <= at:
            break
        assert failed
        found = path.read_bytes() if path.exists() else None
        assert found in (old, whole)
        assert {p.name for p in src.iterdir()} == (names if found is not None else names - {path.name})
    assert at > 3


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("exchange", [False, True], ids=["renamed", "exchanged"])
def test_a_residual_gives_its_place_back_where_its_adapter_gets_none(tmp_path: Path, exchange: bool, there: bool):
    src = put(tmp_path / "src", READERS["mixed"]())
    out, residual = tmp_path / "out", tmp_path / "residual.safetensors"

    def write(rank: int) -> None:
        squeeze(src, out, target_rank=rank, keep_residual=residual, force=True)

    if there:
        write(2)
    before, swap, rename, link = tree(tmp_path), atomic._renamed, os.rename, os.link
    calls = iter(range(10**6))

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == at:
                raise OSError(errno.EIO, "Input/output error")
            return function(*args)

        return call

    for at in range(99):
        calls = iter(range(10**6))
        exchanging = once(swap) if exchange else mock.Mock(return_value=False)
        with (
            mock.patch.object(os, "rename", once(rename)),
            mock.patch.object(os, "link", once(link)),
            mock.patch.object(atomic, "_renamed", exchanging),
        ):
            try:
                write(3)
            except OSError as e:
                assert (e.errno, tree(tmp_path)) == (errno.EIO, before), at  # noqa: PT017
            else:
                break
    assert at == (4 if there and not exchange else 2)
    after = tree(tmp_path)
    assert after.keys() == before.keys() | {
        "out",
        "out/adapter_config.json",
        "out/adapter_model.safetensors",
        residual.name,
    }
    assert after != before


def test_a_residual_replaces_nothing_but_a_tail(tmp_path: Path):
    src = put(tmp_path / "src", READERS["mixed"]())
    before = tree(tmp_path)
    for residual, message in (
        (src / "adapter_model.safetensors", "is no residual, so --force does not replace it"),
        (tmp_path / "out" / "residual.safetensors", "which is replaced as a whole; put the residual beside it"),
    ):
        with pytest.raises(ConfigError, match=message):
            squeeze(src, tmp_path / "out", target_rank=2, keep_residual=residual, force=True)
        assert tree(tmp_path) == before


def test_a_ledger_on_a_disk_that_takes_half_a_line(tmp_path: Path):
    written = Ledger(tmp_path / "rankflow.jsonl")
    written.append("skip", 1, reason="a")
    before, write = (tmp_path / "rankflow.jsonl").read_bytes(), os.write
    calls = iter(range(9))

    def half(fd: int, data: bytes) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:5])

    with mock.patch.object(os, "write", half), pytest.raises(OSError, match="No space"):
        written.append("skip", 2, reason="b")
    assert (tmp_path / "rankflow.jsonl").read_bytes() == before
    written.append("skip", 3, reason="c")
    assert [e["step"] for e in Ledger(tmp_path / "rankflow.jsonl").events] == [1, 3]


def test_leftovers_are_taken_away_but_not_those_of_a_living_process(tmp_path: Path):
    src = put(tmp_path / "src", READERS["peft"]())
    dead, other = tmp_path / ".out.0123abcd.part", tmp_path / ".outs.0123abcd.part"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "x").write_text("x")
    with atomic.atomic_folder(tmp_path / "out") as living:
        assert not dead.exists()
        squeeze(src, tmp_path / "out", target_rank=2)
        assert living.exists()
        shutil.rmtree(tmp_path / "out")
    assert other.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", other.name}


def test_a_link_leads_to_the_new_output(tmp_path: Path):
    src = put(tmp_path / "src", READERS["peft"]())
    squeeze(src, tmp_path / "real", target_rank=3)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    squeeze(src, tmp_path / "link", target_rank=2, force=True)
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"src", "real", "link"}


def test_where_folders_cannot_be_exchanged_they_are_renamed(tmp_path: Path):
    src = put(tmp_path / "src", READERS["peft"]())
    squeeze(src, tmp_path / "out", target_rank=3)
    with mock.patch.object(atomic, "_exchange", return_value=False):
        squeeze(src, tmp_path / "out", target_rank=2, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out"}
    assert set(inspected(tmp_path / "out")) == {2}


def inspected(folder: Path) -> list[int]:
    from rankflow import inspect

    return [m.rank for m in inspect(folder).modules]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_processes_leave_the_old_or_the_new(job: str):
    trials = int(os.environ.get("RANKFLOW_KILLS", "5"))
    script = Path(__file__).parents[1] / "helpers" / "crashing.py"
    words = ["--jobs", job, "--trials", str(trials), "--seed", os.environ.get("RANKFLOW_FUZZ_SEED", "0")]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # At calls alone it dies more often than this; how many of the moments come in time hangs on the machine.
    assert int(done.stdout.split()[2]) > 10
