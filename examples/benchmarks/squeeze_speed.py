"""How fast a saved adapter is squeezed: a synthetic one of 7B shape (224 modules, 4096 wide), rank 64 to 8.

The whole of `rankflow.squeeze`, file to file, against reading the source file and writing it back with fsync, arms
interleaved; where the time goes; anonymous memory; and one module against PEFT's `save_as_lora` and
`torch.svd_lowrank`. Run: python examples/benchmarks/squeeze_speed.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import console, interleave, interval, machine, table
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankflow
from rankflow.crew import Crew
from rankflow.formats.peft import PeftAdapter
from rankflow.linalg import refactor, spectrum

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TYPES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALPHA = 2  # times the rank
WEIGHTS = "adapter_model.safetensors"


def factors(width: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A as at initialisation, and B whose columns fall by two decades, as training leaves them."""
    A = torch.randn(rank, width, generator=generator) / width**0.5
    return A, torch.randn(width, rank, generator=generator) * torch.logspace(0, -2, rank) / 100


def synthetic(folder: Path, layers: int, width: int, rank: int, dtype: torch.dtype) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in (f"base_model.model.model.layers.{i}.{t}" for i in range(layers) for t in TYPES):
        A, B = factors(width, rank, generator)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A.to(dtype), B.to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA * rank, "target_modules": [t[-6:] for t in TYPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def copy(source: Path, target: Path) -> None:
    data = source.read_bytes()
    with target.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def anonymous() -> int:
    """Bytes of this process that are no file's: what a squeeze costs in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def peak_anonymous(work: Callable[[], object]) -> tuple[int, int]:
    """(before, highest) anonymous bytes, looked at every millisecond while `work` runs."""
    before = highest = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return before, max(highest, anonymous())


def files(folder: Path, options: argparse.Namespace, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    source = synthetic(folder / name, options.layers, options.width, options.rank, dtype)
    scratch = folder / "copy"

    def squeeze(i: int = -1) -> None:
        rankflow.squeeze(source, folder / f"{name}-{i}", target_rank=options.target_rank)

    def read(_: int) -> None:
        adapter = PeftAdapter(source)
        Crew(None, 0).each(adapter.factors, adapter.layout)

    def compute(_: int) -> None:
        adapter = PeftAdapter(source)

        def work(module: str) -> None:
            A, B = (t if dtype == torch.bfloat16 else t.double() for t in adapter.factors(module))
            found = spectrum(A, B, adapter.layout[module].scaling)
            cut = found.cut(options.target_rank, "balanced")
            refactor(A, B, cut.N, cut.M, wide=found.wide)

        Crew(None, 0).each(work, adapter.layout)

    arms = {
        "read + fsync-write the source": lambda _: copy(source / WEIGHTS, scratch),
        "the same again (A/A)": lambda _: copy(source / WEIGHTS, scratch),
        "squeeze": squeeze,
        "read and check": read,
        "read and compute": compute,
    }
    for arm in arms.values():
        arm(options.repeats)
    times = interleave(arms, options.repeats)
    base = times["read + fsync-write the source"]
    rows = []
    for arm, seconds in times.items():
        median, low, high = interval(seconds)
        ratio = interval([a / b for a, b in zip(seconds, base, strict=True)])
        limit = "<= 1.5, <= 5 s" if arm == "squeeze" else ""
        rows.append((arm, f"{median:.2f}", f"{low:.2f} to {high:.2f}", *(f"{x:.2f}" for x in ratio), limit))
    size = (source / WEIGHTS).stat().st_size
    table(
        f"{name}: {size / 1e6:.0f} MB, rank {options.rank} to {options.target_rank} ({machine()})",
        ("arm", "seconds", "95 % interval", "ratio", "low", "high", "limit"),
        rows,
    )
    halves = [interval(times[arm])[0] for arm in ("read and check", "read and compute", "squeeze")]
    console.print(
        f"of the squeeze: read {halves[0]:.2f} s, compute {halves[1] - halves[0]:.2f} s, "
        f"write {halves[2] - halves[1]:.2f} s"
    )
    gc.collect()
    before, peak = peak_anonymous(squeeze)
    console.print(
        f"anonymous memory: {peak / 2**20:.0f} MiB at most, {(peak - before) / 2**20:.0f} MiB of it for this\n"
    )
    for used in folder.glob(f"{name}*"):
        shutil.rmtree(used)


# -- one module -----------------------------------------------------------------------------------------------------


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of L1 R1 - L2 R2 from the factors, in float64."""
    left = torch.cat([one[0], -other[0]], 1).double()
    right = torch.cat([one[1], other[1]], 0).double()
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT))


