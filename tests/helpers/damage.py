"""Ways to damage a file, drawn from a generator: bytes, headers, tensors, pickles, JSON and YAML."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import random
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor
from whole_files import Files, as_bin, unpacked

_SLOW = [
    "(a+)+$",
    "(.*)*$",
    "(.*a){25}",
    "(x+x+)+y",
    "([a-z.0-9]+)*!",
    "(?:(?:[^!]*)*)*!",
    "a{1,4294967296}",
    "(" * 300,
]
_WORDS = [
    "", "x", "../../evil", "/etc/passwd", "C:\\evil", "a\0b", "a\nb", "\x1b[31mred", "[/bold]", "[red]x", "{}", "%s",
    "$", "$x$", "$\\frac$", "²", "٣", "1" * 5000, "a." * 3000, "9" * 400 + "GiB", "1e999", "\u202e", "layers.0.q",
    "unet", "*", "re:(", "re:(.*)*!", "(?P<x", "\\", "null", "LOHA", "pissa", "all-linear", "字", *_SLOW,
]  # fmt: skip
_NUMBERS = [
    0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 4.0, 1e308, -1e308,
    5e-324, 1e-300, math.nan, math.inf, -math.inf,
]  # fmt: skip


def nasty(rng: random.Random) -> Any:
    """A value that does not belong where it is put."""
    kind = rng.randrange(8)
    if kind <= 2:
        return rng.choice(_NUMBERS)
    if kind <= 4:
        return rng.choice(_WORDS)
    if kind == 5:
        return rng.choice([None, True, False, [], {}, [[]], [None], {"": 0}, {"x": None}, [1, "a"], {"a": {"b": []}}])
    if kind == 6:
        return {rng.choice(_WORDS): rng.choice([*_NUMBERS, *_WORDS]) for _ in range(rng.randrange(1, 4))}
    deep: Any = 0
    for _ in range(rng.choice([3, 200, 900])):
        deep = [deep] if rng.random() < 0.8 else {"a": deep}
    return deep


def harm_json(rng: random.Random, data: Any, times: int = 1) -> Any:
    """A copy with nodes replaced, removed, renamed or doubled."""
    data = json.loads(json.dumps(data))
    for _ in range(times):
        places: list[tuple[Any, Any]] = []
        todo = [data]
        while todo:
            node = todo.pop()
            inside = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else [])
            places += [(node, key) for key, _ in inside]
            todo += [value for _, value in inside]
        if not places or rng.random() < 0.03:
            return nasty(rng)
        node, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(_WORDS)] = node.pop(key)
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(_WORDS)] = nasty(rng)
        elif kind == 3:
            other, at = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                node[key] = json.loads(json.dumps(other[at]))
        else:
            node[key] = nasty(rng)
    return data


def dumped(rng: random.Random, data: Any) -> bytes:
    """As JSON, at times nested deeper than any reader can follow, or with a key twice."""
    try:
        text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        text = "[" * 2000 + "]" * 2000
    roll = rng.random()
    if roll < 0.03:
        text = '{"a":' * 100_000 + "1" + "}" * 100_000
    elif roll < 0.06:
        text = "[" * rng.choice([500, 100_000])
    elif roll < 0.12 and text.startswith('{"'):
        first = text[1 : text.index(":") + 1]
        text = "{" + first + rng.choice(["1", '"x"', "null", "[]", "{}"]) + "," + text[1:]
    elif roll < 0.15:
        text = text.replace(":", ": " + "9" * 6000 + ', "z":', 1)
    return text.encode("utf-8", "surrogatepass")


def harm_bytes(rng: random.Random, raw: bytes, end: int | None = None) -> bytes:
    """Flipped, lost, doubled, zeroed and foreign bytes, before `end`."""
    out = bytearray(raw)
    end = len(out) if end is None else min(end, len(out))
    if not end:
        return b"\xff"
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        if not out:
            break
        at = rng.randrange(min(end, len(out)))
        kind = rng.randrange(9)
        if kind <= 2:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            out[at] = rng.choice(b'0129AB.,:"[]{}_-\x00\xff\n\\')
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 7:
            out[at : at + rng.randrange(1, 64)] = rng.choice([b"\x00", b"\xff", b"\x80\x7f"]) * rng.randrange(1, 32)
        else:
            out += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    return bytes(out)


def _describes(entry: Any) -> bool:
    """Whether a header's entry still has the form of one."""
    lists = [entry.get("shape"), entry.get("data_offsets")] if isinstance(entry, dict) else [None]
    return all(isinstance(value, list) and value for value in lists) and "dtype" in entry


