"""Files of the original project: rows as it wrote them, and the odd ones among them."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import needs_shared, shared_rows, work, write_lines
from hypothesis import given
from hypothesis import strategies as st

from scmini.config import Config
from scmini.data import hh_rlhf, readers, self_contrast
from scmini.data.readers import data_files
from scmini.errors import DataError, RecordError
from scmini.records import Example, read_examples
from scmini.sections import DataConfig
from scmini.stage_graph import Task, inputs, recipe
from scmini.stages import data
from scmini.store import Work

Read = tuple[list[Example], dict[str, list[str]], list[str]]


def read(tmp_path: Path, rows: list[Any], name: str = "train.jsonl") -> Read:
    """Examples, answers by id, and reasons."""
    path = write_lines(tmp_path / name, rows)
    answers: dict[str, list[str]] = {}
    drops: list[str] = []
    found = list(
        self_contrast.read_self_contrast(
            [path], lambda reason, _: drops.append(reason), lambda id, a: answers.update({id: a})
        )
    )
    return found, answers, drops


def alpaca(instruction: str, output: Any, **more: Any) -> dict[str, Any]:
    row = {"instruction": instruction, "input": "", "output": output}
    return row | {"system": "", "history": []} | more


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def config(path: Any, engine: str = "data", **more: Any) -> Config:
    settings = {"format": "self-contrast", "path": path, "num_test": 2} | more
    return Config.model_validate(
        {
            "model": {"model_name_or_path": "some/model"},
            "reward": {"model_name_or_path": "some/reward"},
            **{"data": settings, "sample": {"engine": engine}},
        }
    )


def run(tmp_path: Path, config: Config, name: str = "out") -> Work:
    made = work(tmp_path / name)
    data.run(config, {}, made)
    return made


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_sft_rows(tmp_path: Path) -> None:
    rows = [
        alpaca("q", "a", id="own", unknown={"x": 1}),
        alpaca("q", "a", input="and this", system="be kind", history=[["one", "two"], ["", ""]]),
        {"instruction": "q", "output": "a", "history": None, "system": None, "id": 17},
    ]
    found, answers, drops = read(tmp_path, rows)
    assert [example.id for example in found] == ["own", "train-000002", "17"]
    assert found[0] == Example("own", user("q"), "a")
    assert found[1].prompt == [
        {"role": "system", "content": "be kind"},
        *({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}),
        *({"role": "user", "content": ""}, {"role": "assistant", "content": ""}),
        {"role": "user", "content": "q\nand this"},
    ]
    assert not answers
    assert not drops


def test_neighbouring_pairs_of_one_prompt_and_target_are_one_example(tmp_path: Path) -> None:
    rows = [alpaca("q", ["a", text]) for text in ("b", " ", "c", "a ", "b")]
    rows += [alpaca("q", ["other", "b"]), alpaca("q2", ["other", "b"]), alpaca("q2", "other")]
    rows += [alpaca("q2", ["other", "c", "d"]), alpaca("q2", ["other", "e"], history=[["x", "y"]])]
    found, _, drops = read(tmp_path, rows)
    assert [(e.id[-2:], e.target, e.rejected) for e in found] == [
        ("01", "a", ["b", "c", "b"]),
        ("06", "other", ["b"]),
        ("07", "other", ["b"]),
        ("08", "other", []),
        ("09", "other", ["c", "d"]),
        ("10", "other", ["e"]),
    ]
    assert drops == [readers.USELESS_REJECTED] * 2


def test_response_rows_of_every_data_set(tmp_path: Path) -> None:
    messages = [*user("hello"), {"role": "assistant", "content": ""}]
    transcript = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant: "
    answers = [{"answer": "because", "model": "m", "rank": 1.0}, {"answer": "so", "rank": 2.0}]
    rows = [
        alpaca("q", ["good", "bad"], outputs=["1", "2 "]),
        alpaca("q", "no", target="good", outputs=[]),
        {"messages": messages, "prompt": "hello", "target": "good", "outputs": [" x", ""]},
        {"prompt": transcript, "answers": answers, "target": "because", "outputs": ["I see"]},
        {"prompt": transcript, "answers": answers, "outputs": "one text"},
        alpaca(
            *("q", "good"),
            **{"prompt": "q", "outputs": ["3"], "outputs_dist": 0.5, "outputs_dist_rank": [0]},
            **{"outputs_embeddings": [[0.1, float("nan")]], "target_embeddings": [[0.1, 0.2]]},
        ),
    ]
    found, given_answers, drops = read(tmp_path, rows)
    assert [e.target for e in found] == ["good", "good", "good", "because", "because", "good"]
    assert found[0].rejected == ["bad"]
    assert found[2].prompt == user("hello")
    assert found[3].prompt == found[4].prompt
    assert [turn["content"] for turn in found[3].prompt] == ["hi", "yes?", "why"]
    assert list(given_answers.values()) == [
        *(["1", "2 "], [], [" x", ""], ["I see"], ["one text"], ["3"])
    ]
    assert list(given_answers) == [example.id for example in found]
    assert not drops


def test_odd_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    asked = "\n\nHuman: hi\n\nAssistant: "
    rows = [
        *(alpaca("  ", "a"), alpaca("q", " \n"), alpaca("q", []), alpaca("q", "", outputs=["x"])),
        {"prompt": asked, "target": "a\n\nHuman: b\n\nAssistant: c"},
        {"prompt": asked + "\n\nAssistant: ", "target": "a"},
        {"prompt": asked + "already", "target": "a"},
        {"prompt": "hi", "target": "a"},
        {"prompt": "hi" + asked, "target": "a"},
        *({"messages": m, "target": "a"} for m in (user("q"), [], [*user("q"), *user("r")])),
        {"messages": [{"role": "assistant", "content": "a"}], "target": "a"},
        {"messages": [*user("q"), *[{"role": "assistant", "content": ""}] * 2], "target": "a"},
    ]
    found, answers, drops = read(tmp_path, rows)
    assert not found
    assert not answers
    assert Counter(drops) == {
        **{readers.EMPTY_PROMPT: 2, readers.EMPTY_TARGET: 3, hh_rlhf.NOT_HUMAN_FIRST: 2},
        **{self_contrast.BROKEN_TRANSCRIPT: 2, hh_rlhf.REPEATED_ROLE: 2},
        hh_rlhf.NOT_ASSISTANT_LAST: 3,
    }


def test_one_answer_that_was_broken_up(tmp_path: Path) -> None:
    outputs = [list("It says moo."), list("Yes"), ["A"], ["A", "No"], ["", ""]]
    rows = [alpaca(f"q{i}", "a", outputs=o) for i, o in enumerate(outputs)]
    found, answers, drops = read(tmp_path, rows)
    assert list(answers.values()) == [["It says moo."], [], ["A"], ["A", "No"], ["", ""]]
    assert len(found) == 5
    assert drops == [self_contrast.BROKEN_UP]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "line 2: no target.*format: jsonl"),
        ({"target": "a", "text": "b"}, "line 2: no prompt.*format: jsonl"),
        (alpaca("q", 3), "field 'output': expected text, got 3"),
        (alpaca("q", ["a", None]), "field 'output': expected a list of texts"),
        (alpaca("q", "a", outputs=["x", 1]), "field 'outputs': expected a list of texts"),
        (alpaca("q", "a", outputs={"x": 1}), "field 'outputs': expected a list of texts"),
        (alpaca("q", "a", target=["a"]), "field 'target': expected text"),
        (alpaca("q", "a", history=[["one"]]), r"expected \[user, assistant\]"),
        (alpaca("q", "a", history=[["one", None]]), "field 'history': expected a list of texts"),
        (alpaca("q", "a", history="x"), "field 'history': expected a list"),
        (alpaca("q", "a", system=3), "field 'system': expected text"),
        (alpaca("q", "a", id=1.5), "field 'id': expected text or an integer"),
        (alpaca("q", "a", id="first"), "id 'first' was already used in .*line 1"),
        ({"messages": [{"role": "gpt", "content": ""}], "target": "a"}, "one of system, user"),
        ({"messages": "x", "target": "a"}, "expected a list of messages"),
        ({"prompt": 3, "target": "a"}, "field 'prompt': expected text"),
        ({"prompt": "x", "answers": [{"text": "a"}]}, "field 'answer' is missing"),
    ],
)
def test_a_row_that_is_none_of_the_project(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        read(tmp_path, [alpaca("q", "a", id="first"), row])


def test_answers_go_to_the_training_prompts_in_their_order(tmp_path: Path) -> None:
    rows = [
        alpaca(f"q{i % 8}", f"a{i}", id=f"r{i}", outputs=[f"{i}", "\u2028 é \U0001f40e"] * (i % 3))
        for i in range(20)
    ]
    path = str(write_lines(tmp_path / "train.jsonl", rows))
    made = run(tmp_path, config(path, num_train=9))
    train = read_examples(made.path / "train.jsonl")
    given_answers = {row["id"]: row["outputs"] for row in rows}
    found = lines(made.path / "responses.jsonl")
    assert [row["id"] for row in found] == [example.id for example in train]
    assert all(row == {"id": row["id"], "responses": given_answers[row["id"]]} for row in found)
    assert made.counts[data.WITHOUT_ANSWERS] == sum(not row["responses"] for row in found) > 0
    assert made.notes["answers"] == sum(len(row["responses"]) for row in found)
    assert sorted(path.name for path in made.path.iterdir()) == [
        *("responses.jsonl", "test.jsonl", "train.jsonl")
    ]
    other = run(tmp_path, config(path, engine="transformers", num_train=9), "other")
    assert not (other.path / "responses.jsonl").exists()
    assert read_examples(other.path / "train.jsonl") == train


def test_answers_are_wanted_but_there_are_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [alpaca(f"q{i}", "a", outputs=[]) for i in range(9)])
    with pytest.raises(DataError, match=r"sample\.engine: data .* hold none.*outputs"):
        run(tmp_path, config(str(path)))


def test_the_recipes_know_of_the_answers(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "x.jsonl", [alpaca("q", "a")]))
    taken, sampled = (config(path, engine=engine) for engine in ("data", "transformers"))
    assert inputs(taken, Task("sample"))["data"].patterns == ("train.jsonl", "responses.jsonl")
    assert inputs(sampled, Task("sample"))["data"].patterns == ("train.jsonl",)
    assert inputs(taken, Task("sft"))["data"].patterns == ("train.jsonl",)
    digests = {recipe(c, Task("data"), {}).digest for c in (taken, sampled)}
    assert len(digests) == 2, "else a finished stage without answers would stand"


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        write_lines(folder / name, [alpaca(f"{name}{i}", "x", outputs=["y"]) for i in range(4)])
    with gzip.open(folder / "c.jsonl.gz", "wt") as handle:
        handle.write(json.dumps(alpaca("q", "x", outputs=["z"])) + "\n")
    for name in ("a.pkl", "notes.txt", ".a.jsonl.tmp", ".hidden.jsonl"):
        (folder / name).write_bytes(b"\x80")
    (folder / "inner.jsonl").mkdir()
    chosen = config(str(folder))
    names = ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [path.name for path in data_files(chosen.data)] == names
    before = recipe(chosen, Task("data"), {})
    assert list(before.sources) == [f"data.path {folder / name}" for name in names]
    assert run(tmp_path, chosen).notes["rows"]["usable"] == 9
    write_lines(folder / "d.jsonl", [alpaca("new", "x")])
    assert recipe(chosen, Task("data"), {}).digest != before.digest


def test_folders_without_rows(tmp_path: Path) -> None:
    settings = DataConfig(format="self-contrast", path=str(tmp_path))
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        data_files(settings)
    (tmp_path / "train.pkl").write_bytes(b"\x80")
    with pytest.raises(DataError, match=r"train\.pkl: reading a pickle runs"):
        data_files(settings)
    with pytest.raises(DataError, match="No such file"):
        recipe(config(str(tmp_path / "none.jsonl")), Task("data"), {})


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "npy"])
def test_pickles_are_refused_with_a_command_that_works(tmp_path: Path, suffix: str) -> None:
    import pickle

    import numpy as np

    rows = [alpaca("q'ü", "a", outputs=["x y"], outputs_dist=np.float32(0.5))]
    rows[0]["outputs_embeddings"] = np.ones((1, 2))
    path = tmp_path / f"it's here.{suffix}"
    if suffix == "npy":
        np.save(path, np.array(rows, dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(rows))
    with pytest.raises(DataError, match="runs whatever code") as error:
        run(tmp_path, config([str(path)]))
    command = str(error.value).splitlines()[-1].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True)
    found = read(tmp_path, lines(path.with_suffix(".jsonl")))
    assert found[0] == [Example("train-000001", user("q'ü"), "a")]
    assert found[1] == {"train-000001": ["x y"]}


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4)))
def test_answers_on_disk_are_the_answers(tmp_path_factory: Any, given_answers: Any) -> None:
    with self_contrast.AnswerFile(tmp_path_factory.getbasetemp()) as answers:
        for number, texts in enumerate(given_answers):
            answers.add(str(number), texts)
            assert answers.of("0") == given_answers[0]
        order = list(enumerate(given_answers))
        random.Random(0).shuffle(order)
        assert all(answers.of(str(number)) == texts for number, texts in order)
        assert answers.of("another") == []


@needs_shared
def test_real_answers_as_the_original_would_have_written_them(tmp_path: Path) -> None:
    """An independent writer: what inference.py leaves behind for the data set format hh-rlhf."""
    source = shared_rows("self_instruct_user_responses.jsonl.gz")
    path = tmp_path / "train.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        for row in source:
            record = {"history": [], "instruction": row["prompt"], "output": [row["target"], "-"]}
            record["target"] = row["target"]
            record["outputs"] = [text.lstrip(" ") for text in row["outputs"]]
            print(json.dumps(record), file=handle)
    made = run(tmp_path, config(str(path), num_test=20))
    train = read_examples(made.path / "train.jsonl")
    assert len(train) + 20 + made.counts["prompt is already in the test split"] == len(source)
    by_prompt = {(row["prompt"], row["target"]): row["outputs"] for row in source}
    for example, row in zip(train, lines(made.path / "responses.jsonl"), strict=True):
        wanted = by_prompt[example.prompt[0]["content"], example.target]
        assert row["responses"] == [text.lstrip(" ") for text in wanted]
        assert example.rejected == ["-"]


@needs_shared
def test_real_transcripts_in_every_shape(tmp_path: Path) -> None:
    """Multi-turn dialogues in the three prompt formats give one and the same examples."""
    shapes: dict[str, list[Any]] = {"hh": [], "nectar": [], "ultrachat": []}
    wanted = []
    for row in shared_rows("hh_helpful-base.jsonl.gz")[:300]:
        turns = [turn["value"].strip() for turn in row["conversations"]]
        if not row["clean"] or not len(turns) % 2:
            continue
        target, outputs = row["chosen"].strip(), [row["rejected"].strip()]
        wanted.append((turns, target))
        common = {"target": target, "outputs": outputs}
        history = [list(pair) for pair in zip(turns[:-1:2], turns[1::2], strict=True)]
        shapes["hh"].append({"history": history, "instruction": turns[-1]} | common)
        names = ("Human", "Assistant")
        text = "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate([*turns, ""]))
        shapes["nectar"].append({"prompt": text, "answers": [{"answer": target}]} | common)
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate([*turns, ""])]
        shapes["ultrachat"].append({"messages": messages, "prompt": turns[0]} | common)
    hh, nectar, ultrachat = (read(tmp_path, rows) for rows in shapes.values())
    assert len(wanted) > 200
    assert hh == ultrachat
    assert [([t["content"] for t in e.prompt], e.target) for e in hh[0]] == wanted
    assert nectar[2] == [hh_rlhf.STRAY_MARKER], "the only shape in which a text can end a turn"
    ids = {example.id for example in nectar[0]}
    assert nectar[0] == [example for example in hh[0] if example.id in ids]
    assert nectar[1] == {id: texts for id, texts in hh[1].items() if id in ids}
    assert len(ids) == len(wanted) - 1
