"""Data files, as texts and batches."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rankflow.calibration.texts import read_rows
from rankflow.errors import ConfigError

ROWS = [{"text": 'one, "two"', "label": 1}, {"text": "üñ\tthree", "label": 0}, {"text": " ", "label": 0}]


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"x{suffix}"
    match suffix:
        case ".txt":
            path.write_text("\n".join(r["text"] for r in ROWS) + "\r\n\n", encoding="utf-8", newline="")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n", encoding="utf-8")
        case ".csv":
            lines = ['"one, ""two""",1', "üñ\tthree,0", " ,0"]
            path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
        case ".parquet":
            parquet.write_table(pa.table({"more": [1, 2, 3], **{k: [r[k] for r in ROWS] for k in ROWS[0]}}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, suffix: str):
    path = written(tmp_path, suffix)
    assert [row["text"] for row in read_rows(path, 9)] == [row["text"] for row in ROWS[:2]]
    assert [row["text"] for row in read_rows(path, 1)] == ['one, "two"']
    if suffix != ".txt":
        assert [int(row["label"]) for row in read_rows(path, 9)] == [1, 0]


def test_no_more_is_read_than_asked_for(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert len(read_rows(path, 2)) == 2
    with pytest.raises(ConfigError, match="cannot be read as jsonl after 2 rows"):
        read_rows(path, 3)


BAD: dict[str, tuple[str, bytes, str]] = {
    "kind": ("x.xlsx", b"", r"data are a file of \.txt, \.jsonl"),
    "column": ("x.csv", b"sentence,label\na,1\n", "row 1 has columns sentence, label, not a text under 'text'"),
    "type": ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "row 2 has columns text"),
    "list": ("x.jsonl", b"[1]\n", "row 1 has list"),
    "bytes": ("x.txt", b"a\n\xff\xfe\n", "cannot be read as txt"),
    "empty": ("x.txt", b"\n \n", "holds no text"),
    "parquet": ("x.parquet", b"PAR1 not really PAR1", "not a whole parquet file"),
    "short parquet": ("x.parquet", b"", "not a whole parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_error(tmp_path: Path, case: str):
    name, raw, message = BAD[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / name, 9)
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(tmp_path / "nowhere.txt", 9)
