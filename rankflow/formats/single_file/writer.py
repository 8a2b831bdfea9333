"""Where one file keeps the modules of an adapter, and the writing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError
from rankflow.formats.base import Put, SavedModule
from rankflow.formats.io.atomic import atomic_file, is_plain
from rankflow.formats.io.outputs import check_file
from rankflow.formats.io.tensors import Spec, all_finite, open_tensors
from rankflow.formats.io.writers import SafetensorsWriter, header, tensor_writer
from rankflow.formats.single_file.keys import factor_of


@dataclass(frozen=True)
class Module(SavedModule):
    """One module that a single file keeps, or is to keep; `gain` is multiplied into up as it is written."""

    mid_key: str | None = None
    alpha_key: str | None = None
    alpha_dtype: torch.dtype = torch.float32
    alpha_shape: tuple[int, ...] = ()
    gain: float = 1.0

    def specs(self, rank: int, dtype: torch.dtype | None) -> dict[str, Spec]:
        found: dict[str, Spec] = {
            self.a_key: (dtype or self.dtype, (rank, *self.a_shape[1:])),
            self.b_key: (dtype or self.dtype, (self.b_shape[0], rank, *self.b_shape[2:])),
        }
        if self.alpha_key is not None:
            found[self.alpha_key] = self.alpha(rank).dtype, self.alpha_shape
        return found

    def alpha(self, rank: int) -> Tensor:
        """The alpha that keeps the scale at `rank`: in its own dtype if that holds it, else in float32."""
        value = torch.full(self.alpha_shape, self.slot.scaling * rank, dtype=torch.float64)
        own = value.to(self.alpha_dtype)
        return own if torch.equal(own.double(), value) else value.float()


Finish = Callable[[SafetensorsWriter, Path, Mapping[str, str]], None]  # what is to do once the tensors are written


def outline(modules: Mapping[str, Module], ranks: Mapping[str, int], dtype: torch.dtype | None) -> dict[str, Spec]:
    """Key -> type and shape of all factors and alphas at these ranks."""
    return {k: spec for name, m in modules.items() if ranks[name] for k, spec in m.specs(ranks[name], dtype).items()}


def overhead(specs: Mapping[str, Spec], metadata: Mapping[str, str], modules: Mapping[str, Module]) -> int:
    """Bytes of a file that are no factors; alphas count as float32, in which they may come to be written."""
    factors = {key for m in modules.values() for key in (m.a_key, m.b_key)}
    raw, _, _ = header(specs, metadata)
    rest = sum(d.itemsize * math.prod(shape) for key, (d, shape) in specs.items() if key not in factors)
    return len(raw) + rest + 4 * len(modules)


def check_single(out: Path, src: Path, *, force: bool) -> None:
    """Refuse a path that an adapter in one file cannot be written to.

    Raises:
        ConfigError: an adapter in one file cannot be written there, or would replace what is none.
    """
    check_file(out, src, force=force)
    if not out.is_file() or is_plain(out):
        return
    try:
        adapter = any(map(factor_of, open_tensors(out)[0]))
    except AdapterError:
        adapter = False
    if not adapter:
        raise ConfigError(f"{out}: is not an adapter, so --force does not replace it; choose another name")


@contextmanager
def write_single(
    out: Path,
    modules: Mapping[str, Module],
    ranks: Mapping[str, int],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    finish: Finish | None,
    extra: Mapping[str, Tensor],
) -> Iterator[Put]:
    """The file of these modules and `extra` tensors: yields ``put(name, A, B)``.

    Raises:
        ConfigError: a factor with its gain does not fit the type it is written in.
    """
    with atomic_file(out) as partial:
        writer = tensor_writer(partial, specs, metadata)

        def put(name: str, a: Tensor, b: Tensor) -> None:
            module = modules[name]
            if module.gain != 1:
                b = (b.to(torch.promote_types(b.dtype, torch.float32)) * module.gain).to(b.dtype)
                if not all_finite(b):
                    raise ConfigError(f"{name}: its factors times its scale {module.gain:g} do not fit {b.dtype}")
            for key, t in ((module.a_key, a), (module.b_key, b)):
                writer.put(key, t.reshape(specs[key][1]).to(specs[key][0]))

        yield put
        for name, module in modules.items():
            if ranks[name] and module.alpha_key is not None:
                writer.put(module.alpha_key, module.alpha(ranks[name]))
        for key, t in extra.items():
            writer.put(key, t)
        if finish is not None and isinstance(writer, SafetensorsWriter):
            finish(writer, partial, metadata)
        writer.close()
