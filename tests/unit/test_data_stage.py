"""Stage `data`: splits, limits, files."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import SHARED, files_of, needs_shared, work, write_lines

from scmini.config import Config
from scmini.data import readers, split
from scmini.errors import DataError, RecordError
from scmini.records import Example, read_examples
from scmini.stages import data
from scmini.store import Work


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"what is {number}?", "target": f"it is {number}"} | more


def run(tmp_path: Path, rows: list[dict[str, Any]], name: str = "out", **settings: Any) -> Work:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = Config.model_validate(
        {"data": {"format": "jsonl", "path": str(path), "num_test": 3} | settings}
    )
    made = work(tmp_path / name)
    data.run(config, {}, made)
    return made


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(path: Path) -> set[str]:
    return {split.prompt_digest(example.prompt) for example in read_examples(path)}


def test_no_prompt_on_both_sides_and_nothing_lost(tmp_path: Path) -> None:
    rows = [row(i % 10, target=f"{i}", rejected=["no", f"{i} "]) for i in range(40)]
    made = run(tmp_path, rows)
    train, test = (read_examples(made.path / f"{side}.jsonl") for side in ("train", "test"))
    assert not prompts(made.path / "train.jsonl") & prompts(made.path / "test.jsonl")
    assert len(test) == 3
    assert len(train) == 28
    assert made.counts == {split.LEAKED: 9, readers.USELESS_REJECTED: 40}
    assert all(example.rejected == ["no"] for example in train)


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [row(i, id=str(i)) for i in range(30)]
    forward = run(tmp_path, rows, "a")
    backward = run(tmp_path, rows[::-1], "b")
    assert files_of(forward.path) == files_of(backward.path)
    # and it mixes: neither side is a stretch of the file
    ids = [int(example.id) for example in read_examples(forward.path / "train.jsonl")]
    assert ids != sorted(ids)


def test_corpus_and_preferences_come_from_the_training_side(tmp_path: Path) -> None:
    made = run(
        tmp_path, [row(i, rejected=[f"no {i}"]) for i in range(20)], num_pretraining=11, num_train=5
    )
    test = {example.prompt[0]["content"] for example in read_examples(made.path / "test.jsonl")}
    corpus = [dialogue["messages"] for dialogue in lines(made.path / "corpus.jsonl")]
    assert len(corpus) == 11
    assert not {dialogue[0]["content"] for dialogue in corpus} & test
    assert [d[1]["content"].startswith("no") for d in corpus] == [bool(i % 2) for i in range(11)]
    preferences = lines(made.path / "preferences.jsonl")
    assert len(preferences) == 17
    assert not {p["prompt"][0]["content"] for p in preferences} & test
    assert all(p["rejected"] == p["chosen"].replace("it is", "no") for p in preferences)
    assert len(read_examples(made.path / "train.jsonl")) == 5


def test_a_named_model_needs_no_corpus(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row(i) for i in range(9)])
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": "some/model"},
            "data": {"format": "jsonl", "path": str(path), "num_test": 3},
            "reward": {"model_name_or_path": "some/reward"},
        }
    )
    data.run(config, {}, work(tmp_path / "out"))
    assert sorted(files_of(tmp_path / "out")) == ["test.jsonl", "train.jsonl"]


def test_limits_drop_and_count(tmp_path: Path) -> None:
    rows = [row(i) for i in range(10)] + [row(10, prompt="x" * 50), row(11, target="y" * 50)]
    rows += [row(12, target="  "), row(13, prompt=" ")]
    made = run(tmp_path, rows, max_prompt_chars=20, max_target_chars=20)
    assert made.counts == {
        split.LONG_PROMPT: 1,
        split.LONG_TARGET: 1,
        readers.EMPTY_TARGET: 1,
        readers.EMPTY_PROMPT: 1,
    }
    assert made.notes["rows"] == {"train": 7, "test": 3, "usable": 10}


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 usable prompts, and data.num_test: 3 leaves none"):
        run(tmp_path, [row(i % 3) for i in range(30)])
    with pytest.raises(DataError, match="num_pretraining: 0"):
        run(tmp_path, [row(i) for i in range(9)], num_pretraining=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, r"line 2: field 'target': expected text, got None"),
        ({"prompt": []}, r"line 2: field 'prompt': expected text or a list"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, r"one of system, user, assistant"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
        ({"rejected": "no"}, "field 'rejected': expected a list of texts"),
        ({"id": "rows-000001"}, r"'rows-000001' was already used in .*line 1"),
        ({"id": 4}, "field 'id': expected text"),
    ],
)
def test_broken_rows_name_file_line_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        run(tmp_path, [row(0), row(1) | change, row(2)])


def test_files_of_one_name_need_other_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    hello = {
        "chosen": "\n\nHuman: hi\n\nAssistant: yes",
        "rejected": "\n\nHuman: hi\n\nAssistant: no",
    }
    paths = [write_lines(tmp_path / name / "x.jsonl", [hello]) for name in ("a", "b")]
    config = Config.model_validate({"data": {"format": "hh-rlhf", "path": [str(p) for p in paths]}})
    with pytest.raises(DataError, match="different names"):
        data.run(config, {}, work(tmp_path / "out"))


def test_zoo_is_a_function_of_the_seed(tmp_path: Path) -> None:
    settings = {"data": {"num_train": 40, "num_test": 20, "num_pretraining": 30}}
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data.run(Config.model_validate(settings | {"seed": seed}), {}, work(tmp_path / name))
        found.append(files_of(tmp_path / name))
    assert found[0] == found[1] != found[2]
    folder = tmp_path / "a"
    sizes = {path.stem: len(lines(path)) for path in folder.glob("*.jsonl")}
    assert sizes == {"train": 40, "test": 20, "corpus": 30, "preferences": 40}
    assert not prompts(folder / "train.jsonl") & prompts(folder / "test.jsonl")


@needs_shared
def test_real_transcripts(tmp_path: Path) -> None:
    paths = [
        str(SHARED / "data" / f"hh_{name}-base_raw.jsonl.gz") for name in ("harmless", "helpful")
    ]
    config = Config.model_validate({"data": {"format": "hh-rlhf", "path": paths, "num_test": 200}})
    made = work(tmp_path / "out")
    data.run(config, {}, made)
    train = read_examples(made.path / "train.jsonl")
    assert len(train) + 200 + sum(made.counts.values()) == 1900 + 1877
    assert not prompts(made.path / "train.jsonl") & prompts(made.path / "test.jsonl")
    sources = [example.id.startswith("hh_harmless") for example in train[:400]]
    assert 120 < sum(sources) < 280  # the two files are mixed


def test_prompts_that_differ_in_case_or_space_are_one(tmp_path: Path) -> None:
    texts = ("What  is {}?", "what is {}?", " WHAT IS\n{}? ")
    rows = [row(i, prompt=text.format(i)) for i in range(12) for text in texts]
    made = run(tmp_path, rows)
    train, test = (read_examples(made.path / f"{side}.jsonl") for side in ("train", "test"))
    asked = [{e.prompt[0]["content"].split()[2] for e in side} for side in (train, test)]
    assert not asked[0] & asked[1]
    assert (len(train), len(test)) == (27, 3)
    assert made.counts == {split.LEAKED: 6}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_first_turns(tmp_path: Path) -> None:
    """A dialogue is tested with its opening, and no dialogue that begins so is trained on."""
    rows = [
        {"messages": turns(f"q{i}", f"a{i}{j}", *([f"r{j}", "b"] if j else []))}
        for i in range(10)
        for j in (2, 0, 1)
    ]
    made = run(tmp_path, rows, format="auto", num_test=4, test_prompts="first-turn")
    train, test = (read_examples(made.path / f"{side}.jsonl") for side in ("train", "test"))
    tested = {example.prompt[0]["content"] for example in test}
    assert len(tested) == len(test) == 4
    assert all(e.target == f"a{e.prompt[0]['content'][1:]}0" for e in test), "the shortest is taken"
    assert len(train) == 18
    assert not tested & {example.prompt[0]["content"] for example in train}
    assert made.counts == {split.LEAKED: 8}
    longer = [Example("x", turns("q", "a", "r"), "b", ["c"])]
    others = [Example("y", turns("o"), "b")]
    found = split.split(others, 1, print, tests=longer, first_turn=True)
    assert found == (others, [Example("x", turns("q"), "a")])


def test_a_test_split_of_its_own() -> None:
    train = [Example(f"t{i}", turns(f"Q {i}"), "a") for i in range(8)]
    tests = [Example(f"e{i}", turns(f"q  {i % 10}"), "a") for i in range(6, 26)]
    drops: list[str] = []

    def run(num_test: int) -> tuple[list[Example], list[Example]]:
        drops.clear()
        return split.split(train, num_test, lambda r, e: drops.append(f"{r} {e.id}"), tests=tests)

    left, tested = run(3)
    numbers = {int(e.id[1:]) % 10 for e in tested}
    assert len(numbers) == len(tested) == 3
    assert {e.id for e in left} == {f"t{i}" for i in range(8) if i not in numbers}
    assert len(drops) == 3 + sum(f"t{i}" in " ".join(drops).split() for i in range(8))
    assert run(3)[1] == tested
    with pytest.raises(DataError, match="gives 10 test prompts and leaves 0 to train on"):
        run(20)
    with pytest.raises(DataError, match="gives 0 test prompts"):
        split.split(train, 3, print, tests=[])


def test_the_first_of_each_reason_is_shown_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "\x1b[31mred\u202e\n\nline\ttab\x07 " + "x" * 500
    rows = [row(i) for i in range(9)] + [
        row(9, target="", prompt=odd),
        row(10, target=" ", prompt="not shown"),
        row(11, rejected=[""]),
    ]
    made = run(tmp_path, rows)
    assert made.counts == {readers.EMPTY_TARGET: 2, readers.USELESS_REJECTED: 1}
    said = [text for text in capsys.readouterr().err.split("\n") if text]
    assert said[0].startswith(f"left out, {readers.EMPTY_TARGET}: rows-000010: red line tab xxx")
    assert len(said[0]) == len(f"left out, {readers.EMPTY_TARGET}: ") + 100
    assert said[1] == (
        f"left out, {readers.USELESS_REJECTED}: rows-000012: what is 11? ... it is 11"
    )
    assert len(said) == 2
    noted = made.notes["dropped"]
    assert list(noted) == list(made.counts)
    assert len(noted[readers.EMPTY_TARGET]) == 300


def test_a_row_that_cannot_be_shown(tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    made = work(tmp_path)
    data._Dropped(made)("odd", readers.Row(Path("x"), 1, {"a": nested, "b": b"\xff"}))
    data._Dropped(made)("odd", readers.Row(Path("x"), 1, {"a": b"\xff", "b": float("nan")}))
    assert made.counts == {"odd": 2}


def test_limits_count_all_messages() -> None:
    long = Example("a", [{"role": "user", "content": "xx"}, {"role": "user", "content": "yy"}], "z")
    drops: list[str] = []

    def dropped(reason: str, example: Any) -> None:
        assert example is long
        drops.append(reason)

    assert list(split.within_limits([long], 4, 1, dropped)) == [long]
    assert list(split.within_limits([long], 3, 1, dropped)) == []
    assert drops == [split.LONG_PROMPT]
