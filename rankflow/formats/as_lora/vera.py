"""PEFT's VeRA and PVeRA read as plain LoRA, exactly: DeltaW = diag(b) B[:out] diag(d) A[:, :in] of random A and B that
all modules share, and vectors b and d of their own.

PVeRA is that with the first half of d and of A's rows, the means, which is what it computes outside of training unless
asked to sample.

How wide a module's inputs are is not in the file, so the base model's is looked at; likewise where the shared matrices
were not saved, which PEFT draws anew, as large as the largest module needs, from `projection_prng_key`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.as_lora.loha_lokr import wide
from rankflow.formats.as_lora.parts import PREFIX, SHARED, Factors, Folded, Form, Parts, folded, number, whole
from rankflow.formats.base import WIDE
from rankflow.formats.io.models import is_model, open_model, weight_of


def fold_vera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> Folded:
    """Return the LoRA that a VeRA adapter equals.

    Raises:
        AdapterError: tensors and config that make no VeRA adapter, or one of another base.
        ConfigError: the base model is needed and not at hand.
    """
    return _fold("vera", "VeRA", config, tensors, path, base)


def fold_pvera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> Folded:
    """Return the LoRA that a PVeRA adapter equals.

    Raises:
        AdapterError: as `fold_vera`, or an adapter that computes something else each time.
        ConfigError: as `fold_vera`.
    """
    if config.get("sample_at_inference"):
        raise AdapterError(f"{path}: sample_at_inference makes this PVeRA draw its update anew for every input")
    return _fold("pvera", "PVeRA", config, tensors, path, base)


def _fold(
    stem: str, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, base: Path | None
) -> Folded:
    parts = Parts(tensors, [f"{stem}_{part}" for part in ("lambda_b", "lambda_d", "A", "B")], kind, path)
    rank = int(number(config, "r", path))
    halves = 1 + (stem == "pvera")
    vectors = {m: parts.of(m, f"{stem}_lambda_b", f"{stem}_lambda_d") for m in parts.modules}
    for m, (b, d) in vectors.items():
        parts.require(m, b.ndim == d.ndim == 1 and len(d) == halves * rank)
    widths = {}
    shapes = shapes_of(vectors, base or base_of(config, path, kind), path)
    if rank > max(WIDE, *map(min, shapes.values())):  # what is drawn would take more memory than all there is
        raise AdapterError(f"{path}: rank {rank} is above what any module's shape can hold; the adapter is damaged")
    for m, shape in shapes.items():
        out = len(vectors[m][0])
        if out not in shape:
            raise no_module(m, path)
        widths[m] = shape[1] if shape[0] == out else shape[0]
    outs, ins = max(len(b) for b, _ in vectors.values()), max(widths.values())
    if SHARED in parts:
        A, B = parts.of(SHARED, f"{stem}_A", f"{stem}_B")
    else:
        A, B = _drawn(stem, whole(config, "projection_prng_key", path), rank, ins, outs)
    parts_fit = A.ndim == B.ndim == 2 and len(A) == halves * rank and B.shape[1] == rank
    if not parts_fit or A.shape[1] < ins or len(B) < outs:
        raise AdapterError(
            f"{path}: the shared matrices {list(A.shape)} and {list(B.shape)} are too small for rank {rank}, {ins} "
            f"inputs and {outs} outputs; this is another base model's adapter, or the file is damaged"
        )
    modules = {
        m: Factors(
            rank,
            lambda d=d, n=widths[m]: (wide(d)[:, None] * wide(A[:, :n]))[:rank],
            lambda b=b: wide(b)[:, None] * wide(B[: len(b)]),
            rank * max(len(b), widths[m]),
        )
        for m, (b, d) in vectors.items()
    }
    return folded(config, modules, parts.rest, [f"{kind}, read as the plain LoRA that it equals"], path)


def base_of(config: Mapping[str, Any], path: Path, kind: str) -> Path:
    """Return the folder of the base model that the adapter names.

    Raises:
        ConfigError: it names none that is here.
    """
    named = config.get("base_model_name_or_path")
    if not named or not is_model(Path(named)):
        raise ConfigError(
            f"{path}: {kind} does not say how wide the inputs of its modules are; give its base model's folder with "
            "--base"
        )
    return Path(named)


def shapes_of(modules: Iterable[str], base: Path, path: Path) -> dict[str, tuple[int, int]]:
    """Return module -> shape of the base model's weight, which is [in, out] in transformers' Conv1D.

    Raises:
        AdapterError: the base has no such module.
        ConfigError: no base model there.
    """
    tensors = open_model(base)
    shapes = {}
    for module in modules:
        weight = weight_of(tensors, module.removeprefix(PREFIX))
        if weight is None or weight.ndim != 2 or not weight.numel():
            raise no_module(module, path)
        shapes[module] = (weight.shape[0], weight.shape[1])
    return shapes


def no_module(module: str, path: Path) -> AdapterError:
    name = module.removeprefix(PREFIX)
    return AdapterError(f"{path}: the base model has no such linear layer as {name}; give the base it was trained on")


def _drawn(stem: str, seed: int, rank: int, ins: int, outs: int) -> tuple[Tensor, Tensor]:
    """Return the shared matrices as PEFT draws them, if they were not saved."""
    generator = torch.Generator().manual_seed(seed)
    halves = 1 + (stem == "pvera")
    bounds = (math.sqrt(6 / ins), math.sqrt(6 / rank))  # He's uniform distribution, by the number of columns
    return (
        torch.empty(halves * rank, ins).uniform_(-bounds[0], bounds[0], generator=generator),
        torch.empty(outs, rank).uniform_(-bounds[1], bounds[1], generator=generator),
    )


FORMS = (Form("VERA", fold_vera, needs_base=True), Form("PVERA", fold_pvera, needs_base=True))
