"""Read and write the integers that a quantised adapter is made of, in one file beside it, which stays plain LoRA.

`rankflow_quantized.safetensors` holds, of every module, `<module>.A`, `<module>.B` and `<module>.E`, flattened and as
narrow as their bits allow (2- and 4-bit numbers share bytes, the first in the lowest bits), and `<module>.step`,
float32 ``[3]``. Bits and shapes are JSON in the file's metadata. There is no zero point:

    A' = (E step_E) (A step_A), row by row,    B' = B step_B

each product rounded to float32, and the results to the adapter's type, are the tensors of `adapter_model.safetensors`,
bit for bit. A is ``[*experts, r, in]``, B ``[*experts, out, r]``, E ``[r]``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rankflow.errors import AdapterError, CheckpointError, ConfigError
from rankflow.formats.io.atomic import atomic_file
from rankflow.formats.io.outputs import check_output
from rankflow.formats.io.strict_json import strict_loads
from rankflow.formats.io.tensors import open_tensors
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.training.controller import Controller

FILE = "rankflow_quantized.safetensors"
FORMAT = 1
_TENSORS = ("A", "B", "E")
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True, eq=False)
class QuantizedModule:
    """One module's integers, int64, and the step and bits of each."""

    A: Tensor  # [*experts, r, in]
    B: Tensor  # [*experts, out, r]
    E: Tensor  # [r]
    step: Tensor  # [3], float32: of A, B and E
    bits: tuple[int, int, int]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A' and B' in float32."""
        a, b, e = (t.float() * s for t, s in zip((self.A, self.B, self.E), self.step, strict=True))
        return e[:, None] * a, b


def save_quantized(flow: Controller, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the integers of a quantised adapter into the folder that it was saved to; return the path of the file.

        flow.finish()                         # the Trainer does this: callback.flow after train()
        model.save_pretrained(folder)
        rankflow.save_quantized(flow, folder)

    It can be done in mid-run as well, for what was saved at that moment.

    Raises:
        ConfigError: the run's policy quantises nothing; or there are such integers already and `force` was not given.
        CheckpointError: the adapter in `folder` is not what the integers give: trained on since, say.
        AdapterError: there is no adapter in `folder`.
    """
    modules = {name: _module(form) for name, form in flow.stored.items()}
    if not modules:
        raise ConfigError("this run has no quantised factors; its last gates were not those of bayesian_lora")
    path = Path(folder) / FILE
    _check(modules, path)
    check_output(path, {"the adapter": PeftAdapter(path.parent).weights}, force=force)
    tensors: dict[str, Tensor] = {}
    about = {}
    for name, m in modules.items():
        stored = {key: getattr(m, key) for key in _TENSORS}
        tensors |= {f"{name}.{key}": _pack(t, b) for (key, t), b in zip(stored.items(), m.bits, strict=True)}
        tensors[f"{name}.step"] = m.step
        about[name] = {"bits": m.bits, "shapes": [list(t.shape) for t in stored.values()]}
    with atomic_file(path) as partial:
        partial.write_bytes(save(tensors, {"rankflow_quantized": json.dumps({"format": FORMAT, "modules": about})}))
    return path


def load_quantized(folder: str | os.PathLike[str]) -> dict[str, QuantizedModule]:
    """Read what `save_quantized` wrote, and check that it gives the tensors of the adapter beside it, bit for bit.

    Raises:
        CheckpointError: there is no such file, it is damaged, or the adapter is another one.
        AdapterError: there is no adapter in `folder`.
    """
    path = Path(folder) / FILE
    try:
        tensors, metadata = open_tensors(path)
        about = strict_loads(metadata["rankflow_quantized"])
        known = about["format"] == FORMAT
        modules = {name: _read(name, tensors, **of) for name, of in about["modules"].items()} if known else {}
    except (AdapterError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{path}: no quantised adapter, or damaged ({reason})") from e
    if not known:
        raise CheckpointError(f"{path}: has format {about['format']!r}; this rankflow reads format {FORMAT}")
    _check(modules, path)
    return modules


def _module(form: Mapping[str, Tensor]) -> QuantizedModule:
    a, b, e = (form[key].detach().cpu().long() for key in _TENSORS)
    first, second, third = form["bits"].tolist()
    return QuantizedModule(a, b, e, form["step"].detach().cpu(), (first, second, third))


def _read(name: str, tensors: Mapping[str, Tensor], bits: list[int], shapes: list[list[int]]) -> QuantizedModule:
    if not all(type(n) is int and 0 < n <= 32 for n in bits):
        raise ValueError(f"{name} has numbers of {bits} bits")
    a, b, e = (_unpack(tensors[f"{name}.{key}"], n, s) for key, n, s in zip(_TENSORS, bits, shapes, strict=True))
    step = tensors[f"{name}.step"]
    if step.shape != (3,) or e.ndim != 1 or a.ndim < 2 or b.ndim < 2 or not a.shape[-2] == b.shape[-1] == len(e):
        raise ValueError(f"{name} has integers of shapes that do not go together")
    return QuantizedModule(a, b, e, step.clone(), (bits[0], bits[1], bits[2]))


def _check(modules: Mapping[str, QuantizedModule], path: Path) -> None:
    adapter = PeftAdapter(path.parent)
    if odd := sorted(modules.keys() ^ adapter.layout.keys()):
        raise CheckpointError(f"{path}: {odd[0]} is in the adapter or among its integers, but not in both")
    for name, module in modules.items():
        for key, found, wanted in zip("AB", adapter.factors(name), module.factors(), strict=True):
            if found.shape != wanted.shape or not _same_bits(found, wanted.to(found.dtype)):
                raise CheckpointError(
                    f"{path}: {name}: {key} of the adapter is not what its integers give; it was trained on or changed "
                    "after its gates were folded, or cast when it was saved"
                )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _pack(t: Tensor, bits: int) -> Tensor:
    flat = t.reshape(-1)
    if bits >= 8:
        return flat.to(_INTEGERS[bits])
    each = 8 // bits  # numbers a byte
    flat = torch.nn.functional.pad(flat % 2**bits, (0, -len(flat) % each))  # two's complement
    places = 2 ** (bits * torch.arange(each))
    return (flat.reshape(-1, each) * places).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    flat = packed.long()
    if bits < 8:
        places = 2 ** (bits * torch.arange(8 // bits))
        flat = (flat[:, None] // places % 2**bits).reshape(-1)[: math.prod(shape)]
        flat = torch.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat)
    return flat.reshape(shape)
