"""Read a data file into batches that a model takes."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankflow.errors import ConfigError, first_line

TEXT, LABEL = "text", "label"  # columns
Row = Mapping[str, Any]


def read_rows(path: Path, most: int) -> list[Row]:
    """Return the first `most` rows with a text, of a .txt (a text a line), .jsonl, .csv or .parquet file.

    Raises:
        ConfigError: no such file, another kind, damaged, or without a column `text`.
    """
    if path.suffix not in _READERS:
        raise ConfigError(f"{path}: data are a file of {', '.join(_READERS)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    rows = []
    try:
        for row in itertools.islice(_READERS[path.suffix](path), most):
            if not isinstance(row, Mapping) or not isinstance(row.get(TEXT), str):
                found = f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
                raise ConfigError(f"{path}: row {len(rows) + 1} has {found}, not a text under {TEXT!r}")
            rows.append(row)
    except (ValueError, RecursionError, csv.Error) as e:
        raise ConfigError(f"{path}: cannot be read as {path.suffix[1:]} after {len(rows)} rows ({e})") from None
    rows = [row for row in rows if row[TEXT].strip()]
    if not rows:
        raise ConfigError(f"{path}: holds no text")
    return rows


def batches_of(
    rows: Sequence[Row], tokenizer: Any, *, size: int, max_length: int, labels: Labels | None
) -> list[dict[str, Tensor]]:
    """Return padded batches of at most `size` rows, and of at most `max_length` tokens each, on the CPU.

    `labels`: what adds labels, if any.

    Raises:
        ConfigError: a tokenizer that cannot pad, or a row without a label.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{tokenizer.name_or_path}: its tokenizer has neither a pad nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        texts = [row[TEXT] for row in some]
        options = {"truncation": True, "max_length": max_length, "padding": True, "padding_side": "right"}
        batch = dict(tokenizer(texts, return_tensors="pt", **options))
        found.append(batch if labels is None else {**batch, "labels": labels(some, batch)})
    return found


# -- labels -----------------------------------------------------------------------------------------------------------

Labels = Callable[[Sequence[Row], Mapping[str, Tensor]], Tensor]


def next_tokens(rows: Sequence[Row], batch: Mapping[str, Tensor]) -> Tensor:
    """Return batches in which every token but padding is a label."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def classes(names: Mapping[str, int], count: int) -> Labels:
    """Return numbers below `count`, or `names` for them, from the rows' column `label`."""

    def labels(rows: Sequence[Row], batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([number(row) for row in rows])

    def number(row: Row) -> int:
        label = row.get(LABEL)
        found = names.get(str(label), label)
        if isinstance(found, str) and found.isdecimal():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < count:
            raise ConfigError(
                f"{label!r} under {LABEL!r} is neither a number below {count} nor one of {', '.join(names)}; a loss "
                "takes labels, metric 'outputs' does not"
            )
        return found

    return labels


# -- reading ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"{path}: parquet takes pyarrow: pip install 'rankflow-lora[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            columns = [name for name in (TEXT, LABEL) if name in file.schema_arrow.names] or None
            for batch in file.iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as e:
        raise ConfigError(f"{path}: not a whole parquet file ({first_line(e)})") from None


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": lambda path: ({TEXT: line.rstrip("\r\n")} for line in _lines(path)),
    ".jsonl": lambda path: map(json.loads, _lines(path)),
    ".csv": _csv,
    ".parquet": _parquet,
}
