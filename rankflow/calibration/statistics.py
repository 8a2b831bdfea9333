"""Statistics of data on an adapter's modules: r x r averages of each, in memory or in a small file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.io.atomic import atomic_file, is_plain
from rankflow.formats.io.outputs import Reads, check_output
from rankflow.formats.io.tensors import open_tensors
from rankflow.plans.layout import Layout
from rankflow.policies.metrics import Measured, averages_of
from rankflow.policies.observation import AVERAGED, Signal

_HEADER = "rankflow_statistics"  # in the metadata of a file
_NO_STATISTICS = "is not a statistics file; `rankflow calibrate` writes one"
_ROUNDING = 1e-9  # of the largest entry: how far from symmetric and positive a sum of z z^T may be


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1] = 1
    tokens: NonNegativeInt
    batches: NonNegativeInt | None
    base: str
    data: str
    digests: dict[str, str]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Averages of every module of one adapter, over tokens of data, and what tells that it is this adapter.

    `measured`: module -> `MEAN_ZZ` ``[r, r]`` (z z^T, z = A x), `MEASURED` ``[r]`` (tokens) and, where there was a
    loss, `MEAN_DD` ``[r, r]`` (d d^T of the loss summed over tokens), float64. `digests`: module -> SHA-256 of its
    factors. `tokens`: those of the module that had most; `batches`: None where averages come from a training run.
    """

    measured: Mapping[str, Measured]
    digests: Mapping[str, str]
    tokens: int
    batches: int | None = None
    base: str = ""
    data: str = ""

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a `.safetensors` file, whole or not at all.

        Raises:
            ConfigError: another kind of name, or a file that is there already and `force` was not given.
        """
        from safetensors.torch import save

        path = Path(path)
        check_statistics_file(path, force=force)
        tensors = {f"{name}.{s.value}": t.cpu().contiguous() for name, m in self.measured.items() for s, t in m.items()}
        header = _Header(
            tokens=self.tokens, batches=self.batches, base=self.base, data=self.data, digests=dict(self.digests)
        )
        with atomic_file(path) as partial:
            partial.write_bytes(save(tensors, {_HEADER: header.model_dump_json()}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """
        Raises:
            AdapterError: no such file, damaged, or no statistics.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise AdapterError(f"{path}: {_NO_STATISTICS}")
        tensors, metadata = open_tensors(path)
        try:
            header = _Header.model_validate_json(metadata[_HEADER])
        except KeyError:
            raise AdapterError(f"{path}: {_NO_STATISTICS}") from None
        except ValidationError as e:
            problem = e.errors()[0]
            where = ".".join(map(str, problem["loc"]))[:200] or "header"
            where = where if where.isprintable() else ascii(where)
            raise AdapterError(f"{path}: {where} of the statistics: {problem['msg']}; calibrate again") from None
        names = [f"{name}.{s.value}" for name in header.digests for s in (Signal.MEAN_ZZ, Signal.MEASURED)]
        losses = [f"{name}.{Signal.MEAN_DD.value}" for name in header.digests]
        if set(tensors) not in ({*names}, {*names, *losses}) or not names:
            odd = sorted({*names, *losses} ^ set(tensors)) or ["everything"]
            raise AdapterError(f"{path}: {odd[0]} does not go with the statistics' list of modules; calibrate again")
        measured = {
            name: {s: t for s in AVERAGED if (t := tensors.get(f"{name}.{s.value}")) is not None}
            for name in header.digests
        }
        for name, averages in measured.items():
            if problem := _problem(averages):
                raise AdapterError(f"{path}: {name}: {problem}; the statistics are damaged, calibrate again")
        return cls(measured, header.digests, header.tokens, header.batches, header.base, header.data)

    def check(self, layout: Layout, metric: str) -> None:
        """
        Raises:
            ConfigError: these are the statistics of an adapter with other modules or ranks, or lack what `metric`
                takes.
        """
        ranks = {name: len(m[Signal.MEASURED]) for name, m in self.measured.items()}
        for name in [*layout, *ranks]:
            one, other = layout[name].rank if name in layout else None, ranks.get(name)
            if one != other:
                raise ConfigError(
                    f"these are the statistics of another adapter: {name} has rank {_rank(other)} in them and "
                    f"{_rank(one)} here; calibrate this one"
                )
        lacking = averages_of(metric) - {s for m in self.measured.values() for s in m}
        if lacking:
            raise ConfigError(
                f"metric {metric!r} takes gradients of a loss, and these statistics were collected without one; "
                "calibrate with metric 'loss', or use 'outputs'"
            )

    def check_factors(self, name: str, A: Tensor, B: Tensor) -> None:
        """
        Raises:
            ConfigError: module `name` was measured with other factors than A and B.
        """
        if self.digests[name] != digest(A, B):
            raise ConfigError(
                f"these are the statistics of another adapter: the factors of {name} are not those that were "
                "measured; calibrate this one"
            )


def check_statistics_file(path: Path, reads: Reads | None = None, *, force: bool) -> None:
    """
    Raises:
        ConfigError: statistics cannot be written there.
    """
    if path.suffix != ".safetensors" and not is_plain(path):
        raise ConfigError(f"{path}: statistics are a .safetensors file; give it such a name")
    check_output(path, reads, force=force)


def digest(A: Tensor, B: Tensor) -> str:
    """Return the SHA-256 of canonical factors as float32, which is what a live adapter holds whatever its file does."""
    found = hashlib.sha256()
    for factor in (A, B):
        numbers = factor.detach().to("cpu", torch.float32).contiguous()
        found.update(repr(list(numbers.shape)).encode())
        found.update(numbers.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _problem(averages: Measured) -> str | None:
    """Return why the averages of one module cannot be averages, or None."""
    measured = averages[Signal.MEASURED]
    rank = measured.numel()
    if measured.dim() != 1 or not rank or measured.dtype != torch.float64:
        return f"measured is {measured.dtype} {list(measured.shape)}"
    if not bool(measured.isfinite().all() & (measured >= 0).all()):
        return "measured is not a number of tokens"
    for signal in averages.keys() - {Signal.MEASURED}:
        S = averages[signal]
        if S.shape != (rank, rank) or S.dtype != torch.float64:
            return f"{signal.value} is {S.dtype} {list(S.shape)}, beside {rank} directions"
        size = float(S.abs().max())
        if not size < torch.inf:
            return f"{signal.value} holds NaN or infinity"
        if float((S - S.mT).abs().max()) > _ROUNDING * size or _least(S) < -_ROUNDING * size * rank:
            return f"{signal.value} is no average of products of a vector with itself"
    return None


def _least(S: Tensor) -> float:
    return float(torch.linalg.eigvalsh(S)[0])


def _rank(rank: int | None) -> str:
    return "none" if rank is None else str(rank)