def harm_header(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors header that lies."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(rng.choice([1, 1, 2, 4])):
        entry = header.get(rng.choice(keys))
        kind = rng.randrange(13)
        if kind == 12 or not _describes(entry):
            header = harm_json(rng, header)
            if not isinstance(header, dict):
                break
        elif kind == 0:
            entry["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.randrange(5))]
        elif kind == 1:
            entry["shape"] = [2**32, 2**32, rng.choice([1, 2, 0])]
        elif kind == 2:
            entry["data_offsets"] = [0, len(body) // 2]
        elif kind == 3:
            entry["data_offsets"] = [
                rng.choice([-1, 0, 5, len(body), 2**63, 2**64]),
                rng.choice([0, 8, len(body), 2**64 - 1]),
            ]
        elif kind == 4:
            entry["data_offsets"] = [len(body), 0]
        elif kind == 5:
            entry["dtype"] = rng.choice(
                ["F16", "F64", "I32", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "U64", "f32", "", "X"]
            )
        elif kind == 6:
            entry["shape"] = [0, *entry["shape"][1:]]
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2
        elif kind == 7:
            header["__metadata__"] = rng.choice([{"a": 1}, {"a": None}, [], "x", {"a": {}}, 7])
        elif kind == 8:
            header[rng.choice(_WORDS)] = header.pop(rng.choice(keys), entry)
        elif kind == 9:
            entry["shape"] = [1] * rng.choice([10, 70, 3000]) + list(entry["shape"])
        elif kind == 10:
            entry["shape"] = entry["shape"][::-1]
        else:
            entry["dtype"], n = "F64", entry["shape"][-1] if entry["shape"] else 1
            entry["shape"] = [*entry["shape"][:-1], n // 2 if isinstance(n, int) else n]
    text = dumped(rng, header)
    if rng.random() < 0.1:
        text = text.replace(b"lora", rng.choice([b"\xff\xfe", b"lo\x00ra", b"\\ud800", b"\\u0000"]), 1)
    stated = rng.choice([0, 1, size * 2, 2**40, 2**63, 2**64 - 1]) if rng.random() < 0.1 else len(text)
    return stated.to_bytes(8, "little") + text + body


def harm_tensors(rng: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole files with the wrong things in them."""
    out = dict(tensors)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice(list(out) or ["x"])
        t = out.get(key, torch.zeros(2, 2))
        kind = rng.randrange(14)
        if kind == 0:
            out.pop(key, None)
        elif kind == 1:
            out[rng.choice([*_WORDS, key.replace("lora_A", "lora_B"), key.replace(".weight", ".other.weight")])] = (
                t.clone()
            )
        elif kind == 2:
            out[key.replace(rng.choice(key.split(".")), rng.choice(_WORDS))] = out.pop(key, t)
        elif kind <= 5 and t.numel() and t.is_floating_point() and t.itemsize > 1:
            bad = [math.nan, math.inf, -math.inf, 3e38, 1e300, 1e-300, 0.0, 1e-40, 6e4, 1e19]
            t = t.double().clone() if rng.random() < 0.2 else t.clone()
            value = torch.tensor(rng.choice(bad), dtype=torch.float64).to(t.dtype)
            if rng.random() < 0.5:
                t.reshape(-1)[rng.randrange(t.numel())] = value
            else:
                t.fill_(value)
            out[key] = t
        elif kind == 6:
            wide = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.uint8, torch.int64]
            dtype = rng.choice([*wide, torch.float8_e4m3fn, torch.float8_e5m2])
            for other in list(out) if rng.random() < 0.5 else [key]:
                out[other] = out[other].to(dtype) if other in out else t
        elif kind == 7:
            out[key] = t.flatten() if rng.random() < 0.5 else t[None]
        elif kind == 8:
            out[key] = t.mT.contiguous() if t.ndim > 1 else t.expand(3, *t.shape).clone()
        elif kind == 9:
            out[key] = torch.zeros(0) if not t.ndim else (t[:0] if rng.random() < 0.5 else t[..., :0]).clone()
        elif kind == 10:
            out[key] = torch.cat([t, t]) if t.ndim else t
        elif kind == 11:  # of a rank that no module has
            n = rng.choice([1, 40, 3000])
            stem = rng.choice([k for k in out if "lora_" in k] or ["x.lora_A.weight"]).rpartition(".lora_")[0]
            for other in [k for k in out if k.startswith(stem + ".lora_")]:
                up = ".lora_B" in other or ".lora_up" in other
                out[other] = torch.ones(2, n) if up else torch.ones(n, 2)
        elif kind == 12:
            for other in out:
                out[other] = torch.zeros_like(out[other])
        else:
            size = rng.choice([1e-30, 1e15, 1e18, 1e30])
            out = {k: (v.double() * size).to(v.dtype) if v.is_floating_point() else v for k, v in out.items()}
    return out


class _Bomb:
    """What runs code when it is unpickled in earnest."""

    def __init__(self, how: str, marker: Path):
        self.how, self.marker = how, marker

    def __reduce__(self):
        if self.how == "touch":
            return (Path.touch, (self.marker,))
        if self.how == "eval":
            return (eval, (f"open({str(self.marker)!r}, 'w')",))
        if self.how == "memory":
            return (bytearray, (3 << 30,))
        return (exec, (f"import os; os.system('touch {self.marker}')",))


def harm_pickle(rng: random.Random, raw: bytes, marker: Path) -> bytes:
    tensors = torch.load(io.BytesIO(raw), weights_only=True)
    key = next(iter(tensors))
    t = tensors[key]
    kind = rng.randrange(16)
    if kind <= 3:
        bomb: Any = _Bomb(rng.choice(["touch", "eval", "exec", "memory"]), marker)
        data: Any = rng.choice([bomb, {key: bomb}, {**tensors, "x": bomb}, {bomb.how: t, "y": [bomb]}])
        if rng.random() < 0.3:
            return pickle.dumps(bomb, protocol=rng.choice([0, 2, 4]))
    elif kind == 4:
        data = {**tensors, rng.choice([1, None, (1, 2), 2.5, b"x", "\ud800", ""]): t}
    elif kind == 5:
        data = {
            **tensors,
            key: torch.zeros(1).expand(*rng.choice([(4, 8), (10**6, 10**6), (4, 10**12), (2**40, 2**20)])),
        }
    elif kind == 6:
        data = {**tensors, key: rng.choice([t.to_sparse(), t.to("meta"), torch.nn.Parameter(t), t.to(torch.complex64)])}
    elif kind == 7:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch will do without them some day
            data = {**tensors, key: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)}
    elif kind == 8:
        data = rng.choice([[t], t, {"state_dict": tensors}, {}, None, 7, {key: {"x": t}}, (tensors, tensors)])
    elif kind == 9:
        data = {**tensors, key: rng.choice([t.mT, t[::2], t.as_strided((4, 4), (1, 1))])}
    elif kind == 10:  # a compressed archive, whose parts are larger than the file
        file = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(as_bin(tensors))) as old,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for info in old.infolist():
                big = rng.random() < 0.3 and info.filename.endswith("data.pkl")
                new.writestr(info.filename, old.read(info) + (b"\0" * (64 << 20) if big else b""))
        return file.getvalue()
    elif kind == 11:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as new:
            new.writestr(
                rng.choice(["../../evil", "x/data.pkl", "/abs", "x/constants.pkl"]), pickle.dumps({}, protocol=2)
            )
        return file.getvalue()
    else:
        data = harm_tensors(rng, tensors)
    return _bin_of(data, rng.random() < 0.3)


def _bin_of(data: Any, legacy: bool) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(data, file, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, UnicodeError, NotImplementedError):  # the old format cannot hold everything
        return b"\x80\x02}q\x00."
    return file.getvalue()


_YAML = [
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in pairwise("abcdefghi"))
    + "ranks: *i\nlimits: *i\nbudget: *i\n",
    "".join(f"k{i}: &k{i} {{<<: [*k{i - 1}, *k{i - 1}]}}\n" if i else "k0: &k0 {x: 1}\n" for i in range(30)),
    "ranks: &r [*r]\n",
    "ranks: {a: 2001-99-99}\n",
    "? {a: 1}\n: 2\n",
    "? [a, b]\n: 2\n",
    "limits: {? [a] : 1}\n",
    "ranks: !!python/object/apply:os.system ['touch {marker}']\n",
    "ranks: !!int x\n",
    "ranks: !!float []\n",
    "ranks: !!timestamp x\n",
    "ranks: !!binary '*'\n",
    "ranks: !!set {a, b}\n",
    "ranks: !!omap [a: 1]\n",
    "ranks: 0b2\n",
    "x: " + "[" * 30_000,
    "x: " + "{a: " * 30_000,
    "- " * 30_000,
    "ranks: {layers.0.q: 2, layers.0.q: 3}\n",
    "budget: {size: " + "9" * 400 + "GiB}\n",
    "budget: {size: " + "9" * 5000 + "}\n",
    "budget: {mean_rank: .inf}\n",
    "budget: {mean_rank: 1.0e+308}\n",
    "budget: {total_rank: " + "9" * 300 + "}\n",
    "budget: {fraction: 5.0e-324}\n",
    "limits: {'re:([a-z.0-9]+)*!': 3}\n",
    "limits: {'(?:[a-z.0-9]+)*!': 3}\n",
    "rank_multiple: " + "9" * 30 + "\nbudget: {mean_rank: 2}\n",
    "rank_buckets: [" + "9" * 30 + "]\nbudget: {mean_rank: 2}\n",
    "tie: [['re:(.*)*!']]\nbudget: {mean_rank: 2}\n",
    "budget: {size: 1e5}\n",
    "%YAML 9.9\n---\nranks: {}\n",
    "a\n---\nb\n",
    "\ufeffranks: {a: 1}\n",
    "\tranks: 1\n",
    "",
    "~",
]


def harm_yaml(rng: random.Random, raw: bytes, marker: Path) -> bytes:
    roll = rng.random()
    if roll < 0.35:
        whole = rng.choice(_YAML).replace("{marker}", str(marker))
        return (raw.decode() + whole if rng.random() < 0.2 else whole).encode()
    if roll < 0.85:
        harmed = harm_json(rng, yaml.safe_load(raw), rng.choice([1, 1, 2]))
        with contextlib.suppress(RecursionError):
            return yaml.safe_dump(harmed, sort_keys=False).encode()
        return dumped(rng, harmed)
    return harm_bytes(rng, raw)


def harm_ledger(rng: random.Random, raw: bytes) -> bytes:
    roll = rng.random()
    if roll < 0.2:
        return harm_bytes(rng, raw)
    events = [json.loads(line) for line in raw.splitlines()]
    if roll < 0.3:
        rng.shuffle(events)
    at = rng.randrange(len(events))
    events[at] = harm_json(rng, events[at], rng.choice([1, 1, 2]))
    return b"".join((dumped(rng, e) if rng.random() < 0.1 else json.dumps(e).encode()) + b"\n" for e in events)


def harm(rng: random.Random, files: Files, marker: Path) -> str:
    """Damage one of `files`, or two that belong together; the way it was done."""
    name = rng.choice(list(files))
    if len(files) > 1 and rng.random() < 0.4:  # what is special about a reader is in its first file
        name = next(iter(files))
    raw = files[name]
    if "." not in name:  # a list of checksums
        files[name] = harm_bytes(rng, raw)
        return f"{name}: bytes"
    if name.endswith(".yaml"):
        files[name] = harm_yaml(rng, raw, marker)
        return f"{name}: yaml"
    if name.endswith(".jsonl"):
        files[name] = harm_ledger(rng, raw)
        return f"{name}: ledger"
    if name.endswith(".json"):
        if rng.random() < 0.15:
            files[name] = harm_bytes(rng, raw)
            return f"{name}: bytes"
        files[name] = dumped(rng, harm_json(rng, json.loads(raw), rng.choice([1, 1, 1, 2, 4])))
        return f"{name}: json"
    if name.endswith(".bin"):
        if rng.random() < 0.3:
            files[name] = harm_bytes(rng, raw, rng.choice([None, 400]))
            return f"{name}: bytes"
        files[name] = harm_pickle(rng, raw, marker)
        return f"{name}: pickle"
    roll = rng.random()
    if roll < 0.25:
        end = 8 + int.from_bytes(raw[:8], "little")
        files[name] = harm_bytes(rng, raw, rng.choice([None, end, 8]))
        return f"{name}: bytes"
    if roll < 0.55:
        files[name] = harm_header(rng, raw)
        return f"{name}: header"
    tensors, metadata = unpacked(raw)
    way = "tensors"
    if roll < 0.7 and any(value.startswith("{") for value in metadata.values()):
        key = rng.choice([key for key, value in metadata.items() if value.startswith("{")])
        harmed = dumped(rng, harm_json(rng, json.loads(metadata[key]), rng.choice([1, 1, 2])))
        metadata = {**metadata, key: harmed.decode("utf-8", "replace")}
        way = f"metadata {key}"
    else:
        tensors = harm_tensors(rng, tensors)
    try:
        files[name] = save(tensors, metadata)
    except Exception:  # safetensors cannot write it, so there is no such file
        files[name] = harm_bytes(rng, raw)
    return f"{name}: {way}"
