"""The stage `embed`."""

import errno
import io
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from data_helpers import files_of, needs_shared, shared_rows, work
from odd_texts import ODD
from tiny_bert import HIDDEN, write_published

from scmini.config import Config
from scmini.data.vectors import read_vectors_shard
from scmini.errors import DataError
from scmini.records import Example, Response, Samples, write_examples, write_samples
from scmini.stages import embed
from scmini.store import Work, write_atomic


def read_vectors(folder: Path) -> Iterator[tuple[list[tuple[str, int]], Any]]:
    return map(read_vectors_shard, sorted(folder.glob("part-*.npy")))


GROUPS = [["one", "two", "two"], [], ["", "target 2"], ["one"], ["three four"]]


def write_inputs(
    folder: Path, groups: list[list[str]] = GROUPS, sizes: tuple[int, ...] = (3, 2)
) -> dict[str, Path]:
    """Prompt i has the target "target i" and these answers; shards hold so many prompts each."""
    ids = [str(number) for number in range(len(groups))]
    examples = [Example(id, [{"role": "user", "content": "q"}], f"target {id}") for id in ids]
    write_examples(folder / "data" / "train.jsonl", examples)
    rows = [
        Samples(id, [1], [Response(text, [2], "stop") for text in group], None if group else "long")
        for id, group in zip(ids, groups, strict=True)
    ]
    start = 0
    for number, size in enumerate(sizes):
        write_samples(folder / "sample" / f"part-{number:05d}.parquet", rows[start : start + size])
        start += size
    return {"data": folder / "data", "sample": folder / "sample"}


