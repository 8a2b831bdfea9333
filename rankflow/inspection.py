"""What a saved adapter is made of: the spectrum of every module, and how much of the rank it uses."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rankflow.crew import Crew, Progress
from rankflow.formats.peft import PeftAdapter
from rankflow.linalg import Spectrum, spectrum
from rankflow.plan import Slot

ENERGY_AT = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class InspectedModule:
    """One module's spectrum.

    sigma: singular values of DeltaW, descending, root-sum-square over experts where there are several.
    rank_true: how many of them are more than rounding.
    rank_effective: exp of the entropy of sigma / sum(sigma), Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    rank_stable: sum(sigma^2) / sigma_1^2.
    energy: k -> share of sum(sigma^2) in the k largest.
    """

    name: str
    kind: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    params: int
    sigma: tuple[float, ...]
    rank_true: int
    rank_effective: float
    rank_stable: float
    energy: dict[int, float]


@dataclass(frozen=True)
class Inspection:
    source: str
    modules: tuple[InspectedModule, ...]
    params: int
    bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(src: str | Path, *, progress: Progress | None = None) -> Inspection:
    """Spectra of an adapter folder or file, as `squeeze` sees them.

    Raises:
        AdapterError: no LoRA adapter, damaged, or of a variant that cannot be resized.
    """
    adapter = PeftAdapter(src)
    layout = adapter.layout
    spectra = Crew(progress, len(layout)).each(
        lambda name: spectrum(*adapter.factors(name), layout[name].scaling), layout
    )
    return Inspection(
        source=str(adapter.path),
        modules=tuple(_module(name, slot, spectra[name]) for name, slot in layout.items()),
        params=layout.params,
        bytes=layout.bytes,
        file_bytes=adapter.file_bytes,
        notes=tuple(adapter.notes),
    )


def _module(name: str, slot: Slot, found: Spectrum) -> InspectedModule:
    gains = found.gains
    sigma = gains.sqrt()
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    entropy = float(-torch.special.xlogy(share, share).sum())
    zero = not bool(sigma[0] > 0)
    return InspectedModule(
        name=name,
        kind=slot.kind,
        rank=slot.rank,
        in_features=slot.in_features,
        out_features=slot.out_features,
        scaling=slot.scaling,
        params=slot.rank * slot.params_per_rank,
        sigma=tuple(sigma.tolist()),
        rank_true=found.rank,
        rank_effective=0.0 if zero else math.exp(entropy),
        rank_stable=0.0 if zero else float(gains.sum() / gains[0]),
        energy={k: found.energy(k) for k in ENERGY_AT},
    )
