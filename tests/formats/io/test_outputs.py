"""Whether a path may be written: the same rule for every output of every command and function."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from crashing import tree
from typer.testing import CliRunner
from whole_files import READERS, put

import rankflow
from rankflow import ConfigError
from rankflow.cli.app import app
from rankflow.formats.io import outputs
from rankflow.formats.io.outputs import check_apart, check_output, suffixed
from rankflow.linalg.parallel import Pool
from rankflow.render.run_figure import plot_ledger
from rankflow.training.ledger import Ledger
from tests.cli.test_app import run

BUDGET = "limits: {'*': {max: 9}}\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter `a`, one in a single file, and what else commands read."""
    src = put(tmp_path / "a", READERS["peft"]())
    (src / "tokenizer.json").write_text("{}")
    (single,) = put(tmp_path / "one", READERS["kohya"]()).iterdir()
    single.rename(tmp_path / "one" / "a.safetensors")
    run(
        "squeeze", src, "--target-rank", 2, "-o", tmp_path / "cut", "--keep-residual", tmp_path / "residual.safetensors"
    )
    run("plan", src, "--target-rank", 2, "-o", tmp_path / "plan.yaml")
    (tmp_path / "budget.yaml").write_text(BUDGET)
    ledger = Ledger(tmp_path / "run.jsonl")
    ledger.append(
        "attach", 0, layout=rankflow.plans.layout.Layout({"a": rankflow.plans.layout.Slot(4, 16, 8, 2.0)}).to_json()
    )
    ledger.append("finish", 9)
    (tmp_path / "data.txt").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Commands with the inputs that they read; OUT is where the output goes
COMMANDS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "squeeze -o": (("squeeze", "a", "--plan", "plan.yaml", "-o", "OUT"), ("a", "plan.yaml")),
    "squeeze --report": (
        ("squeeze", "a", "--target-rank", "2", "--budget", "budget.yaml", "-o", "new", "--report", "OUT"),
        ("a", "budget.yaml"),
    ),
    "squeeze --html": (("squeeze", "a", "--plan", "plan.yaml", "-o", "new", "--html", "OUT"), ("a", "plan.yaml")),
    "squeeze --keep-residual": (
        ("squeeze", "a", "--plan", "plan.yaml", "-o", "new", "--keep-residual", "OUT"),
        ("a", "plan.yaml"),
    ),
    "squeeze --dry-run": (("squeeze", "a", "--plan", "plan.yaml", "--dry-run", "--report", "OUT"), ("a", "plan.yaml")),
    "squeeze --accept": (("squeeze", "a", "--accept", "true", "-o", "OUT"), ("a",)),
    "squeeze --ranks": (("squeeze", "a", "--ranks", "1,2", "-o", "new", "--report", "OUT"), ("a",)),
    "squeeze to one file": (("squeeze", "one/a.safetensors", "--energy", "0.5", "-o", "OUT"), ("one",)),
    "plan": (("plan", "a", "--budget", "budget.yaml", "--target-rank", "1", "-o", "OUT"), ("a", "budget.yaml")),
    "calibrate": (("calibrate", "a", "--base", "one", "--data", "data.txt", "-o", "OUT"), ("a", "one", "data.txt")),
    "expand": (("expand", "cut", "residual.safetensors", "-o", "OUT"), ("cut", "residual.safetensors")),
    "canonicalize": (("canonicalize", "a", "-o", "OUT"), ("a",)),
    "pad": (("pad", "a", "--rank", "8", "-o", "OUT"), ("a",)),
    "inspect --plot": (("inspect", "a", "--plot", "OUT"), ("a",)),
    "inspect --html": (("inspect", "a", "--html", "OUT"), ("a",)),
    "report -o": (("report", "run.jsonl", "-o", "OUT"), ("run.jsonl",)),
    "report --html": (("report", "run.jsonl", "--html", "OUT"), ("run.jsonl",)),
}
ENDS = {
    "--html": ".html",
    "--plot": ".png",
    "report -o": ".png",
    "--keep-residual": ".safetensors",
    "one file": ".safetensors",
}
ENDS |= {"calibrate": ".safetensors"}


def ending(case: str) -> str:
    return next((end for word, end in ENDS.items() if word in case), "")


def invoke(words: Sequence[str], out: object, *more: str) -> Any:
    return CliRunner().invoke(app, [str(out) if word == "OUT" else word for word in (*words, *more)])


