"""Damaged files for every reader, and a process that reads them: `python tests/helpers/fuzzing.py --seed 0 --count
300`.

A case is a reader and a number; everything about it is drawn from the two, so that what a failure prints is enough to
make it again. The process announces each case before it begins, so that one that kills it is known too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from damage import harm, harm_bytes
from gguf import GGUFReader
from rich.console import Console
from typer.testing import CliRunner
from whole_files import READERS, Files, put

from rankflow import ConfigError, RankFlowError, canonicalize, diff, expand, inspect, pad, squeeze
from rankflow.cli.app import app
from rankflow.compress.plan_file import read_budget, read_plan
from rankflow.compress.quantized import load_quantized
from rankflow.formats.open import open_adapter
from rankflow.plans.layout import Layout
from rankflow.render.watch import view
from rankflow.training.checkpoint import load_state, saved_layout
from rankflow.training.ledger import Ledger

SECONDS = 20.0  # that one file may take, on a busy machine; most take a hundredth of one
MEMORY = 1 << 30  # bytes that the process may grow by, for files of a few kilobytes


class Wrong(Exception):
    """What a reader must not do."""


def _checked(src: Path, out: Path) -> None:
    """An output reads back: finite, of the ranks that its report claims, of the ranks claimed."""
    adapter = open_adapter(out)
    for name in adapter.layout:
        a, b = adapter.factors(name)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise Wrong(f"{name} of the output is not finite")
        if a.shape[-2] != b.shape[-1]:
            raise Wrong(f"{name} of the output has {a.shape} and {b.shape}")


def _squeeze(src: Path, out: Path, rng: random.Random, **options: Any) -> None:
    if not options:
        options = rng.choice(
            [
                {"target_rank": 2},
                {"target_rank": 2},
                {"energy": 0.7},
                {"max_params": 60},
                {"auto": True},
                {"size": 3000},
            ]
        )
        options = options | rng.choice(
            [{}, {}, {"dtype": "float16"}, {"gauge": "keep"}, {"to_format": "peft"}, {"to_format": "kohya"}]
        )
        options = options | rng.choice(
            [{}, {}, {}, {"engine": "vllm"}] if not options.keys() & {"to_format", "size"} else [{}]
        )
    base = _base_of(src)
    if out.suffix != src.suffix and options.get("to_format") != "peft":
        out = out.with_suffix(src.suffix)
    report = squeeze(src, out, base=base, **options)
    json.dumps(report.to_json(), allow_nan=False)
    _checked(src, out)
    found = open_adapter(out).layout.ranks
    padded = "engine" in options
    if not padded and sorted(found.values()) != sorted(r for r in report.ranks.values() if r):
        raise Wrong(f"claimed {report.ranks}, wrote {found}")
    if padded or "to_format" in options or options.get("dtype") or "metric" in options:
        return
    if open_adapter(src, base=base).sketch is not None:  # of which full matrices are compared with nothing
        return
    for m in diff(src, out, base=base).modules:
        claimed = next(r for r in report.modules if r.name == m.name)
        if abs(m.distance - claimed.error) > 1e-2 * m.norms[0] + 1e-30:
            raise Wrong(f"{m.name}: claimed to change by {claimed.error}, changed by {m.distance} of {m.norms[0]}")


def _base_of(src: Path) -> Path | None:
    """The base model's folder, where the reader has one: in the adapter's folder, or beside the model's."""
    return next((folder for folder in (src / "base", src.parent / "base") if folder.is_dir()), None)


def _by_command(*args: object) -> None:
    result = CliRunner(env={"RANKFLOW_TRACEBACK": "1"}).invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in (0, 1, 2) or "Traceback" in result.output:
        raise Wrong(f"status {result.exit_code}: {result.output}")
    if result.exit_code == 2:
        raise ConfigError(result.stderr.removeprefix("rankflow: ").rstrip("\n"))