def test_embed_stage(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    config = Config.model_validate({"embed": {"dimensions": 256}})
    made = work(tmp_path / "out")
    embed.run(config, inputs, made)
    shards = list(read_vectors(made.path))
    assert [groups for groups, _ in shards] == [
        [("0", 4), ("1", 1), ("2", 3)],
        [("3", 2), ("4", 2)],
    ]
    vectors = shards[0][1]
    assert vectors.dtype == np.float16
    assert isinstance(vectors, np.memmap)
    assert (vectors[2] == vectors[3]).all()
    assert (vectors[7] == vectors[5]).all()  # target 2, and the answer that equals it
    assert not vectors[6].any()
    assert np.linalg.norm(np.delete(vectors, 6, 0).astype(float), axis=1) == pytest.approx(
        1, abs=2e-3
    )
    assert made.counts == {"empty texts (zero vector)": 1}
    assert {key: made.notes[key] for key in ("dimensions", "texts", "long_share")} == {
        "dimensions": 256,
        "texts": 12,
        "long_share": 0.0,
    }
    with pytest.raises(DataError, match=r"no part-\*\.parquet"):
        embed.run(config, inputs | {"sample": tmp_path / "data"}, work(tmp_path / "none"))


@pytest.mark.parametrize(
    ("long_texts", "reason"),
    [("truncate", "texts cut at embed.max_length"),
     ("mean", "texts read in pieces of embed.max_length")],
)  # fmt: skip
def test_with_a_sentence_transformer(tmp_path: Path, long_texts: str, reason: str) -> None:
    long = "the cat says meow " * 5
    inputs = write_inputs(tmp_path, [["a", long, long], [" ", long + "dog"], ODD], (2, 1))
    encoder = str(write_published(tmp_path / "bert"))
    settings = {"encoder": encoder, "max_length": 16, "long_texts": long_texts}
    made = work(tmp_path / "out")
    embed.run(Config.model_validate({"embed": settings}), inputs, made)
    (_, first), (_, odd) = read_vectors(made.path)
    assert first.shape == (7, HIDDEN)
    assert bool((first[2] == first[6]).all()) == (long_texts == "truncate")
    blank = sum(not vector.any() for vector in odd)
    assert made.counts["empty texts (zero vector)"] == 1 + blank
    assert 1 <= blank < len(ODD)
    listed = json.loads((made.path / "part-00000.ids.json").read_text())
    assert listed == [
        {"id": "0", "rows": 4, "empty": 0, "long": 2},
        {"id": "1", "rows": 3, "empty": 1, "long": 1},
    ]
    assert made.counts[reason] >= 3
    assert made.notes["long_share"] == round(made.counts[reason] / (7 + 1 + len(ODD)), 4)


def finish(config: Config, inputs: dict[str, Path], folder: Path) -> Work:
    made = work(folder)
    embed.run(config, inputs, made)
    made.notes.pop("peak_gib")
    return made


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_interrupted_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    inputs, config = write_inputs(tmp_path, GROUPS, (2, 1, 2)), Config()
    whole = finish(config, inputs, tmp_path / "whole")
    for stop in range(1, 8):  # the fitted rarity, then ids and vectors of three shards
        folder, calls = work(tmp_path / f"torn{stop}").path, []

        def write(path: Path, data: bytes, stop: int = stop, calls: list = calls) -> None:
            calls.append(path)
            if len(calls) == stop:
                raise error
            write_atomic(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(embed, "write_atomic", write)
            patch.setattr("scmini.models.hashed_ngrams.write_atomic", write)
            with pytest.raises(type(error)):
                embed.run(config, inputs, work(folder))
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
        assert len(kept) == max(0, (stop - 2) // 2)
        again = finish(config, inputs, folder)
        assert files_of(folder) == files_of(whole.path)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        assert (again.counts, again.notes) == (whole.counts, whole.notes)


def test_nothing_finished_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, config = write_inputs(tmp_path), Config()
    whole = finish(config, inputs, tmp_path / "out")
    shutil.copytree(whole.path, tmp_path / "torn")
    (tmp_path / "torn" / "part-00001.npy").unlink()
    (inputs["sample"] / "part-00000.parquet").write_bytes(b"not to be read")
    again = finish(config, inputs, tmp_path / "torn")
    assert files_of(again.path) == files_of(whole.path)
    # Sealing has begun (scratch/ is gone) when the machine goes down: not even the encoder is made.
    shutil.rmtree(tmp_path / "torn" / "scratch")
    monkeypatch.setattr(embed, "build_encoder", None)
    last = finish(config, inputs, tmp_path / "torn")
    assert (last.counts, last.notes) == (whole.counts, whole.notes)


@pytest.mark.parametrize("listed", ["", "[1]", '{"id": "3"}', '[{"id": "3", "rows": 2}]', '[{"id"'])
def test_a_shard_without_its_counts_is_made_again(tmp_path: Path, listed: str) -> None:
    inputs = write_inputs(tmp_path)
    whole = finish(Config(), inputs, tmp_path / "out")
    before = files_of(whole.path)
    (whole.path / "part-00001.ids.json").write_text(listed)
    finish(Config(), inputs, whole.path)
    assert files_of(whole.path) == before


class FakeEncoder:
    """Random unit vectors; some texts may give what no vector should hold."""

    dimensions = 4096
    broken: ClassVar[dict[str, float]] = {}

    def fit(self, batches: Any, kept: Path | None = None) -> None:
        """Reads nothing."""

    def encode(self, texts: list[str], on_share: Callable[[float], None]) -> Any:
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        random = np.random.default_rng(0)
        for number, text in enumerate(texts):
            vectors[number] = random.standard_normal(self.dimensions)
            vectors[number] /= np.linalg.norm(vectors[number])
            vectors[number, -1] = self.broken.get(text, vectors[number, -1])
            on_share((number + 1) / len(texts))
        return vectors, np.zeros(len(texts), np.bool_)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "build_encoder", lambda config: FakeEncoder())


@pytest.mark.parametrize(
    ("groups", "where"),
    [([["a", "b"], ["c"], ["a", "d", "nan"]], r"part-00001\.parquet: prompt '2', response 2"),
     ([["a", "b"], ["c"], ["inf", "d"]], r"part-00001\.parquet: prompt '2', response 0"),
     ([["a"], ["b"], [], ["d"], ["e"]], r"part-00001\.parquet: prompt '4', the target")],
)  # fmt: skip
@pytest.mark.usefixtures("fake")
def test_vectors_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[list[str]], where: str
) -> None:
    broken = {"nan": np.nan, "inf": np.inf, "target 4": -np.inf}
    monkeypatch.setattr(FakeEncoder, "broken", broken)
    inputs = write_inputs(tmp_path, groups, (2, len(groups) - 2))
    made = work(tmp_path / "out")
    with pytest.raises(DataError, match=where + r": .*not finite; set embed\.dtype: float32"):
        embed.run(Config(), inputs, made)
    assert sorted(files_of(made.path)) == ["part-00000.ids.json", "part-00000.npy"]


def test_each_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = FakeEncoder(), []
    monkeypatch.setattr(embed, "build_encoder", lambda config: encoder)
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *a: (seen.append(a[0]), encode(*a))[1])
    embed.run(Config(), write_inputs(tmp_path), work(tmp_path / "out"))
    assert seen[0] == ["target 0", "one", "two", "target 1", "target 2", ""]
    assert seen[1] == ["target 3", "one", "target 4", "three four"]