def names_of(path: Path, end: str, work: Path) -> dict[str, Path]:
    """Ways to name one file of an input, each with the ending that the output asks for where it can have one."""
    link, hard = work / f"link{end}", work / f"hard{end}"
    link.symlink_to(path)
    os.link(path, hard)
    chain = work / f"chain{end}"
    chain.symlink_to(link.name)
    (work / "door").symlink_to(path.parent)
    return {
        "itself": path,
        "relative": Path(os.path.relpath(path)),
        "a link": link,
        "a link to a link": chain,
        "a hard link": hard,
        "through a folder": work / "door" / path.name,
    }


@pytest.mark.parametrize("case", COMMANDS)
def test_no_output_replaces_a_file_of_an_input_by_whatever_name(work: Path, case: str):
    words, inputs = COMMANDS[case]
    files = [p for name in inputs for p in ([work / name] if (work / name).is_file() else (work / name).iterdir())]
    for at, path in enumerate(files):
        place = work / f"names{at}"
        place.mkdir()
        for how, out in names_of(path, ending(case), place).items():
            before = tree(work)
            result = invoke(words, out, "--force")
            assert result.exit_code == 2, (how, path, result.output, result.exception)
            assert result.stderr.count("\n") == 1
            assert tree(work) == before, (how, path)


@pytest.mark.parametrize("case", COMMANDS)
def test_nothing_that_is_there_is_replaced_without_force(work: Path, case: str):
    words, _ = COMMANDS[case]
    out = work / f"there{ending(case)}"
    out.write_text("mine")
    before = tree(work)
    with mock.patch("rankflow.calibration.base_model.calibrate_saved", side_effect=AssertionError("was run before")):
        result = invoke(words, out)
    if "--dry-run" in words:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2, result.output
        assert "there" in result.stderr
    assert tree(work) == before


@pytest.mark.parametrize("case", COMMANDS)
def test_a_folder_a_file_above_and_a_name_too_long_are_refused_before_any_work(work: Path, case: str):
    words, _ = COMMANDS[case]
    (work / f"folder{ending(case)}").mkdir()
    (work / f"folder{ending(case)}" / "x").write_text("mine")
    (work / "file").write_text("mine")
    circle = work / f"circle{ending(case)}"
    circle.symlink_to(circle.name)
    before = tree(work)
    with mock.patch("rankflow.linalg.parallel.Pool.together", side_effect=AssertionError("was run before")):
        for out in (f"folder{ending(case)}", f"file/x{ending(case)}", "y" * 300 + ending(case), circle):
            result = invoke(words, out, "--force")
            assert result.exit_code == 2, (out, result.output, result.exception)
    assert tree(work) == before


def hub(work: Path) -> Path:
    """The adapter as the hub's cache has it: names that lead to blobs."""
    root = work / "hub" / "models--me--style"
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    for folder in (snapshot, root / "snapshots" / "4567", blobs):
        folder.mkdir(parents=True)
    for i, file in enumerate(sorted((work / "a").iterdir())):
        shutil.copyfile(file, blobs / f"sha{i}")
        for folder in (snapshot, root / "snapshots" / "4567"):
            (folder / file.name).symlink_to(Path("..") / ".." / "blobs" / f"sha{i}")
    return snapshot


def test_the_hubs_cache_is_an_input_as_a_whole(work: Path):
    source = hub(work)
    blobs = sorted((source.parents[1] / "blobs").iterdir())
    before = tree(work)
    for out in (*blobs, *source.iterdir(), *(source.parent / "4567").iterdir()):
        assert "choose another name" in run("plan", source, "--energy", 0.5, "-o", out, "--force", status=2).stderr
        with pytest.raises(ConfigError):
            rankflow.squeeze(source, work / "new", target_rank=2, keep_residual=out, force=True)
    for out in (source, source.parent, source.parents[1], source.parent / "4567"):
        with pytest.raises(ConfigError, match="replace its own source"):
            rankflow.squeeze(source, out, target_rank=2, force=True)
    assert tree(work) == before


def test_a_base_by_its_name_on_the_hub_is_an_input_too(work: Path, monkeypatch: pytest.MonkeyPatch):
    source = hub(work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "hub"))
    blob = next((source.parents[1] / "blobs").iterdir())
    with pytest.raises(ConfigError, match="replace its base"):
        check_output(blob, {"its base": "me/style"}, force=True)
    check_output(work / "other", {"its base": "nobody/style"}, force=True)