def operate(reader: str, src: Path, out: Path, rng: random.Random) -> str:
    """Something that reads the file; what it was."""
    target = src if (src / "adapter_config.json").is_file() else next(p for p in src.iterdir() if p.name != "base")
    base = _base_of(target)
    given = [] if base is None else ["--base", base]
    if reader == "residual":
        kept = src.parent / "residual.safetensors"
        if rng.random() < 0.2:
            _by_command("expand", src, kept, "-o", out)
        else:
            expand(src, kept, out)
            _checked(src, out)
        return "expand"
    if reader == "statistics":
        stats = src / "stats.safetensors"
        metric = rng.choice(["outputs", "loss"])
        _squeeze(src, out, rng, calibration=stats, metric=metric, **rng.choice([{"target_rank": 2}, {"energy": 0.7}]))
        return f"squeeze by {metric}"
    if reader == "plan":
        if rng.random() < 0.2:
            _by_command("squeeze", src, "--plan", src / "plan.yaml", "-o", out)
            return "squeeze --plan"
        _squeeze(src, out, rng, ranks=read_plan(src / "plan.yaml"))
        return "plan"
    if reader == "budget":
        if rng.random() < 0.3:
            _by_command("squeeze", src, "--budget", src / "budget.yaml", "-o", out, *rng.choice([[], ["--exact"]]))
            return "squeeze --budget"
        budget, limits = read_budget(src / "budget.yaml")
        _squeeze(src, out, rng, limits=limits, **({"energy": 0.7} if budget is None else {"budget": budget}))
        return "budget"
    if reader == "ledger":
        if rng.random() < 0.3:
            _by_command("report", src / "rankflow.jsonl", "-o", out.with_suffix(".png"))
            return "report"
        read = Ledger.read(src / "rankflow.jsonl")
        read.history()
        read.layout()
        Console(file=io.StringIO(), markup=False).print(view(Ledger.read(src / "rankflow.jsonl", times=True), 2e9))
        return "read"
    if reader == "gguf":
        out = out.with_suffix(".gguf")
        if rng.random() < 0.2:
            _by_command("squeeze", src, "--target-rank", 2, "--engine", "llamacpp", "--base", src / "base", "-o", out)
        else:
            squeeze(
                src, out, base=src / "base", **rng.choice([{"engine": "llamacpp"}, {"to_format": "gguf"}]), energy=0.7
            )
            GGUFReader(out)
        return "squeeze to gguf"
    if reader == "quantized":
        load_quantized(src)
        return "load"
    if reader == "checkpoint":
        state = load_state(src)
        if state is None or state["step"] != 3:
            raise Wrong("what was damaged was read")
        saved_layout(src, Layout.from_json(state["layout"]))
        return "resume"
    way = rng.choice(["squeeze"] * 5 + ["inspect", "diff", "canonicalize", "pad", "check", "squeeze --dry-run", "show"])
    if way == "squeeze":
        _squeeze(target, out, rng)
    elif way == "inspect":
        json.dumps(inspect(target, base=base).to_json(), allow_nan=False)
    elif way == "diff":
        diff(target, target, base=base)
    elif way == "canonicalize":
        canonicalize(target, out.with_suffix(target.suffix), base=base)
        _checked(target, out.with_suffix(target.suffix))
    elif way == "pad":
        pad(target, out.with_suffix(target.suffix), rank=8, base=base)
        _checked(target, out.with_suffix(target.suffix))
    elif way == "check":
        engine = rng.choice(["vllm", "sglang", "lorax", "tensorrt-llm", "llamacpp", "comfyui"])
        _by_command("check", target, "--engine", engine, *given)
    elif way == "squeeze --dry-run":
        _by_command("squeeze", target, "--target-rank", 2, "--dry-run", "--report", out.with_suffix(".json"), *given)
    else:
        _by_command("inspect", target, *rng.choice([[], ["--json"]]), *given)
    return way


def run(reader: str, seed: int, whole: Mapping[str, Files], work: Path) -> str | None:
    """One case; what went wrong, if anything."""
    rng = random.Random(f"{reader} {seed}")
    files, marker = dict(whole[reader]), work / "marker"
    how = harm(rng, files, marker)
    if rng.random() < 0.2:  # and once more, blindly
        name = rng.choice(list(files))
        files[name] = harm_bytes(rng, files[name])
        how += f" + {name}: bytes"
    case = work / "case"
    case.mkdir()
    src = put(case / "src", files)
    if reader == "residual":
        (src / "residual.safetensors").rename(case / "residual.safetensors")
    before = {p: p.read_bytes() for p in case.rglob("*") if p.is_file()}
    out, began, said = case / "out", time.process_time(), None
    torch.manual_seed(0)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("error")
            operate(reader, src, out, rng)
    except RankFlowError as e:
        said = str(e)
        if str(case) not in said:
            return f"{how}: the message does not name the file: {said[:300]}"
        if len(said) > 5000 or (reader not in ("plan", "budget") and not said.isprintable()):
            return f"{how}: the message is not one clear line: {said[:300]!r}"
    except BaseException as e:
        return f"{how}: {type(e).__name__}: {str(e)[:300]}\n{''.join(traceback.format_tb(e.__traceback__)[-4:])}"
    finally:
        left = {p for p in case.rglob("*") if p.is_file()} - before.keys()
        folders = {p.relative_to(case).parts[0] for p in case.rglob("*")}
        harmed = [p for p, raw in before.items() if not p.is_file() or p.read_bytes() != raw]
        shutil.rmtree(case)
    if marker.exists():
        marker.unlink()
        return f"{how}: code was run"
    if harmed:
        return f"{how}: {harmed[0]} was changed"
    if (said is not None and left) or any(part.startswith(".") for part in folders):
        return f"{how}: {said!r} and yet there are {sorted(map(str, left))}, {folders}"
    took = time.process_time() - began
    return f"{how}: took {took:.1f} s" if took > SECONDS / 2 else None


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=300)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--readers", nargs="*", default=list(READERS))
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        work = Path(name)
        whole = {reader: READERS[reader]() for reader in given.readers}
        for reader in given.readers:  # what is not damaged is read, and everything heavy is imported
            src = put(work / "whole", whole[reader])
            if reader == "residual":
                (src / "residual.safetensors").rename(work / "residual.safetensors")
            with contextlib.redirect_stdout(io.StringIO()):
                operate(reader, src, work / "out", random.Random(1))
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for i in range(given.first, given.first + given.count):
            reader = given.readers[i % len(given.readers)]
            print(f"case {reader!r} {given.seed + i}", flush=True)
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # of a wall clock, beside other work
            if problem := run(reader, given.seed + i, whole, work):
                print(f"WRONG {reader!r} {given.seed + i}: {problem}", flush=True)
            faulthandler.cancel_dump_traceback_later()
    print("done", flush=True)


if __name__ == "__main__":
    main()
