"""GGUF adapters for llama.cpp, written and not read.

`general.type` is adapter, `adapter.type` lora, and every base tensor has a `.lora_a` [r, in] and a `.lora_b` [out, r].
llama.cpp scales by `adapter.lora.alpha` over the rank of each tensor, and by 1 where alpha is 0 (`get_scale` in its
`llama-adapter.h`): so alpha is 0, scales are in B, and ranks may differ. token_embd has A the other way round
([vocabulary, r]), which is looked up by row (`convert_lora_to_gguf.py`, `llm_build_inp_embd`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rankflow.errors import BaseNeeded, ConfigError
from rankflow.formats.base import BASE_COPY, Put, SavedAdapter
from rankflow.formats.gguf.names import Names
from rankflow.formats.io.atomic import atomic_file, is_plain
from rankflow.formats.io.outputs import check_output
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.rewritten import Rewritten, check_sayable

_SUFFIX = ".gguf"
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALORA = "alora_invocation_tokens"  # as PEFT's config has it
_INVOCATION = "adapter.alora.invocation_tokens"  # as llama.cpp reads it since pull request 15327
_MOST_TOKENS = 4096
_HEADER = 512  # bytes of what is said once, at most; a tensor's entry takes its name and 64 more, and its padding


class GgufAdapter(Rewritten):
    """A PEFT adapter that is read as it is and written as GGUF."""

    kind = "gguf"

    def __init__(self, source: SavedAdapter, base: Path | None):
        """
        Args:
            base: the base model's folder; where left out, the one that the adapter names, if it is on this machine.

        Raises:
            ConfigError: an adapter that GGUF cannot hold, or a base model that is not given or not known.
        """
        if not isinstance(source, PeftAdapter):
            raise ConfigError(f"{source.path}: GGUF is for adapters of language models, as PEFT saves them")
        check_sayable(source.config, source.path, self.kind, but=(_ALORA,))
        if more := [key for key in source.extra_tensors if not key.endswith(BASE_COPY)]:
            raise ConfigError(
                f"{source.path}: has more than LoRA factors ({more[0]}), which llama.cpp cannot load; "
                "merge the adapter into its base model"
            )
        for name, slot in source.layout.items():
            if slot.kind not in ("linear", "embedding"):
                raise ConfigError(f"{source.path}: {name} is of kind {slot.kind}, which GGUF adapters do not have")
        super().__init__(source)
        self.fold_scales()
        self._invocation = _tokens(source)
        self._names = Names.of(base or _named(source))
        self._tensors = {name: self._names.tensor(name) for name in self.layout}

    @property
    def overhead(self) -> int:
        return _HEADER + 4 * len(self._invocation) + sum(2 * (len(tensor) + 128) for tensor in self._tensors.values())

    def beside(self, suffix: str) -> Path:
        found = super().beside(suffix)
        return found.with_name(f"{found.name}{_SUFFIX}")

    def check_out(self, out: Path, *, force: bool) -> None:
        if out.suffix != _SUFFIX and not is_plain(out):
            raise ConfigError(f"{out}: GGUF is one file; give it a name like {out.name or 'small'}{_SUFFIX}")
        if out.is_dir():
            raise ConfigError(f"{out}: is a folder, and GGUF is one file; choose another name")
        check_output(out, {"its own source": self.path}, force=force)
        if out.is_file() and not is_plain(out) and not _is_gguf(out):
            raise ConfigError(f"{out}: is not GGUF, so --force does not replace it; choose another name")

    @contextmanager
    def rewrite(
        self, out: Path, ranks: Mapping[str, int], *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Iterator[Put]:
        self.check_out(out, force=force)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, tensor in self._tensors.items():
            slot = self.layout[name]
            kept = dtype or self.entries[name].dtype
            kept = kept if kept in _DTYPES else torch.float32
            if rank := ranks[name]:
                a = (slot.in_features, rank) if slot.kind == "embedding" else (rank, slot.in_features)
                shapes[f"{tensor}.lora_a"] = kept, a
                shapes[f"{tensor}.lora_b"] = kept, (slot.out_features, rank)
        with atomic_file(out) as partial:
            writer = _Writer(partial, self._names.architecture, shapes, self._invocation)

            def put(name: str, a: Tensor, b: Tensor) -> None:
                tensor = self._tensors[name]
                writer.put(f"{tensor}.lora_a", a.T if self.layout[name].kind == "embedding" else a)
                writer.put(f"{tensor}.lora_b", self._names.rows(name, b))

            yield put
            writer.close()


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _tokens(source: PeftAdapter) -> list[int]:
    """Return the tokens that an aLoRA starts to act at; none for an adapter that always acts.

    Raises:
        ConfigError: they are no tokens.
    """
    tokens = source.config.get(_ALORA) or []
    ids = isinstance(tokens, list) and all(type(t) is int and 0 <= t < 1 << 32 for t in tokens)
    if not ids or len(tokens) > _MOST_TOKENS:
        raise ConfigError(f"{source.path}: {_ALORA} is {str(tokens)[:80]}; it must be a list of token numbers")
    return tokens


def _named(source: PeftAdapter) -> Path:
    """Return the base model's folder, if the adapter's config names one that is on this machine."""
    named = source.config.get("base_model_name_or_path")
    if isinstance(named, str) and (Path(named) / "config.json").is_file():
        return Path(named)
    raise BaseNeeded(
        f"{source.path}: names in GGUF depend on the base model ({named or 'not named in the adapter'}), and its "
        "config.json is not here; give its folder with --base"
    )


class _Writer:
    """A GGUF file written tensor by tensor, in any order and from any thread: gguf's own writer makes the header, and
    every tensor goes to where that says."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        invocation: Sequence[int] = (),
    ):
        import gguf
        import numpy as np

        self._path, self._shapes = path, shapes
        self._missing = set(shapes)
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        if invocation:  # as uint32, which llama.cpp asks for
            writer.add_key_value(
                _INVOCATION, list(invocation), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32
            )
        at = 0
        self._at: dict[str, int] = {}
        for key, (dtype, shape) in shapes.items():
            nbytes = dtype.itemsize * math.prod(shape)
            kind = gguf.GGMLQuantizationType[_DTYPES[dtype]]
            writer.add_tensor_info(key, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            self._at[key] = at
            at += writer.ggml_pad(nbytes, writer.data_alignment)
        with closing(writer):  # also where the disk is full, which leaves its file open
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        self._base = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
        with path.open("r+b") as file:
            file.truncate(self._base + at)

    def put(self, key: str, tensor: Tensor) -> None:
        dtype, shape = self._shapes[key]
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        assert tuple(tensor.shape) == tuple(shape), (key, tensor.shape, shape)
        with self._path.open("r+b") as file:
            file.seek(self._base + self._at[key])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(key)

    def close(self) -> None:
        assert not self._missing, sorted(self._missing)