@pytest.mark.usefixtures("fake")
def test_one_shard_in_memory(tmp_path: Path) -> None:
    """A shard's vectors in float32, in float16 and as bytes of a file: never those of two."""

    def peak(shards: int, name: str) -> int:
        folder = tmp_path / name
        groups = [[f"{i} {j}" for j in range(15)] for i in range(8 * shards)]
        inputs = write_inputs(folder, groups, (8,) * shards)
        made = work(folder / "out")
        tracemalloc.start()
        try:
            embed.run(Config(), inputs, made)
            for _, vectors in read_vectors(made.path):
                assert np.isfinite(vectors).all()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    shard = 8 * 16 * FakeEncoder.dimensions * 2
    peak(1, "imports")
    one, six = peak(1, "one"), peak(6, "six")
    assert 3 * shard <= one
    assert one <= 5 * shard
    assert six <= one + shard // 4


@pytest.mark.usefixtures("fake")
def test_progress_counts_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seen = write_inputs(tmp_path), []
    monkeypatch.setattr(embed, "progress", lambda *event: seen.append(event))
    made = work(tmp_path / "out")
    embed.run(Config(), inputs, made)
    assert {event[1:] for event in seen} == {(12, "texts")}
    done = [event[0] for event in seen]
    assert (done[0], done[-1]) == (0, 12)
    assert done == sorted(done)
    assert len(set(done)) > 5
    seen.clear()
    (made.path / "part-00001.npy").unlink()
    embed.run(Config(), inputs, made)
    assert seen[0] == (8, 12, "texts")
    assert seen[-1] == (12, 12, "texts")


def test_prompts_that_do_not_fit(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    train = inputs["data"] / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(DataError, match=r"part-00001\.parquet, row 2: prompt '4' is not in data/"):
        embed.run(Config(), inputs, work(tmp_path / "out"))
    shard = inputs["sample"] / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-00001\.parquet: not a readable Parquet file"):
        embed.run(Config(), inputs, work(tmp_path / "out"))


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("npy", b"", "not readable"),
        ("npy", b"\x93NUMPY", "not readable"),
        ("npy", saved(np.zeros((4, 64), np.float16))[:-1], "not readable"),
        ("npy", saved(np.zeros((4, 64), np.float32)), "expected rows of float16, found float32"),
        ("npy", saved(np.zeros(4, np.float16)), r"float16, found float16 of shape \(4,\)"),
        ("npy", saved(np.array([{}])), "not readable"),
        (
            "npy",
            saved(np.zeros((3, 64), np.float16)),
            r"3 vectors do not fit part-00001\.ids\.json",
        ),
        ("npy", saved(np.zeros((0, 64), np.float16)), "0 vectors do not fit"),
        ("ids.json", b'[{"id": "3", "rows": 3}]', "4 vectors do not fit"),
        ("ids.json", b'[{"id": "3", "rows": -4}]', "'rows' is not a number of rows"),
        ("ids.json", b'[{"id": "3", "rows": true}]', "'rows' is not a number of rows"),
        ("ids.json", b'[{"id": 3, "rows": 4}]', "entry 0 has no 'id'"),
        ("ids.json", b"{}", "expected a list"),
        ("ids.json", b"[", "not readable"),
        ("ids.json", b"\xff\xfe\xff", "not readable"),
        ("ids.json", None, "not readable"),
    ],
)
def test_damaged_vectors(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    config = Config.model_validate({"embed": {"dimensions": 64}})
    made = finish(config, write_inputs(tmp_path), tmp_path / "out")
    path = made.path / f"part-00001.{name}"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    reader = read_vectors(made.path)
    assert len(next(reader)[1]) == 8
    file = path.name if "vectors do not fit" not in complaint else "part-00001.npy"
    with pytest.raises(DataError, match=rf"{file}: .*{complaint}"):
        next(reader)


@needs_shared
def test_real_answers(tmp_path: Path) -> None:
    """Human targets and eight models' answers, blank ones and repeated ones among them."""
    rows = shared_rows("self_instruct_user_responses.jsonl.gz")[:40]
    groups = [row["outputs"] for row in rows]
    inputs = write_inputs(tmp_path, groups, (16, 24))
    made = finish(Config(), inputs, tmp_path / "out")
    blank = sum(not text.strip() for group in groups for text in group)
    assert made.counts["empty texts (zero vector)"] == blank > 0
    assert made.notes["texts"] == 40 + sum(map(len, groups))
