"""How fast a saved adapter is squeezed: a synthetic one of 7B shape (224 modules, 4096 wide), rank 64 to 8.

The whole of `rankflow.squeeze`, file to file, for every kind of budget, against reading the source file and writing it
back with fsync, arms interleaved; where the time goes; anonymous memory, of an adapter of 70B shape too; and one module
against PEFT's `save_as_lora` and the randomised SVDs of torch, scikit-learn and fbpca, which take the product B A.

Run: python examples/benchmarks/squeeze_speed.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import console, interleave, interval, machine, table
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankflow
from rankflow.calibration.statistics import Statistics, digest
from rankflow.compress.each import squeeze_each
from rankflow.compress.target import Target
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.linalg.decompose import refactor, spectrum
from rankflow.linalg.parallel import Pool
from rankflow.linalg.svd import low_rank
from rankflow.plans.budget import Budget
from rankflow.policies.observation import Signal

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES_70B = (*[(8192, n) for n in (8192, 1024, 1024, 8192, 28672, 28672)], (28672, 8192))
LLAMA_70B = dict(zip((*ATTENTION, *MLP), SHAPES_70B, strict=True))
ALPHA = 2  # times the rank
WEIGHTS = "adapter_model.safetensors"


def factors(
    shape: tuple[int, int], rank: int, generator: torch.Generator, *, decades: float = 2
) -> tuple[Tensor, Tensor]:
    """A as at initialisation, and B whose columns fall by that many decades, two as training leaves them."""
    wide, high = shape
    A = torch.randn(rank, wide, generator=generator) / wide**0.5
    return A, torch.randn(high, rank, generator=generator) * torch.logspace(0, -decades, rank) / 100


def synthetic(folder: Path, shapes: Mapping[str, tuple[int, int]], layers: int, rank: int, dtype: torch.dtype) -> Path:
    """`shapes`: type of module -> (in, out)."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for kind, shape in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            A, B = factors(shape, rank, generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A.to(dtype), B.to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    kinds = [kind.rpartition(".")[2] for kind in shapes]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA * rank, "target_modules": kinds}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_statistics(source: Path) -> Statistics:
    """Averages as of 4096 tokens, the same for every module."""
    adapter = PeftAdapter(source)
    rank = next(iter(adapter.layout.values())).rank
    z, d = torch.randn(2, 4096, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    averages = {
        Signal.MEAN_ZZ: z.mT @ z / 4096,
        Signal.MEAN_DD: d.mT @ d / 4096,
        Signal.MEASURED: torch.full((rank,), 4096.0, dtype=torch.float64),
    }
    digests = Pool(None, 0).each(lambda name: digest(*adapter.factors(name)), adapter.layout)
    return Statistics(dict.fromkeys(digests, averages), digests, 4096)


def budgets(source: Path, k: int) -> dict[str, dict[str, Any]]:
    """Every kind of budget by its option; those with a number of their own keep ranks of 8 to 20 out of 64."""
    layout = PeftAdapter(source).layout
    params = sum(k * slot.params_per_rank for slot in layout.values())
    measured = random_statistics(source)
    return {
        f"--target-rank {k}": {"target_rank": k},
        f"--target-rank {k} --metric outputs": {"target_rank": k, "metric": "outputs", "calibration": measured},
        f"--target-rank {k} --metric loss": {"target_rank": k, "metric": "loss", "calibration": measured},
        "--plan (half the ranks 4, half 12)": {"ranks": {n: 12 if i % 2 else 4 for i, n in enumerate(layout)}},
        "--energy 0.9": {"energy": 0.9},
        "--energy 0.9 --across": {"energy": 0.9, "across": True},
        "--error 0.3": {"error": 0.3},
        "--error 0.3 --across": {"error": 0.3, "across": True},
        "--auto": {"auto": True},
        "--sv-ratio 4": {"sv_ratio": 4.0},
        "--sv-fro 0.95": {"sv_fro": 0.95},
        "--sv-cumulative 0.5": {"sv_cumulative": 0.5},
        f"--max-params {params}": {"max_params": params},
        f"--max-params {params} --metric loss": {"max_params": params, "metric": "loss", "calibration": measured},
        f"--size {params * 4 >> 20}MiB": {"size": params * 4},
        f"--budget mean_rank {k}": {"budget": Budget("mean_rank", k)},
    }


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
    shapes = dict.fromkeys((*ATTENTION, *MLP), (options.width, options.width))
    source = synthetic(folder / name, shapes, options.layers, options.rank, dtype)
    scratch, k = folder / "copy", options.target_rank

    def read(_: int) -> None:
        adapter = PeftAdapter(source)
        Pool(None, 0).each(adapter.factors, adapter.layout)

    def compute(_: int) -> None:
        adapter = PeftAdapter(source)

        def work(module: str) -> None:
            A, B = (t if dtype == torch.bfloat16 else t.double() for t in adapter.factors(module))
            found = spectrum(A, B, adapter.layout[module].scaling)
            cut = found.cut(k, "balanced")
            refactor(A, B, cut.N, cut.M, wide=found.wide)

        Pool(None, 0).each(work, adapter.layout)

    def squeeze(settings: dict[str, Any]) -> Callable[[int], None]:
        return lambda _: drop(rankflow.squeeze(source, folder / "small", force=True, **settings))

    def several(_: int) -> None:
        outs = [folder / f"small-{rank}" for rank in (4, 8, 16, 32)]
        squeeze_each(source, [Target(target_rank=rank) for rank in (4, 8, 16, 32)], outs, force=True)

    kinds = budgets(source, k)
    arms = {
        "read + fsync-write the source": lambda _: copy(source / WEIGHTS, scratch),
        "the same again (A/A)": lambda _: copy(source / WEIGHTS, scratch),
        **{option: squeeze(settings) for option, settings in kinds.items()},
        "--ranks 4,8,16,32 (four outputs)": several,
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
        limit = "<= 1.5" if arm in kinds else ""
        rows.append((arm, f"{median:.2f}", f"{low:.2f} to {high:.2f}", *(f"{x:.2f}" for x in ratio), limit))
    size = (source / WEIGHTS).stat().st_size
    table(
        f"{name}: {size / 1e6:.0f} MB, rank {options.rank} ({machine()})",
        ("arm", "seconds", "95 % interval", "ratio", "low", "high", "limit"),
        rows,
    )
    parts = [interval(times[arm])[0] for arm in ("read and check", "read and compute", f"--target-rank {k}")]
    console.print(
        f"of --target-rank {k}: read {parts[0]:.2f} s, compute {parts[1] - parts[0]:.2f} s, "
        f"write {parts[2] - parts[1]:.2f} s\n"
    )
    for used in (*folder.glob(f"{name}*"), *folder.glob("small*")):
        shutil.rmtree(used)


def drop(_: object) -> None:
    """Of what is timed only the time is kept."""


def memory(folder: Path, options: argparse.Namespace) -> None:
    """Anonymous memory of squeezing adapters of 7B and of 70B shape."""
    uniform = dict.fromkeys((*ATTENTION, *MLP), (options.width, options.width))
    shapes_70b, layers_70b = LLAMA_70B, 80
    if options.quick:
        shapes_70b, layers_70b = {kind: (w // 32, h // 32) for kind, (w, h) in LLAMA_70B.items()}, 2
    rows = []
    for title, shapes, layers in (("7B", uniform, options.layers), ("70B", shapes_70b, layers_70b)):
        source = synthetic(folder / "memory", shapes, layers, options.rank, torch.bfloat16)
        k, layout = options.target_rank, PeftAdapter(source).layout
        params = sum(k * slot.params_per_rank for slot in layout.values())
        megabytes = (source / WEIGHTS).stat().st_size / 1e6
        for option, target in (
            (f"--target-rank {k}", Target(target_rank=k)),
            ("--max-params", Target(max_params=params)),
        ):
            gc.collect()
            squeeze = partial(squeeze_each, source, [target], [folder / "small"], force=True)
            began = time.perf_counter()
            before, peak = peak_anonymous(squeeze)
            seconds = time.perf_counter() - began
            file = f"{megabytes:,.0f} MB, {len(layout)} modules"
            rows.append((title, file, option, f"{seconds:.1f}", f"{peak >> 20}", f"{(peak - before) >> 20}"))
        shutil.rmtree(source)
    table(
        "Anonymous memory, bfloat16; limit 1024 MiB",
        ("shape", "file", "", "seconds", "MiB at most", "MiB of it for this"),
        rows,
    )


# -- one module -----------------------------------------------------------------------------------------------------


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of L1 R1 - L2 R2 from the factors, in float64."""
    left = torch.cat([one[0], -other[0]], 1).double()
    right = torch.cat([one[1], other[1]], 0).double()
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT))


def one_module(folder: Path, options: argparse.Namespace, spectrum_name: str, decades: float) -> None:
    """One module against its peers. They are given B A, and the time to form it counts."""
    width, rank, k = options.width, options.rank, options.target_rank
    A, B = factors((width, width), rank, torch.Generator().manual_seed(0), decades=decades)
    whole = (ALPHA * B, A)
    core = torch.linalg.qr(whole[0].double()).R @ torch.linalg.qr(A.double().mT).R.mT
    optimum = float(torch.linalg.svdvals(core)[k:].square().sum().sqrt())

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

    def randomised(backend: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            U, S, Vh = low_rank(whole[0] @ whole[1], k, backend)
            return U * S, Vh

        return run

    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    model.save_pretrained(folder / "one")
    rows, threads = [], torch.get_num_threads()
    rivals = {
        "torch.svd_lowrank": (randomised("torch"), ">= 5"),
        "sklearn randomized_svd": (randomised("sklearn"), ""),
        "fbpca": (randomised("fbpca"), ""),
    }
    comparisons = [(in_memory, "in memory, 1 thread", rivals, options.repeats)]
    if options.peft_repeats:
        peft = {"peft save_as_lora": (with_peft, ">= 100")}
        comparisons.append((with_files, "file to file", peft, options.peft_repeats))
    for arm, how, others, repeats in comparisons:
        results: dict[str, tuple[Tensor, Tensor]] = {}

        def timed(label: str, work: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], None]:
            def run(_: int) -> None:
                results[label] = work()  # noqa: B023  # called within this turn of the loop

            return run

        torch.set_num_threads(1 if arm is in_memory else threads)
        arm()
        arms = {"rankflow": timed("rankflow", arm)} | {name: timed(name, work) for name, (work, _) in others.items()}
        times = interleave(arms, repeats)
        for label in arms:
            cells = ["", ""]
            if label in others:
                faster = interval([b / a for a, b in zip(times["rankflow"], times[label], strict=True)])
                cells = [f"{faster[0]:.0f} ({faster[1]:.0f} to {faster[2]:.0f})", others[label][1]]
            excess = distance(whole, results[label]) / optimum - 1
            milliseconds = f"{1e3 * interval(times[label])[0]:.1f}"
            rows.append((f"{label}, {how}", milliseconds, *cells, f"{100 * excess:.4f} %"))
    torch.set_num_threads(threads)
    table(
        f"One module, {width} x {width}, rank {rank} to {k}, {spectrum_name} spectrum",
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
    parser.add_argument("--peft-repeats", type=int, default=3, help="it takes the full SVD; 0 leaves it out")
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
        memory(Path(folder), options)
        one_module(Path(folder), options, "decaying", 2)
        one_module(Path(folder), options, "flat", 0)


if __name__ == "__main__":
    main()
