"""The stage `filter`: pairs, similarities and counts, and what happens when files are broken."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import files_of, work, write_lines

from scmini.config import Config
from scmini.data import negatives
from scmini.data.selection import REASONS
from scmini.errors import DataError, RecordError
from scmini.records import (
    Example,
    Response,
    Samples,
    read_pairs,
    read_table,
    write_examples,
    write_samples,
    write_table,
)
from scmini.stages import embed, filter
from scmini.store import Work


def prepare(tmp_path: Path, *, num: int = 6, rejected: bool = True) -> dict[str, Path]:
    """`num` prompts with ever more distinct answers: i + 1 of them, and one blank, for prompt i."""
    examples = [
        Example(
            str(i),
            [{"role": "user", "content": f"q{i}"}],
            "the target",
            ["bad"] if rejected else [],
        )
        for i in range(num)
    ]
    rows = []
    for i in range(num):
        answers = [f"answer {'x' * j}" for j in range(i + 1)] + [" "]
        rows.append(Samples(str(i), [1], [Response(text, [2], "stop") for text in answers]))
    write_examples(tmp_path / "data" / "train.jsonl", examples)
    write_samples(tmp_path / "sample" / "part-00000.parquet", rows[:4])
    write_samples(tmp_path / "sample" / "part-00001.parquet", rows[4:])
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample"}
    embed.run(Config(), inputs, work(tmp_path / "embed"))
    return inputs | {"embed": tmp_path / "embed"}


def run(tmp_path: Path, methods: list[str], inputs: dict[str, Path], **options: Any) -> Work:
    made = work(tmp_path / "out")
    # jsonl: these prompts are not the zoo's
    config = Config.model_validate(
        {"methods": methods, "filter": options, "data": {"format": "jsonl", "path": "x"}}
    )
    filter.run(config, inputs, made)
    return made


def ids(made: Work, method: str) -> list[str]:
    return [pair.id for pair in read_pairs(made.path / "pairs" / f"{method}.jsonl")]


def similarities(made: Work) -> list[dict[str, Any]]:
    paths = sorted((made.path / "similarity").glob("*.parquet"))
    return [row for path in paths for row in read_table(path).to_pylist()]


ALL = [
    "sft",
    "dpo",
    "spin",
    "self-contrast-1",
    "self-contrast-2",
    "self-contrast-4",
    "self-contrast-4-unfiltered",
]


def test_stage_writes_nested_pairs(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    made = run(tmp_path, ALL, inputs)
    names = [f"pairs/{method}.jsonl" for method in sorted(ALL) if method != "sft"]
    similarity = [f"similarity/part-0000{i}.parquet" for i in range(2)]
    assert sorted(files_of(made.path)) == sorted([*names, *similarity, "used.jsonl"])
    # 0.75 of 1, 2, ... 6 unique answers, rounded up: 1 2 3 3 4 5
    assert ids(made, "self-contrast-1") == list("012345")
    assert ids(made, "self-contrast-2") == list("12345")
    assert ids(made, "self-contrast-4") == list("45")
    assert ids(made, "self-contrast-4-unfiltered") == list("345")
    assert made.counts["self-contrast-4: prompts with too few candidates"] == 4
    assert made.counts["filtered answers: blank"] == 6
    assert made.counts["spin answers: blank"] == 6
    assert made.notes["effective_k"]["self-contrast-4"] == 4
    assert made.notes["prompts"] == {m: len(ids(made, m)) for m in ALL if m != "sft"}
    assert "perfect_share" not in made.notes
    pairs = {
        k: {p.id: p for p in read_pairs(made.path / "pairs" / f"self-contrast-{k}.jsonl")}
        for k in (1, 2, 4)
    }
    for id, pair in pairs[4].items():
        assert pair.response_index[:2] == pairs[2][id].response_index
        assert pair.response_index[:1] == pairs[1][id].response_index
        assert pair.rejected == [f"answer {'x' * index}" for index in pair.response_index]
    (dpo, *_) = read_pairs(made.path / "pairs" / "dpo.jsonl")
    assert (dpo.rejected, dpo.response_index, dpo.similarity) == (["bad"], [-2], [0.0])


def test_stage_keeps_the_least_similar(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    made = run(tmp_path, ["self-contrast-1"], inputs, keep_fraction=0.01)
    rows = similarities(made)
    lowest = {row["id"]: min(row["similarity"][:-1]) for row in rows}  # the last is blank
    for pair in read_pairs(made.path / "pairs" / "self-contrast-1.jsonl"):
        assert pair.similarity == [lowest[pair.id]]


def test_used_is_the_union(tmp_path: Path) -> None:
    made = run(tmp_path, ALL, prepare(tmp_path))
    union: dict[str, set[int]] = {}
    for method in ALL[1:]:
        for pair in read_pairs(made.path / "pairs" / f"{method}.jsonl"):
            union.setdefault(pair.id, set()).update(pair.response_index)
    lines = (made.path / "used.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": id, "response_index": sorted(union[id])} for id in sorted(union)
    ]


def test_fewer_and_common(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    fewer = run(tmp_path / "a", ALL, inputs, allow_fewer=True)
    assert ids(fewer, "self-contrast-4") == list("012345")
    assert fewer.notes["effective_k"]["self-contrast-4"] == pytest.approx(
        (1 + 2 + 3 + 3 + 4 + 4) / 6, abs=1e-3
    )
    common = run(tmp_path / "b", ALL, inputs, common_subset=True)
    for method in ALL[2:]:
        assert ids(common, method) == list("45")
    assert common.counts["self-contrast-1: prompts outside the common subset"] == 4
    assert ids(common, "dpo") == list("012345")


def test_original_mode_and_its_need_for_room(tmp_path: Path) -> None:
    made = run(tmp_path, ["self-contrast-4"], prepare(tmp_path), mode="last-5")
    # of 7 answers the ranks below max(3, 4): four, of which the blank one goes
    assert not {"0", "1", "2"} & set(ids(made, "self-contrast-4"))


def test_only_the_data_sets_own_preferences(tmp_path: Path) -> None:
    inputs = {"data": prepare(tmp_path)["data"]}
    made = run(tmp_path, ["dpo"], inputs)
    assert sorted(files_of(made.path)) == ["pairs/dpo.jsonl", "used.jsonl"]
    assert ids(made, "dpo") == list("012345")


def test_methods_without_pairs_are_errors(tmp_path: Path) -> None:
    inputs = prepare(tmp_path, rejected=False)
    with pytest.raises(DataError, match="no training row has a rejected answer"):
        run(tmp_path, ["dpo"], inputs)
    with pytest.raises(DataError, match=r"self-contrast-9: no prompt has enough .*allow_fewer"):
        run(tmp_path, ["self-contrast-9"], inputs)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    second = inputs["sample"] / "part-00001.parquet"
    good = second.read_bytes()

    def complaint(rows: list[Samples] | None = None) -> str:
        if rows is not None:
            write_samples(second, rows)
        with pytest.raises(DataError) as caught:
            run(tmp_path, ["self-contrast-1"], inputs)
        second.write_bytes(good)
        return str(caught.value)

    def sampled(id: str, number: int) -> Samples:
        return Samples(id, [1], [Response(str(j), [2], "stop") for j in range(number)])

    vectors = inputs["embed"] / "part-00001.npy"
    text = complaint([sampled("4", 1), sampled("5", 7)])
    assert "part-00001.parquet, row 1: prompt '4' with 1 answers does not fit" in text
    assert f"('4', 7 vectors) in {vectors}" in text
    assert "row 2: prompt '3' with 7" in complaint([sampled("4", 6), sampled("3", 7)])
    assert f"{vectors}: vectors of 2 prompts do not fit the 1 of" in complaint([sampled("4", 6)])

    lines = (inputs["data"] / "train.jsonl").read_text().splitlines(keepends=True)
    (inputs["data"] / "train.jsonl").write_text("".join([*lines[:4], lines[5], lines[4]]))
    text = complaint()
    assert f"{second}, row 2: prompt '5' is not in data/train.jsonl, or not in its order" in text
    assert "--from sample --force" in text
    (inputs["data"] / "train.jsonl").write_text("".join(lines))

    (inputs["sample"] / "part-00002.parquet").write_bytes(good)
    assert "part-00002.parquet are missing; embed again" in complaint()
    (inputs["sample"] / "part-00002.parquet").unlink()
    second.unlink()
    assert f"{vectors}: there are no answers of this shard" in complaint()
    run(tmp_path, ["self-contrast-1"], inputs)  # all is well again


def broken(name: str, inputs: dict[str, Path]) -> Path:
    """One file of a stage before, torn or meddled with."""
    folder = "embed" if ".npy" in name or "ids" in name else "sample"
    path = inputs[folder] / name
    path.write_bytes(path.read_bytes()[:-30])
    return path


@pytest.mark.parametrize("name", ["part-00001.parquet", "part-00001.npy", "part-00001.ids.json"])
def test_a_torn_shard_is_named_and_work_is_kept(tmp_path: Path, name: str) -> None:
    inputs = prepare(tmp_path)
    path = broken(name, inputs)
    with pytest.raises(DataError, match=path.stem.split(".")[0]) as caught:
        run(tmp_path, ["self-contrast-1"], inputs)
    assert str(path.parent) in str(caught.value)
    assert files_of(tmp_path / "out").keys() == {"similarity/part-00000.parquet"}


def test_shards_that_are_none(tmp_path: Path) -> None:
    import pyarrow as pa

    inputs = prepare(tmp_path)
    path = inputs["sample"] / "part-00000.parquet"
    table = read_table(path)
    for column in ("id", "responses"):
        write_table(path, table.drop_columns([column]))
        with pytest.raises(DataError, match=rf"{path}: not a shard of answers .*{column}"):
            run(tmp_path, ["self-contrast-1"], inputs)
    rows = table.to_pylist()
    rows[1]["responses"][0]["text"] = None
    write_table(path, pa.Table.from_pylist(rows, table.schema))
    with pytest.raises(
        RecordError, match=r"part-00000\.parquet, line 2: an id or a text is missing"
    ):
        run(tmp_path, ["self-contrast-1"], inputs)
    row = {"id": "0", "prompt": [{"role": "user", "content": "a"}], "target": 3}
    write_lines(inputs["data"] / "train.jsonl", [row])
    write_table(path, table)
    with pytest.raises(RecordError, match="line 1: field 'target': expected text, got int"):
        run(tmp_path, ["self-contrast-1"], inputs)


@pytest.mark.parametrize(
    ("row", "whose"),
    [
        *((0, "the target of prompt '4'"), (6, "answer 6 of prompt '4'")),
        *((7, "the target of prompt '5'"), (9, "answer 2 of prompt '5'")),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite(tmp_path: Path, row: int, whose: str, value: float) -> None:
    inputs = prepare(tmp_path)
    path = inputs["embed"] / "part-00001.npy"
    vectors = np.load(path)
    vectors[row, 5] = value
    np.save(path, vectors)
    with pytest.raises(DataError) as caught:
        run(tmp_path, ["self-contrast-1"], inputs)
    assert f"{path}, row {row}: the vector of {whose} is not finite" in str(caught.value)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["similarity", "lines", "sync"])
def test_a_disk_that_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    inputs = prepare(tmp_path)
    whole = files_of(run(tmp_path / "whole", ALL, inputs).path)
    with monkeypatch.context() as patched:
        if where == "similarity":
            second = "part-00001.parquet"
            patched.setattr(
                filter,
                "write_table",
                lambda p, t: full_disk() if p.name == second else write_table(p, t),
            )
        elif where == "lines":
            patched.setattr(filter._Lines, "write", full_disk)
        else:  # all was written into the cache of the system, and then there was no room for it
            patched.setattr(filter.os, "fsync", full_disk)
            patched.setattr(filter, "write_table", write_without_sync)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, ALL, inputs)
    left = files_of(tmp_path / "out")
    shards = {"similarity": 1, "lines": 0, "sync": 2}[where]
    assert left == {f"similarity/part-0000{i}.parquet": whole[f"similarity/part-0000{i}.parquet"]
                    for i in range(shards)}  # fmt: skip
    assert files_of(run(tmp_path, ALL, inputs).path) == whole


def write_without_sync(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def test_similarity_tells_why_answers_are_dropped(tmp_path: Path) -> None:
    made = run(tmp_path, ["self-contrast-1", "spin"], prepare(tmp_path), keep_fraction=0.5)
    reasons: dict[str, int] = {}
    for row in similarities(made):
        assert len(row["dropped"]) == len(row["similarity"]) == int(row["id"]) + 2
        assert row["dropped"][-1] == "blank"
        kept = [v for v, why in zip(row["similarity"], row["dropped"], strict=True) if not why]
        cut = [
            v
            for v, why in zip(row["similarity"], row["dropped"], strict=True)
            if why == "too similar to the target"
        ]
        assert len(kept) == (int(row["id"]) + 2) // 2
        assert max(kept) <= min(cut, default=1)
        for why in row["dropped"]:
            reasons[why or "kept"] = reasons.get(why or "kept", 0) + 1
    table = made.notes["rules"]["filtered"]
    assert table == {
        **{"prompts": 6, "answers": 27, "kept": reasons.pop("kept")},
        "dropped": {reason: reasons[reason] for reason in REASONS if reason in reasons},
    }
    for reason, number in reasons.items():
        assert made.counts[f"filtered answers: {reason}"] == number
    spin = made.notes["rules"]["spin"]
    assert spin == {"prompts": 6, "answers": 27, "dropped": {"blank": 6}, "kept": 21}


def test_a_line_tells_what_became_of_the_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, ["self-contrast-1", "spin"], prepare(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "27 answers: 22 % blank, 11 % too similar to the target; 18 candidates",
        "spin: 27 answers: 22 % blank; 21 candidates",
    ]
    assert negatives._percent(0.00049) == "under 0.1 %"
    assert negatives._percent(0.031) == "3.1 %"


def test_again_gives_the_same_bytes(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    first = run(tmp_path, ALL, inputs)
    before = files_of(first.path)
    again = run(tmp_path, ALL, inputs)  # in the same folder, leftovers present
    assert files_of(again.path) == before
    assert again.counts == first.counts


def test_zoo_notes_the_share_of_perfect_answers(tmp_path: Path) -> None:
    from scmini.data import zoo

    (example,) = zoo.examples(0, "train", 1, 0.0)
    perfect, flawed = str(example["target"]), str(example["rejected"][0])  # type: ignore[index]
    write_examples(tmp_path / "data" / "train.jsonl", [Example(**(example | {"target": "x"}))])  # type: ignore[arg-type]
    responses = [Response(text, [1], "stop") for text in (perfect, flawed)]
    write_samples(
        tmp_path / "sample" / "part-00000.parquet", [Samples(str(example["id"]), [1], responses)]
    )
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample", "embed": tmp_path / "embed"}
    embed.run(Config(), inputs, work(inputs["embed"]))
    made = work(tmp_path / "out")
    filter.run(Config.model_validate({"methods": ["self-contrast-2"]}), inputs, made)
    assert made.notes["perfect_share"] == {"self-contrast-2": 0.5}
