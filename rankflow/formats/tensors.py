"""Tensor files on disk: read without loading, write without holding, replace without ever being half there."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError, ConfigError

Spec = tuple[torch.dtype, tuple[int, ...]]

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a `.safetensors` or `.bin` file, mapped and not read, and the file's metadata.

    The tensors are views of the file: treat them as read-only, and expect the disk to be touched when they are used.

    Raises:
        AdapterError: the file is missing, truncated or corrupt, or holds anything but named tensors.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickled(path), {}


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({e}); it is truncated or corrupt, save or download it again"
        ) from None


def _open_pickled(path: Path) -> dict[str, Tensor]:
    try:
        # Files in torch's format of before 1.6 are not zip archives and cannot be mapped.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise AdapterError(
            f"{path}: holds something other than tensors, or is corrupt; only tensors are ever loaded, "
            "so save the adapter again with safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise AdapterError(
            f"{path}: not a whole torch file ({reason}); it is truncated or corrupt, save or download it again"
        ) from None
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise AdapterError(f"{path}: not a dict of tensors as `torch.save(model.state_dict())` writes it")
    return dict(data)


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity, in one pass and no mask of its size."""
    return all(map(math.isfinite, torch.aminmax(t)))


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order and from any thread.

    The format is eight bytes of header length, a JSON header, and the raw tensors; all shapes being known before the
    data, the header goes first and nothing has to be held. `safetensors.torch.save_file` wants every tensor at once.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self._path = path
        self._specs = dict(specs)
        self._missing = set(specs)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._at: dict[str, int] = {}
        end = 0
        # Wide types first keeps every tensor aligned to its own size, as the reference writer does.
        for key in sorted(specs, key=lambda k: (-specs[k][0].itemsize, k)):
            dtype, shape = specs[key]
            size = dtype.itemsize * torch.Size(shape).numel()
            header[key] = {
                "dtype": _SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            self._at[key] = end
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._base = 8 + len(raw)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(self._base + end)

    def put(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == self._specs[key], (key, tensor.shape, self._specs[key])
        with self._path.open("r+b") as file:
            file.seek(self._base + self._at[key])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(key)

    def close(self) -> None:
        assert not self._missing, sorted(self._missing)


class TorchWriter:
    """The same for a `.bin`: torch's format has no streaming form, so tensors are held until `close`."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self._path = path
        self._tensors: dict[str, Tensor | None] = dict.fromkeys(specs)

    def put(self, key: str, tensor: Tensor) -> None:
        # A view would be saved with all of its storage.
        self._tensors[key] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        assert all(t is not None for t in self._tensors.values())
        torch.save(self._tensors, self._path)


def tensor_writer(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> SafetensorsWriter | TorchWriter:
    return (SafetensorsWriter if path.suffix == ".safetensors" else TorchWriter)(path, specs, metadata)


def check_destination(out: Path, src: Path, *, force: bool) -> None:
    """Refuse, before any work, to write where something would be lost.

    Raises:
        ConfigError: `out` is or holds the source, is there already and `force` was not given, or is a folder that is
            not an adapter (which not even `force` replaces).
    """
    if src.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out}: the output would replace its own source; choose another name with -o")
    if not out.exists():
        return
    if not force:
        raise ConfigError(f"{out}: is there already; choose another name with -o, or replace it with --force")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "adapter_config.json").is_file()):
        raise ConfigError(f"{out}: is not an adapter folder, so --force does not replace it; choose another name")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into; it takes `out`'s name when the block ends well, else it is removed.

    An earlier `out` is there until the moment the new one is whole and on disk.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    partial, retired = out.with_name(f".{out.name}.{tag}.part"), out.with_name(f".{out.name}.{tag}.old")
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if out.exists():
            out.rename(retired)
            try:
                partial.rename(out)
            except BaseException:
                retired.rename(out)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            partial.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
