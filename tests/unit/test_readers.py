"""Files from outside: JSON lines, JSON arrays, Parquet, folders; and what is no data."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import needs_shared, shared_rows, write_lines

from scmini.data.importers import read_examples
from scmini.data.readers import data_files, file_rows, read_rows
from scmini.errors import DataError
from scmini.sections import DataConfig

ROWS = [
    {"prompt": f"q {n}", "completion": f"a\u2028\x85 é \U0001f40e {n}", "n": [n, None]}
    for n in range(2500)
]


def test_the_same_rows_in_every_format(tmp_path: Path) -> None:
    paths = [
        tmp_path / f"rows.{end}" for end in ("jsonl", "jsonl.gz", "json", "json.gz", "parquet")
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    array = json.dumps(ROWS, indent=1).encode()
    paths[0].write_bytes(lines)
    paths[1].write_bytes(gzip.compress(lines))
    paths[2].write_bytes(b"\n  " + array)
    paths[3].write_bytes(gzip.compress(array))
    pq.write_table(pa.Table.from_pylist(ROWS), paths[4], row_group_size=300)
    for path in paths:
        assert list(read_rows(path)) == list(enumerate(ROWS, start=1))
    (tmp_path / "lines.json").write_bytes(lines)
    assert list(read_rows(tmp_path / "lines.json")) == list(enumerate(ROWS, start=1))
    (tmp_path / "none.json").write_bytes(b"[]\n")
    assert list(read_rows(tmp_path / "none.json")) == []
    assert [row.id for row in file_rows(paths[3:])][::2500] == ["rows-000001"] * 2
    data = DataConfig(format="auto", path=[str(paths[4])])
    assert [e.target for e in read_examples(data, print)] == [row["completion"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"a": 1},\n {"a": }]', r"x\.json, line 2: not JSON"),
        ("x.json", b'[{"a": 1}, 3]', r"x\.json, line 2: expected an array of objects, got int"),
        ("x.json", b'[{"a": "\xff"}]', "line 1: not UTF-8"),
        ("x.json", b'[{"a": "b"}, {"a": "\\ud800"}]', "line 2: an escape"),
        ("x.json", b"[" * 100_000, "not readable JSON"),
        ("x.json", b'{"a": 1}\n[]\n', "line 2: expected an object"),
        ("x.json.gz", b"nothing", "compressed data is damaged"),
        ("x.parquet", b"PAR1 nothing", "not a readable Parquet file after row 0"),
        ("x.parquet", b"", "not a readable Parquet file"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.jsonl", b'\xef\xbb\xbf{"a": 1}', "line 1: not JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


def test_a_parquet_file_that_breaks_off_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=500, compression="none")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file after row \d+"):
        list(read_rows(path))
    with pytest.raises(DataError, match=r"none\.parquet: No such file"):
        list(read_rows(tmp_path / "none.parquet"))


def test_folders(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.parquet", "c.jsonl.gz", "notes.json", "d.txt", ".e.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    for format in ("auto", "jsonl", "hh-rlhf", "nectar", "ultrachat", "self-contrast"):
        data = DataConfig.model_validate({"format": format, "path": str(tmp_path)})
        assert [path.name for path in data_files(data)] == ["a.parquet", "b.jsonl", "c.jsonl.gz"]
        pickle = DataConfig.model_validate({"format": format, "path": "x.pkl"})
        with pytest.raises(DataError, match="runs whatever code"):
            data_files(pickle)
    assert data_files(DataConfig(format="auto", dataset_name="some/data")) == []


@needs_shared
def test_real_rows_through_parquet(tmp_path: Path) -> None:
    rows = shared_rows("hh_helpful-base_raw.jsonl.gz")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    write_lines(tmp_path / "x.jsonl", rows)
    found: list[list[Any]] = []
    for name in ("x.parquet", "x.jsonl"):
        drops: list[Any] = []
        data = DataConfig(format="hh-rlhf", path=str(tmp_path / name))
        examples = read_examples(data, lambda r, row, drops=drops: drops.append((r, row.id)))
        found.append([list(examples), drops])
    assert found[0] == found[1]
    assert len(found[0][0]) + len(found[0][1]) == len(rows) == 1877