def test_a_new_file_does_not_become_part_of_an_input(work: Path):
    before = tree(work)
    for name in ("adapter_model.bin", "tokenizer_config.json", "README.md", "config.json", "special_tokens_map.json"):
        assert "would become part of" in run("plan", "a", "--energy", 0.5, "-o", Path("a") / name, status=2).stderr
    for name in ("adapter_config.json",):
        assert (
            "would become part of"
            in run("plan", "one/a.safetensors", "--energy", 1, "-o", f"one/{name}", status=2).stderr
        )
    assert tree(work) == before
    run("plan", "a", "--energy", 0.5, "-o", "a/plan.yaml")
    assert tree(work).items() >= before.items()


def test_a_folder_that_holds_an_input_is_not_replaced_with_it(work: Path):
    shutil.copytree("a", "old")
    for name in ("plan.yaml", "budget.yaml"):
        shutil.copyfile(name, f"old/{name}")
    os.link("residual.safetensors", "old/residual.safetensors")
    before = tree(work)
    for words in (
        ("squeeze", "a", "--plan", "old/plan.yaml"),
        ("squeeze", "a", "--target-rank", 1, "--budget", "old/budget.yaml"),
        ("expand", "cut", "residual.safetensors"),
    ):
        assert "would replace its" in run(*words, "-o", "old", "--force", status=2).stderr
    assert tree(work) == before


@pytest.mark.parametrize("stem", [".", "..", "/"])
def test_several_outputs_need_a_name_to_begin_with(stem: str):
    with pytest.raises(ConfigError, match="has no name"):
        suffixed(Path(stem), "r4")


def test_two_outputs_are_in_two_places(work: Path):
    before = tree(work)
    (work / "same.json").symlink_to("x.html")
    for report, html in (("x.html", "x.html"), ("./x.html", "../" + work.name + "/x.html"), ("same.json", "x.html")):
        words = ("squeeze", "a", "--target-rank", 2, "--report", report, "--html", html)
        assert "another output goes" in run(*words, "-o", "new", status=2).stderr
    (work / "same.json").unlink()
    shutil.copytree("a", "old")
    words = ("squeeze", "a", "--target-rank", 2, "--force", "-o", "old", "--report", "old/report.json")
    assert "which is replaced as a whole" in run(*words, status=2).stderr
    shutil.rmtree("old")
    words = ("squeeze", "one/a.safetensors", "--target-rank", 2, "--report", "one/a-r2.safetensors")
    assert "another output goes" in run(*words, status=2).stderr  # where it goes if nothing is said
    assert tree(work) == before


def test_names_that_differ_in_case_are_one_where_case_is_ignored(work: Path, monkeypatch: pytest.MonkeyPatch):
    check_apart([work / "x.json", work / "X.json"])
    monkeypatch.setattr(outputs, "identity", lambda path: str(path).casefold())
    with pytest.raises(ConfigError, match="another output goes"):
        check_apart([work / "x.json", work / "X.json"])


def test_a_dry_run_writes_nothing_and_says_so(work: Path):
    before = tree(work)
    result = run("squeeze", "a", "--target-rank", 2, "--dry-run", "--report", "r.json", "--html", "r.html")
    assert "Nothing was written, nor r.json and r.html (--dry-run)" in " ".join(result.stdout.split())
    assert tree(work) == before


@pytest.mark.parametrize("case", [case for case in COMMANDS if case in ("plan", "squeeze --dry-run", "squeeze --html")])
def test_a_dash_is_stdout_and_nothing_else_goes_there(work: Path, case: str):
    before = tree(work)
    words, _ = COMMANDS[case]
    result = invoke(words, "-")
    assert result.exit_code == 0, result.output
    begins = {"plan": "# Ranks", "squeeze --dry-run": "{", "squeeze --html": "<!"}[case]
    assert result.stdout.startswith(begins)
    assert "adapter" in result.stderr or "energy" in result.stderr
    if case == "squeeze --dry-run":
        assert json.loads(result.stdout)["dry_run"]
    shutil.rmtree("new", ignore_errors=True)
    assert tree(work) == before


def test_a_device_takes_any_output_but_a_folder(work: Path):
    for case, (words, _) in COMMANDS.items():
        wants_folder = words[0] in ("expand", "canonicalize", "pad") or case in ("squeeze -o", "squeeze --accept")
        with mock.patch("rankflow.calibration.base_model.calibrate_saved") as calibrated:
            calibrated.return_value = rankflow.calibration.statistics.Statistics.load(
                put(work / f"s{case}", READERS["statistics"]()) / "stats.safetensors"
            )
            result = invoke(words, os.devnull)
        assert result.exit_code == (2 if wants_folder else 0), (case, result.output, result.exception)
        shutil.rmtree("new", ignore_errors=True)
        for left in work.glob("new-r*"):
            shutil.rmtree(left)
    assert Path(os.devnull).is_char_device()