def one_module(folder: Path, options: argparse.Namespace) -> None:
    width, rank, k = options.width, options.rank, options.target_rank
    A, B = factors(width, rank, torch.Generator().manual_seed(0))
    whole = (ALPHA * B, A)
    core = torch.linalg.qr(whole[0].double()).R @ torch.linalg.qr(A.double().mT).R.mT
    optimum = float(torch.linalg.svdvals(core)[k:].square().sum().sqrt())

    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    model.save_pretrained(folder / "one")

    def saved(path: Path, scaling: float) -> tuple[Tensor, Tensor]:
        found = {key.split(".")[-2]: t for key, t in load_file(path / WEIGHTS).items()}
        return scaling * found["lora_B"], found["lora_A"]

    def with_files() -> tuple[Tensor, Tensor]:
        rankflow.squeeze(folder / "one", folder / "one-small", target_rank=k, force=True)
        return saved(folder / "one-small", ALPHA)

    def with_peft() -> tuple[Tensor, Tensor]:
        save_as_lora(folder / "one-peft", model, rank=k)
        return saved(folder / "one-peft", 1)

    def in_memory() -> tuple[Tensor, Tensor]:
        cut = spectrum(A, B, ALPHA).cut(k, "balanced")
        small_A, small_B = refactor(A, B, cut.N, cut.M)
        return ALPHA * small_B, small_A

    def randomised() -> tuple[Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(whole[0] @ whole[1], q=k + 10, niter=2)
        return U[:, :k] * S[:k], V[:, :k].mT

    rows, threads = [], torch.get_num_threads()
    for name, arm, rival, repeats, limit in (
        ("file to file", with_files, ("peft save_as_lora", with_peft), options.peft_repeats, ">= 100"),
        (
            "in memory, 1 thread",
            in_memory,
            ("torch.svd_lowrank, 10 extra, 2 iterations", randomised),
            options.repeats,
            ">= 5",
        ),
    ):
        results: dict[str, tuple[Tensor, Tensor]] = {}

        def timed(label: str, work: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], None]:
            def run(_: int) -> None:
                results[label] = work()  # noqa: B023  # called within this turn of the loop

            return run

        torch.set_num_threads(1 if arm is in_memory else threads)
        arm()
        times = interleave({"rankflow": timed("rankflow", arm), rival[0]: timed(rival[0], rival[1])}, repeats)
        faster = interval([b / a for a, b in zip(times["rankflow"], times[rival[0]], strict=True)])
        for label in ("rankflow", rival[0]):
            excess = distance(whole, results[label]) / optimum - 1
            rows.append(
                (
                    f"{label}, {name}",
                    f"{1e3 * interval(times[label])[0]:.1f}",
                    "" if label == "rankflow" else f"{faster[0]:.0f} ({faster[1]:.0f} to {faster[2]:.0f})",
                    "" if label == "rankflow" else limit,
                    f"{100 * excess:.5f} %",
                )
            )
    table(
        f"One module, {width} x {width}, rank {rank} to {k}",
        ("way", "milliseconds", "rankflow is faster by", "limit", "error over the optimum"),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--target-rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peft-repeats", type=int, default=3, help="it takes the full SVD of every module")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.repeats, options.peft_repeats = 2, 256, 3, 2
    warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for dtype in (torch.float32, torch.bfloat16):
            files(Path(folder), options, dtype)
        one_module(Path(folder), options)


if __name__ == "__main__":
    main()
