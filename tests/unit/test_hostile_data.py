"""Data that is huge, endless, broken or of another encoding: bounded, counted or refused."""

import gzip
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import work, write_lines
from hypothesis import given
from hypothesis import strategies as st
from test_filter import run as run_filter

from scmini import console, json_lines, records
from scmini.config import Config
from scmini.data import readers, shapes
from scmini.data.importers import read_examples
from scmini.errors import DataError, RecordError
from scmini.outside import sources
from scmini.records import Example, Response, Samples, write_examples, write_samples
from scmini.sections import DataConfig
from scmini.stages import data, embed

FORMATS = ("auto", "jsonl", "hh-rlhf", "nectar", "ultrachat", "self-contrast")
LONG = 10_000_000


def examples(format: str, path: Path) -> tuple[list[Example], Counter[str]]:
    drops: Counter[str] = Counter()
    found = read_examples(
        DataConfig.model_validate({"format": format, "path": str(path)}),
        lambda reason, _: drops.update([reason]),
    )
    return list(found), drops


def long_rows(text: str) -> dict[str, dict[str, Any]]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "short"}]
    transcript = f"\n\nHuman: {text}\n\nAssistant:"
    return {
        "auto": {"chosen": f"{text} good", "rejected": f"{text} bad"},
        "jsonl": {"prompt": text, "target": "short"},
        "hh-rlhf": {"chosen": f"{transcript} a", "rejected": f"{transcript} b"},
        "nectar": {"prompt": transcript, "answers": [{"answer": "a", "rank": 1}]},
        "ultrachat": {"messages": turns},
        "self-contrast": {"instruction": text, "output": "short"},
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["é" * LONG, "Human " * (LONG // 6)])
def test_ten_megabytes_on_one_line(format: str, text: str, tmp_path: Path) -> None:
    row = long_rows(text)[format]
    write_lines(tmp_path / "x.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        start = time.process_time()
        ((example,), drops) = examples(format, tmp_path / name)
        assert time.process_time() - start < 10
        assert len(example.prompt[0]["content"]) >= LONG - 9
        assert not drops


def test_a_long_prompt_and_answer_through_the_filter(tmp_path: Path) -> None:
    """The demo's encoder reads a megabyte of a target and of an answer; pairs are made of them."""
    text = "long " * (LONG // 50)
    example = Example("0", [{"role": "user", "content": text}], text, [])
    answers = [Response(text[:-3], [2], "stop"), Response("short", [2], "stop")]
    write_examples(tmp_path / "data" / "train.jsonl", [example])
    write_samples(tmp_path / "sample" / "part-00000.parquet", [Samples("0", [1], answers)])
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample"}
    start = time.process_time()
    embed.run(Config(), inputs, work(tmp_path / "embed"))
    made = run_filter(tmp_path, ["self-contrast-1"], inputs | {"embed": tmp_path / "embed"})
    assert time.process_time() - start < 30
    (pair,) = records.read_pairs(made.path / "pairs" / "self-contrast-1.jsonl")
    assert pair.chosen == text
    assert pair.rejected[0] in (text[:-3], "short")


def test_lines_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small .gz may be a line of many gigabytes."""
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    good = b'{"prompt": "a", "target": "b"}\n'
    path.write_bytes(gzip.compress(good + b" " * (1 << 21) + b"\n" + good))
    assert path.stat().st_size < 4096
    with pytest.raises(RecordError, match=r"bomb\.jsonl\.gz, line 2: a line of more than 1 MiB"):
        examples("jsonl", path)
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(b"x" * (1 << 21))
    with pytest.raises(RecordError, match=r"rows\.jsonl, line 1: a line of more than 1 MiB"):
        records.read_examples(plain)


def test_arrays_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MOST_OF_ARRAY", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b"1,\n" * (1 << 20)))
    with pytest.raises(
        DataError, match=r"bomb\.json\.gz: an array of more than .*\.jsonl\) instead"
    ):
        examples("auto", path)


def test_a_parquet_file_that_repeats_a_large_value(tmp_path: Path) -> None:
    """A megabyte stands in it once, and in each of 3,000 rows: 3 GB if all were read together."""
    value = pa.array(["x" * (1 << 20)])
    table = pa.table({"target": pa.DictionaryArray.from_arrays([0] * 3000, value)})
    table = table.append_column("prompt", pa.array([f"{n}" for n in range(3000)]))
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 20
    metadata = pq.read_metadata(tmp_path / "bomb.parquet")
    rows = readers._batch_rows(metadata)
    assert rows << 20 <= readers._BATCH_BYTES
    assert rows < 3000
    small = pa.Table.from_pylist([{"a": str(n)} for n in range(3000)])
    pq.write_table(small, tmp_path / "small.parquet")
    assert readers._batch_rows(pq.read_metadata(tmp_path / "small.parquet")) == 1024
    empty = small.slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    assert list(readers.read_rows(tmp_path / "empty.parquet")) == []


def test_what_never_ends_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for path, said in {
        tmp_path / "pipe.jsonl": "is no ordinary file",
        Path("/dev/zero"): "is no ordinary file",
        tmp_path / "loop.jsonl": "symbolic links",
        tmp_path / ".." / "nowhere.jsonl": "No such file",
        tmp_path / "folder.jsonl": "holds no .jsonl file",
        tmp_path / ("x" * 400): "File name too long",
    }.items():
        config = Config.model_validate(
            {"data": {"format": "jsonl", "path": str(path)}, "reward": {"grader": "none"}}
        )
        with pytest.raises(DataError, match=r"^data\.path: ") as caught:
            sources(config, "data")
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        with pytest.raises(DataError, match="no ordinary file"):
            records.read_examples(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'\xef\xbb\xbf{"a": 1}', r"not JSON.*save the file as UTF-8 without a byte-order mark"),
        ('{"a": 1}'.encode("utf-16"), r"not UTF-8.*looks like UTF-16.*iconv"),
        ('{"a": 1}'.encode("utf-16-le"), r"not JSON.*looks like UTF-16"),
        (b'{"a": "\xff"}', r"not UTF-8 \(invalid start byte\)$"),
        (b'{"a": "\0"}', r"not JSON"),
        (b'{"a": "\\ud800"}', r"an escape \\ud\.\.\. lacks its other half"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"not readable JSON"),
        (b"[" * 100_000, r"not readable JSON"),
        (b'{"a": ' * 100_000, r"not readable JSON"),
        (b"<html>", r"not JSON"),
        (b"3", r"expected an object, got int"),
    ],
)
def test_lines_that_are_no_rows(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + content + b"\n")
    for read in (lambda: list(readers.read_rows(path)), lambda: records.read_pairs(path)):
        with pytest.raises(RecordError, match=rf"rows\.jsonl, line 2: {said}") as caught:
            read()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_to_read(format: str, tmp_path: Path) -> None:
    for name, content in {
        **{"a.jsonl": b"", "b.jsonl": b"\n \n\r\n", "c.json": b"[]", "d.json": b""},
        **{"e.jsonl.gz": gzip.compress(b"")},
    }.items():
        (tmp_path / name).write_bytes(content)
        assert examples(format, tmp_path / name) == ([], Counter())
    for name in ("x.jsonl.gz", "x.parquet"):
        (tmp_path / name).write_bytes(b"")
        if name.endswith("parquet"):
            with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file"):
                examples(format, tmp_path / name)
        else:
            assert examples(format, tmp_path / name) == ([], Counter())
    config = Config.model_validate({"data": {"format": format, "path": str(tmp_path / "a.jsonl")}})
    with pytest.raises(DataError, match="no usable prompt"):
        data.run(config, {}, work(tmp_path / "out"))


def test_what_a_message_quotes_is_short_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row, said in [
        ({"prompt": 3, "target": "a" * LONG}, "field 'prompt': expected text or a list"),
        ({"prompt": "a", "target": ["\x1b[31m" * 99_999]}, r"got ['\x1b[31m"),
        ({"prompt": [{"role": "\u202e" * 9999}], "target": "a"}, r"\u202e"),
        ({"id": "x" * LONG, "prompt": "a", "target": "b"}, "was already used in"),
    ]:
        write_lines(path, [row, row])
        with pytest.raises(RecordError) as caught:
            examples("jsonl", path)
        assert said in str(caught.value)
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()


def test_numbers_of_records_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    for number in ("NaN", "Infinity", "1" + "0" * 400, "true", '"1"', "null"):
        path.write_text(f'{{"id": "a", "reward": {number}, "target_reward": 1}}\n')
        with pytest.raises(
            RecordError, match=r"line 1: field 'reward': expected a (finite )?number"
        ):
            records.read_rewards(path)


def test_a_data_set_with_a_program_is_not_run(tmp_path: Path) -> None:
    folder, proof = tmp_path / "set", tmp_path / "proof"
    folder.mkdir()
    (folder / "set.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    config = DataConfig.model_validate({"format": "auto", "dataset_name": str(folder)})
    with pytest.raises(DataError, match=r"data\.dataset_name: .*set"):
        list(read_examples(config, lambda *_: None))
    assert not proof.exists()


HOSTILE = [
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08" * 9, "\u202egnp.exe"),
    *("<script>alert(1)</script>", "</script><!-- ]]>", "\u2028", "\0", "[bold]x[/bold]", "‮"),
]


def test_texts_of_models_pass_through_files_as_they_are(tmp_path: Path) -> None:
    rows = [
        Example(str(n), [{"role": "user", "content": text}], text, [text])
        for n, text in enumerate(HOSTILE)
    ]
    write_examples(tmp_path / "x.jsonl", rows)
    assert records.read_examples(tmp_path / "x.jsonl") == rows
    samples = [Samples("a", [1], [Response(text, [1], "stop") for text in HOSTILE])]
    write_samples(tmp_path / "part-0.parquet", samples)
    assert records.read_samples_shard(tmp_path / "part-0.parquet") == samples


def test_texts_of_models_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE:
        console.say(text)
        console.warn(text)
        console.example(text, [("prompt", text), ("answer", text)])
    shown = capsys.readouterr().err
    assert not set(shown) & {"\x1b", "\x9b", "\r", "\x07", "\x08", "\0", "\u202e"}
    assert "<script>alert(1)</script>" in shown


@given(st.lists(st.text("ab \n\t", max_size=12), min_size=1, max_size=4))
def test_the_common_beginning_is_as_the_plain_loop_finds_it(texts: list[str]) -> None:
    end = 0
    for position, characters in enumerate(zip(*texts, strict=False), start=1):
        if len(set(characters)) > 1:
            break
        if characters[0].isspace():
            end = position
    shared = texts[0][:end].strip()
    if not shared:
        with pytest.raises(shapes.OddTranscript):
            shapes._common_beginning(texts[0], list(texts[1:]))
        return
    prompt, first, others = shapes._common_beginning(texts[0], list(texts[1:]))
    assert prompt == [{"role": "user", "content": shared}]
    assert [first, *others] == [text[end:] for text in texts]


def test_rows_left_out_are_shown_without_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{n}", "target": "a"} for n in range(5)]
    write_lines(tmp_path / "x.jsonl", [*rows, {"prompt": "\x1b[2J\u202e", "target": " "}])
    config = Config.model_validate(
        {"data": {"format": "jsonl", "path": str(tmp_path / "x.jsonl"), "num_test": 2}}
    )
    made = work(tmp_path / "out")
    data.run(config, {}, made)
    noted = json.dumps(made.notes["dropped"], ensure_ascii=False)
    for text in (noted, capsys.readouterr().err):
        assert "\x1b" not in text
        assert "\u202e" not in text
