"""Plants faults, each of which must turn at least one test red. Run: python tests/faults.py [WORD ...]

Every fault replaces one piece of one file in a scratch copy of the package and runs the tests that should notice. They
stand in lists named FAULTS, in `faults_x.py` beside the `test_x.py` that must notice them. Words given on the command
line pick the faults whose name or test file holds one of them.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from fault import Planted, every_fault  # noqa: E402

GREEN, RED = 100, 101  # exit codes of tests; a process that ends by itself in another way has others


# What tests import and no fault is planted in, imported once for all: it takes longer than most of them run.
PRELOAD = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
    "peft",
    "matplotlib.pyplot",
]


def survives(planted: Planted) -> bool:
    """Whether the tests stay green with the fault in place."""
    fault, command = planted
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "rankflow"
        shutil.copytree(ROOT / "rankflow", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "policies", Path(scratch) / "policies")
        path = package / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise SystemExit(f"{fault.name}: found {text.count(fault.old)} times in {fault.file}, not once; update it")
        path.write_text(text.replace(fault.old, fault.new))
        said = Path(scratch) / "said"
        run = multiprocessing.get_context("forkserver").Process(target=_test, args=(scratch, command, said))
        run.start()
        run.join()
        if run.exitcode not in (GREEN, RED):
            raise SystemExit(f"{fault.name}: pytest could not run ({run.exitcode})\n{said.read_text()[-4000:]}")
        return run.exitcode == GREEN


def _test(scratch: str, tests: str, said: Path) -> None:
    """In a process of its own: the tests, with the package that lies in `scratch`."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"PYTHONPATH": scratch, "PYTHONSAFEPATH": "1"}  # of the processes that tests start
    sys.path.insert(0, scratch)
    os.chdir(ROOT)
    import pytest

    import rankflow

    assert Path(rankflow.__file__).is_relative_to(scratch), "it would be the package without a fault"
    # One seed for hypothesis: whether a fault is noticed must not hang on which examples it happens to draw.
    options = ("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0")
    options += ("-o", f"pythonpath={scratch} . tests/helpers")  # first, as processes that tests spawn look there
    options += ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of plugins that came with what is preloaded
    finished = _Finished()
    try:
        code = int(pytest.main([*options, *tests.split()], plugins=[finished]))
    except Exception:
        if not finished.at_all:
            raise
        code = 1  # what tests leave behind, such as an open file, is found after the last of them
    sys.exit(GREEN + code)


class _Finished:
    """A plugin that knows whether the tests have run."""

    at_all = False

    def pytest_sessionfinish(self) -> None:
        self.at_all = True


def main() -> None:
    console = Console()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    words = sys.argv[1:]
    chosen = [p for p in every_fault() if not words or any(w in p.fault.name or w in p.command for w in words)]
    unnoticed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fates = track(pool.map(survives, chosen), "faults", len(chosen), console=console)
        for planted, survived in zip(chosen, fates, strict=True):
            if survived:
                unnoticed += 1
                console.print(f"[red]unnoticed[/red] {planted.fault.name}: {planted.command} stayed green")
    console.print(f"{len(chosen) - unnoticed} of {len(chosen)} planted faults were noticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