def test_what_came_while_work_went_on_stays(work: Path):
    with during("each", lambda: (work / "s.html").write_text("mine")):
        assert "is there already" in run("inspect", "a", "--html", "s.html", "--force", status=2).stderr
    assert (work / "s.html").read_text() == "mine"


def test_functions_keep_to_it_as_commands_do(work: Path):
    picture = work / "run.png"
    read = Ledger.read(work / "run.jsonl")
    plot_ledger(read, picture)
    with pytest.raises(ConfigError, match="is there already"):
        plot_ledger(read, picture)
    plot_ledger(read, picture, force=True)
    (work / "ledger.png").symlink_to("run.jsonl")
    with pytest.raises(ConfigError, match="replace the ledger"):
        plot_ledger(read, work / "ledger.png", force=True)
    with pytest.raises(ConfigError, match="replace its residual"):
        rankflow.expand("cut", "residual.safetensors", work, force=True)


@contextmanager
def during(method: str, do: Callable[[], object], times: int = 1) -> Iterator[None]:
    """`do` is called when the work on modules is done, that often."""
    real = getattr(Pool, method)

    def called(pool: Pool, *given: Any) -> Any:
        found = real(pool, *given)
        for _ in range(times):
            do()
        return found

    with mock.patch.object(Pool, method, called):
        yield


# -- ends -------------------------------------------------------------------------------------------------------------

WAITS = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(sys.argv[2])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_as_an_exception_does(work: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(work / "tmp"))
    (work / "tmp").mkdir()
    number = getattr(signal, name)
    before, earlier, handler = tree(work), signal.getsignal(number), lambda *_: None  # else it would end the tests
    signal.signal(number, handler)
    for case in ("squeeze -o", "squeeze --keep-residual", "squeeze --accept", "expand", "pad"):
        with during("each", lambda: os.kill(os.getpid(), number), times=3):
            result = invoke(COMMANDS[case][0], f"out{ending(case)}")
        assert result.exit_code == 128 + number, (case, result.output)
        assert tree(work) == before, case
        assert signal.getsignal(number) is handler
    signal.signal(number, earlier)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_what_is_to_outlive_its_terminal_does(work: Path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with during("each", lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert invoke(COMMANDS["pad"][0], "out").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert (work / "out").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_command_leaves_nothing_behind(work: Path, number: signal.Signals):
    (work / "waits.py").write_text(WAITS)
    before, scratch, mark = tree(work), work / "tmp", work / "mark"
    scratch.mkdir()
    gate = f"{sys.executable} {work}/waits.py {mark} {{}}"
    words = [sys.executable, "-m", "rankflow", "squeeze", "a", "--accept", gate, "-o", "new"]
    process = subprocess.Popen(words, cwd=work, env=os.environ | {"TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    candidate = Path(mark.read_text())
    assert candidate.parent.parent == scratch
    assert candidate.name == "r4", "no name of a stranger's"
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert not [p for p in scratch.iterdir() if p.name.startswith("rankflow")]
    mark.unlink()
    shutil.rmtree(scratch)
    assert tree(work) == before


def test_candidates_have_names_of_our_own(work: Path):
    seen: list[str] = []

    def gate(candidate: Path) -> bool:
        seen.append(candidate.name)
        return True

    stranger = "a'; touch x; '.safetensors"
    shutil.copyfile("one/a.safetensors", stranger)
    rankflow.squeeze(stranger, work / "new.safetensors", accept=gate)
    shutil.copytree("a", "$(id).safetensors")
    rankflow.squeeze("$(id).safetensors", work / "new", accept=gate)
    assert seen
    assert all(name.removesuffix(".safetensors").removeprefix("r").isdigit() for name in seen)


def test_the_gate_reads_nothing_from_stdin(tmp_path: Path):
    from rankflow.compress.accept import acceptance_command

    script = tmp_path / "reads.py"
    script.write_text("import sys; sys.exit(sys.stdin.read() != '')")
    with tempfile.TemporaryFile() as given:
        given.write(b"what was meant for another")
        given.seek(0)
        kept = os.dup(0)
        os.dup2(given.fileno(), 0)
        try:
            assert acceptance_command(f"{sys.executable} {script}")(tmp_path)
        finally:
            os.dup2(kept, 0)
            os.close(kept)
