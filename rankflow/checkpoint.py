"""Adapters that are not training: squeeze a saved one to a smaller rank, or look into it. No base model is needed.

rankflow.squeeze("out/checkpoint-500", target_rank=8)        # writes out/checkpoint-500-r8
rankflow.squeeze("out/checkpoint-500", "small", energy=0.9)  # ranks that keep 90 % of every module's energy
rankflow.inspect("out/checkpoint-500").modules[0].rank_effective
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rankflow.crew import Crew, Progress
from rankflow.errors import ConfigError
from rankflow.formats.peft import PeftAdapter
from rankflow.formats.tensors import all_finite, check_destination
from rankflow.growth import new_rows
from rankflow.linalg import Gauge, Spectrum, refactor, spectrum
from rankflow.plan import Drop, Grow, Layout, Op, RankPlan, Refactor
from rankflow.rsvd import Backend, check_backend
from rankflow.seeds import keyed_generator
from rankflow.squeezed import SqueezeReport, Target, report

__all__ = ["SqueezeReport", "Target", "squeeze", "squeeze_model"]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def squeeze(
    src: str | Path,
    out: str | Path | None = None,
    *,
    target_rank: int | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    metric: str = "weights",
    backend: Backend = "exact",
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    gauge: Gauge = "balanced",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SqueezeReport:
    """The best adapter of smaller rank, from one saved by PEFT; the source is only read.

    Every module becomes the truncated SVD of its DeltaW (LoRA-Squeeze, arXiv 2602.10993, computed exactly from r x r
    matrices), with its scaling unchanged. See `Target` for the three targets, of which one is to be given. Modules at
    or below their new rank stay as they are, bit for bit. A uniform `target_rank` keeps directions that are zero, so
    that a fresh adapter (B = 0) still learns afterwards; the other targets drop them.

    Args:
        src: adapter folder, or its `.safetensors` or `.bin` file with `adapter_config.json` beside it.
        out: folder to write; `<src>-r8` and the like beside the source if left out.
        metric: `weights`; the other metrics need statistics of data, which no file has.
        backend: `exact`, or a randomised SVD of the full update, as the paper's (`rankflow.rsvd`).
        dtype: of the factors written (`float32`, `bfloat16`, `float16`); that of the source if left out.
        gauge: `balanced` splits singular values evenly between A and B; `keep` keeps |A| / |B|.
        force: replace `out` if it is an adapter folder.
        dry_run: compute the report and write nothing.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: a source that is no LoRA adapter, damaged, or of a variant that cannot be resized.
    """
    began = time.perf_counter()
    target = Target(target_rank, energy, max_params)
    _check_metric(metric)
    check_backend(backend)
    where, wanted = _device(device), _dtype(dtype)
    adapter = PeftAdapter(src)
    out = Path(out) if out is not None else _beside(adapter, target)
    if not dry_run:
        check_destination(out, adapter.path, force=force)
    layout = adapter.layout
    passes = 2 if target_rank is None and not dry_run else 1
    crew = Crew(progress, passes * len(layout))

    def factors(name: str) -> tuple[Tensor, Tensor]:
        a, b = (t.to(where) for t in adapter.factors(name))
        if backend == "exact" and torch.bfloat16 not in (a.dtype, b.dtype):
            return a.double(), b.double()  # once for all; bfloat16 may do with less
        return a, b

    def measure(name: str) -> Spectrum:
        return spectrum(*factors(name), layout[name].scaling, backend=backend)

    spectra = {} if target_rank is not None and not dry_run else crew.each(measure, layout)
    ranks = target.ranks(layout, spectra)

    def write(name: str, put: Callable[[str, Tensor, Tensor], None]) -> Spectrum:
        dtype = wanted or adapter.entries[name].dtype
        a, b = factors(name)
        found = spectra.get(name) or spectrum(a, b, layout[name].scaling, backend=backend)
        if 0 < ranks[name] < layout[name].rank:
            a, b = _cut(found, a, b, ranks[name], gauge, name, layout[name].kind)
        if ranks[name]:
            put(name, _round(a, dtype, name), _round(b, dtype, name))
        return found

    if not dry_run:
        with adapter.rewrite(out, ranks, dtype=wanted, force=force) as put:
            spectra = crew.each(lambda name: write(name, put), layout)
    after = Layout({n: replace(s, rank=ranks[n], itemsize=(wanted or s).itemsize) for n, s in layout.items()})
    return report(
        layout,
        after,
        spectra,
        source=str(adapter.path),
        out=None if dry_run else str(out),
        target=target.given,
        backend=backend,
        gauge=gauge,
        dtype=None if wanted is None else _name(wanted),
        dry_run=dry_run,
        file_bytes_before=adapter.file_bytes,
        file_bytes_after=None if dry_run else (out / f"adapter_model{adapter.weights.suffix}").stat().st_size,
        copied=() if dry_run else tuple(file.name for file in adapter.companions),
        notes=(*adapter.notes, *_notes(layout, ranks)),
        seconds=time.perf_counter() - began,
    )


def squeeze_model(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    metric: str = "weights",
    backend: Backend = "exact",
    gauge: Gauge = "keep",
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str = "default",
    progress: Progress | None = None,
) -> SqueezeReport:
    """`squeeze` for an adapter in memory: the model's factors, its PEFT config and, if given, the optimizer's state
    shrink in place. Save afterwards with `model.save_pretrained`.

    Raises:
        ConfigError: an impossible or contradictory option.
        AdapterError: no such adapter, or one that cannot be resized; the model is as it was.
        OptimizerError: an optimizer that does not hold the adapter, or whose state nobody knows how to carry.
    """
    from rankflow.adapters import Adapter  # imports peft, which files do not need
    from rankflow.surgeon import Surgeon

    began = time.perf_counter()
    target = Target(target_rank, energy, max_params)
    _check_metric(metric)
    check_backend(backend)
    adapter = Adapter(model, adapter_name)
    surgeon = Surgeon(adapter, optimizer)
    layout = Layout({name: slot for name, slot in adapter.layout().items() if slot.rank})

    def measure(name: str) -> Spectrum:
        site = adapter.sites[name]
        return spectrum(site.a(), site.b(), layout[name].scaling, backend=backend)

    spectra = Crew(progress, len(layout)).each(measure, layout)
    ranks = target.ranks(layout, spectra)
    ops: dict[str, list[Op]] = {}
    for name, rank in ranks.items():
        if rank == 0:
            ops[name] = [Drop()]
        elif rank < layout[name].rank:
            cut = spectra[name].cut(rank, gauge)
            ops[name] = [Refactor(cut.N, cut.M), *([Grow(cut.fresh)] if cut.fresh else [])]
    after = surgeon.apply(RankPlan(ops, f"squeeze to {target.given}"))
    return report(
        layout,
        Layout({name: after[name] for name in layout}),
        spectra,
        source=f"adapter {adapter_name!r} of {type(model).__name__}",
        out=None,
        target=target.given,
        backend=backend,
        gauge=gauge,
        dtype=None,
        dry_run=False,
        notes=_notes(layout, ranks),
        seconds=time.perf_counter() - began,
    )


def _check_metric(metric: str) -> None:
    if metric != "weights":
        raise ConfigError(
            f"metric {metric!r} needs statistics of data, which an adapter alone does not have; use metric 'weights', "
            "or squeeze while training with policy squeeze"
        )


def _notes(layout: Layout, ranks: Mapping[str, int]) -> tuple[str, ...]:
    notes = []
    if ranks == layout.ranks:
        notes.append("no module is above its target, so all factors are as they were")
    if left := [name for name, rank in ranks.items() if not rank]:
        notes.append(f"left the adapter, being zero or not worth a direction: {', '.join(left)}")
    return tuple(notes)


def _cut(found: Spectrum, A: Tensor, B: Tensor, rank: int, gauge: Gauge, name: str, kind: str) -> tuple[Tensor, Tensor]:
    """The best factors of that rank; rows that A has no room for are drawn afresh, beside zero columns of B."""
    cut = found.cut(rank, gauge)
    a, b = refactor(A, B, cut.N, cut.M, wide=found.wide)
    if cut.fresh:
        rows = new_rows(cut.fresh, a, keyed_generator(0, 0, name), kind=kind)
        a, b = torch.cat([a, rows], -2), torch.cat([b, b.new_zeros(*b.shape[:-1], cut.fresh)], -1)
    return a, b


def _round(t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = t.to(dtype)
    if not all_finite(rounded):
        raise ConfigError(
            f"{name}: values up to {float(t.abs().max()):.3g} do not fit {_name(dtype)}; use bfloat16 or float32"
        )
    return rounded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _beside(adapter: PeftAdapter, target: Target) -> Path:
    """`<src>-r8` and the like: beside the adapter's folder, or beside the file where it has a name of its own."""
    base = adapter.folder if adapter.weights.stem == "adapter_model" else adapter.weights.with_suffix("")
    if base.name in ("", ".."):
        base = base.resolve()
    return base.with_name(f"{base.name}-{target.suffix}")


def _device(device: str) -> torch.device:
    """A device to compute on, in float64 and with real numbers."""
    try:
        torch.zeros(1, device=device, dtype=torch.float64).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return found
