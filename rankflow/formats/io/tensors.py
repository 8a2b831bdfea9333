"""Files of tensors, read without loading them."""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import AdapterError, first_line

Spec = tuple[torch.dtype, tuple[int, ...]]

# In the order of the reference implementation, whose writer lays the last of these down first.
SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}

TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 8
# What the pickle of a dict of tensors names. torch's own list, which allows no code, has things that fill the memory.
_NEEDED = re.compile(r"collections OrderedDict|torch(\.storage)? \w+|torch\._utils _rebuild_(tensor|parameter)\w*")


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a `.safetensors` or `.bin` file, mapped and not read, and the file's metadata.

    The tensors are views of the file: treat them as read-only, and expect the disk to be touched when they are used.

    Raises:
        AdapterError: the file is missing, truncated or corrupt, or holds anything but named tensors.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    tensors, metadata = _open_safetensors(path) if path.suffix == ".safetensors" else (_open_pickled(path), {})
    _check_tensors(tensors, path)
    return tensors, metadata


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that no adapter has and that no later code expects."""
    for key, t in tensors.items():
        if not isinstance(key, str) or len(key) > _LONGEST_NAME or not key.isprintable():
            raise AdapterError(f"{path}: {ascii(key)[:80]} is no name of a tensor; the file is damaged")
        if t.layout != torch.strided or t.device.type != "cpu" or t.dtype not in SAFETENSORS_DTYPES:
            kind = t.dtype if t.layout == torch.strided and t.device.type == "cpu" else f"{t.layout} on {t.device}"
            raise AdapterError(f"{path}: {key} is of type {kind}, which no adapter has")
        if t.ndim > _MOST_DIMENSIONS:
            raise AdapterError(f"{path}: {key} has {t.ndim} dimensions; the file is damaged")
    # In torch's format a shape may be larger than what is there to fill it. Twice the file is that of tied weights.
    if sum(t.nbytes for t in tensors.values()) > 4 * path.stat().st_size:
        raise AdapterError(f"{path}: tensors are larger than the file; it is damaged")


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as e:  # what a foreign reader makes of damaged bytes is its own affair
        raise _broken(path, "safetensors", e) from None


def _open_pickled(path: Path) -> dict[str, Tensor]:
    try:
        # Files in torch's format of before 1.6 are not zip archives and cannot be mapped.
        archive = zipfile.is_zipfile(path)
        if foreign := _foreign(path, archive):
            raise pickle.UnpicklingError(foreign)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError:
        raise AdapterError(
            f"{path}: holds something other than tensors, or is corrupt; only tensors are ever loaded, "
            "so save the adapter again with safetensors"
        ) from None
    except Exception as e:  # of any kind, where bytes are damaged
        raise _broken(path, "torch", e) from None
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise AdapterError(f"{path}: not a dict of tensors as `torch.save(model.state_dict())` writes it")
    return {key: t.detach() for key, t in data.items()}


def _broken(path: Path, kind: str, e: Exception) -> AdapterError:
    return AdapterError(
        f"{path}: not a whole {kind} file ({first_line(e)}); it is truncated or corrupt, save or download it again"
    )


def _foreign(path: Path, archive: bool) -> str | None:
    """The first thing that a torch file names and a dict of tensors has no need of, before anything is unpickled.

    Raises:
        Exception: of whatever kind, on damage.
    """
    if archive:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            _check_parts(parts, path.stat().st_size)
            pickles = [io.BytesIO(file.read(part)) for part in parts if part.filename.endswith("data.pkl")]
            return next((name for found in pickles for name in _named(found) if not _NEEDED.fullmatch(name)), None)
    # Magic number, version and system, then the dict; storages follow
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return next((name for _ in range(4) for name in _named(mapped) if not _NEEDED.fullmatch(name)), None)


def _check_parts(parts: Sequence[zipfile.ZipInfo], size: int) -> None:
    """
    Raises:
        ValueError: parts that no `torch.save` wrote: compressed, twice there, or sharing bytes, so that together they
            are larger than the file.
    """
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise ValueError("its parts are compressed, which torch.save never does")
    if len({part.filename for part in parts}) < len(parts):
        raise ValueError("a part of it is there twice")
    parts = sorted(parts, key=lambda part: part.header_offset)
    starts = [*(part.header_offset for part in parts[1:]), size]
    if any(part.header_offset + part.file_size > start for part, start in zip(parts, starts, strict=True)):
        raise ValueError("its parts share bytes, which torch.save never writes")


def _named(pickled: io.BytesIO | mmap.mmap) -> Iterable[str]:
    """Return the names that one pickle asks to import.

    Raises:
        ValueError: a tuple in it is used twice. None of tensors is, and to look one up whose halves are one tuple, of
            which the halves are one, and so on, takes time without end.
    """
    tuples: set[int] = set()
    kept, on_top = 0, False
    for opcode, argument, _ in pickletools.genops(pickled):  # type: ignore[arg-type]  # a map is a file too
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = kept if argument is None else int(argument)
            kept += 1
            (tuples.add if on_top else tuples.discard)(place)
        else:
            on_top = opcode.name.startswith("TUPLE")
            if opcode.name in ("GET", "BINGET", "LONG_BINGET") and int(argument or 0) in tuples:
                raise ValueError("it uses a tuple twice, which torch.save never does")
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            yield str(argument)


def all_finite(t: Tensor) -> bool:
    """Return whether a tensor holds no NaN or infinity, in one pass and without a mask of its size."""
    return all(map(math.isfinite, torch.aminmax(t)))
