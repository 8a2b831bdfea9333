"""Files of tensors, written without holding them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankflow.formats.io.tensors import SAFETENSORS_DTYPES, Spec

_ORDER = {dtype: -i for i, dtype in enumerate(SAFETENSORS_DTYPES)}


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return the beginning of a safetensors file, as many bytes as the reference writer's, where each tensor starts in
    the data after it, and the size of that data."""
    # Sorted, since the reader gives them in another order every time
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    # By type, wide ones first, keeps every tensor aligned to its own size.
    for key in sorted(specs, key=lambda k: (_ORDER[specs[k][0]], k)):
        dtype, shape = specs[key]
        starts[key], end = end, end + dtype.itemsize * torch.Size(shape).numel()
        fields[key] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[key], end],
        }
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, starts, end


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order and from any thread.

    The format is eight bytes of header length, a JSON header, and the raw tensors; all shapes being known before the
    data, the header goes first and nothing has to be held. `safetensors.torch.save_file` wants every tensor at once.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self._path = path
        self.specs = dict(specs)
        self._missing = set(specs)
        raw, self._at, size = header(specs, metadata)
        self.base = len(raw)
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(self.base + size)

    def put(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == self.specs[key], (key, tensor.shape, self.specs[key])
        with self._path.open("r+b") as file:
            file.seek(self.base + self._at[key])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(key)

    def relabel(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by other of the same length, for what is known only once the tensors are written."""
        raw, _, _ = header(self.specs, metadata)
        assert len(raw) == self.base
        with self._path.open("r+b") as file:
            file.write(raw)

    def close(self) -> None:
        assert not self._missing, sorted(self._missing)


class TorchWriter:
    """Write a `.bin` as `SafetensorsWriter` writes its file. torch's format cannot be streamed, so tensors are held
    until `close`."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self._path = path
        self._tensors: dict[str, Tensor | None] = dict.fromkeys(specs)

    def put(self, key: str, tensor: Tensor) -> None:
        # A view would be saved with all of its storage.
        self._tensors[key] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        assert all(t is not None for t in self._tensors.values())
        packed = io.BytesIO()  # given a file, torch says of a full disk that its own code is at fault
        torch.save(self._tensors, packed)
        self._path.write_bytes(packed.getbuffer())


def tensor_writer(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> SafetensorsWriter | TorchWriter:
    return (SafetensorsWriter if path.suffix == ".safetensors" else TorchWriter)(path, specs, metadata)
