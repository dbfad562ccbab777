"""`data.format: auto`: rows in the usual shapes, and what of them is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import needs_shared, shared_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini.data import dialogues, hh_rlhf, readers, shapes
from scmini.data.hh_rlhf import read_hh_rlhf
from scmini.data.nectar import read_nectar
from scmini.data.readers import Row
from scmini.data.shapes import read_shapes
from scmini.data.ultrachat import read_ultrachat
from scmini.errors import RecordError
from scmini.records import Example, Message
from scmini.sections import ColumnsConfig

FILE = Path("rows.jsonl")


def read(rows: list[Any], **columns: str) -> tuple[list[Example], list[str]]:
    """Examples and reasons."""
    drops: list[str] = []
    given_rows = [Row(FILE, number, row) for number, row in enumerate(rows, start=1)]
    found = read_shapes(
        given_rows, ColumnsConfig(**columns), lambda reason, _: drops.append(reason), set()
    )
    return list(found), drops


def one(row: dict[str, Any], **columns: str) -> tuple[list[str], str, list[str]]:
    """The only example of a row: texts of its prompt with initials of roles, target, rejected."""
    (example,), drops = read([row], **columns)
    assert not drops
    prompt = [f"{turn['role'][0]}:{turn['content']}" for turn in example.prompt]
    return prompt, example.target, example.rejected


def turns(*texts: str, first: str = "user") -> list[Message]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def answer(text: str) -> list[Message]:
    return turns(text, first="assistant")


SYSTEM = {"role": "system", "content": "be"}
DIALOGUE = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "q", "target": "a", "rejected": ["b", "c"]}, (["u:q"], "a", ["b", "c"])),
        ({"prompt": "q", "completion": " a"}, (["u:q"], "a", [])),
        ({"prompt": "q", "completion": "a", "label": True}, (["u:q"], "a", [])),
        ({"prompt": turns("q"), "completion": answer("a")}, (["u:q"], "a", [])),
        (
            {"prompt": [SYSTEM, *turns("q")], "completion": turns("a", "r", "b", first="a")},
            (["s:be", "u:q", "a:a", "u:r"], "b", []),
        ),
        ({"prompt": "q", "chosen": " a", "rejected": " b"}, (["u:q"], "a", ["b"])),
        ({"prompt": "q", "chosen": "a", "rejected": None}, (["u:q"], "a", [])),
        (
            {"prompt": turns("q"), "chosen": answer("a"), "rejected": answer("b")},
            (["u:q"], "a", ["b"]),
        ),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b")}, (["u:q"], "a", ["b"])),
        (  # as zephyr's binarised UltraFeedback has it
            {
                **{"prompt": "q", "messages": turns("q", "a"), "score_chosen": 1.0},
                **{"chosen": turns("q", "a"), "rejected": turns("q", "b")},
            },
            (["u:q"], "a", ["b"]),
        ),
        (
            {"chosen": "Is it blue? Black it is.", "rejected": "Is it blue? Blue."},
            (["u:Is it blue?"], "Black it is.", ["Blue."]),
        ),
        ({"chosen": "It is. Yes", "rejected": "It is. Yes or"}, (["u:It is."], "Yes", ["Yes or"])),
        (
            {"chosen": DIALOGUE + "b", "rejected": DIALOGUE + "c"},
            (["u:q", "a:a", "u:r"], "b", ["c"]),
        ),
        ({"prompt": DIALOGUE, "chosen": "b", "rejected": "c"}, (["u:q", "a:a", "u:r"], "b", ["c"])),
        ({"prompt": "\n\nHuman: q", "completion": "b"}, (["u:q"], "b", [])),
        (
            {"messages": [SYSTEM, *turns("q", "a", "r", "b")]},
            (["s:be", "u:q", "a:a", "u:r"], "b", []),
        ),
        ({"messages": [SYSTEM | {"content": " "}, *turns("q", "a")]}, (["u:q"], "a", [])),
        ({"messages": turns("q", "a"), "prompt": "q", "prompt_id": "1"}, (["u:q"], "a", [])),
        ({"conversations": sharegpt("q", "a")}, (["u:q"], "a", [])),
        ({"conversations": sharegpt("q", "a"), "system": "be"}, (["s:be", "u:q"], "a", [])),
        (  # LLaMA-Factory's ranked ShareGPT
            {
                "conversations": sharegpt("q"),
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            (["u:q"], "a", ["b"]),
        ),
        (
            {
                **{"instruction": "add", "input": "1 1", "output": "2", "system": "be"},
                **{"history": [["q", "a"]], "prompt": "### add 1 1: 2", "messages": None},
            },
            (["s:be", "u:q", "a:a", "u:add\n1 1"], "2", []),
        ),
        ({"instruction": "q", "input": "", "output": ["a", "b", "c"]}, (["u:q"], "a", ["b", "c"])),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, (["u:q"], "a", ["b"])),
        (
            {"prompt": turns("q"), "chosen": answer("a"), "rejected": [answer("b"), answer("c")]},
            (["u:q"], "a", ["b", "c"]),
        ),
    ],
)
def test_shapes(row: dict[str, Any], found: Any) -> None:
    assert one(row) == found
    assert one(row | {"id": 7, "unknown": {"x": [None]}, "tools": None}) == found


def test_columns_push_others_aside() -> None:
    row = {"question": "q", "answer": "a", "bad": ["b"], "prompt": "not this", "output": "nor this"}
    columns = {"prompt": "question", "target": "answer", "rejected": "bad"}
    assert one(row | {"messages": turns("x", "y")}, **columns) == (["u:q"], "a", ["b"])
    dolly = {"instruction": "q", "context": "c", "response": "a"}
    columns = {"prompt": "instruction", "input": "context", "target": "response"}
    assert one(dolly, **columns) == (["u:q\nc"], "a", [])
    assert one({"dialog": turns("q", "a"), "prompt": "x"}, messages="dialog") == (["u:q"], "a", [])
    assert one({"target": "q", "prompt": "a"}, prompt="target", target="prompt")[:2] == (
        ["u:q"],
        "a",
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "completion": "a"}, readers.EMPTY_PROMPT),
        ({"prompt": [], "completion": "a"}, readers.EMPTY_PROMPT),
        ({"messages": []}, readers.EMPTY_PROMPT),
        ({"prompt": "q", "completion": " "}, readers.EMPTY_TARGET),
        ({"prompt": "q", "completion": []}, readers.EMPTY_TARGET),
        ({"messages": turns("q", "")}, readers.EMPTY_TARGET),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, hh_rlhf.EMPTY_CHOSEN),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, hh_rlhf.EMPTY_REJECTED),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, hh_rlhf.SAME_ANSWERS),
        ({"chosen": turns("q", "a"), "rejected": turns("r", "b")}, hh_rlhf.PROMPTS_DIFFER),
        ({"chosen": turns("q", "a"), "rejected": "b"}, hh_rlhf.PROMPTS_DIFFER),
        ({"chosen": "one thing", "rejected": "another"}, readers.EMPTY_PROMPT),
        ({"prompt": "q", "completion": "a\nHuman: b"}, hh_rlhf.STRAY_MARKER),
        ({"messages": turns("q", "Assistant: a", "r", "b")}, hh_rlhf.STRAY_MARKER),
        ({"messages": [*turns("q", "a"), *answer("b")]}, hh_rlhf.REPEATED_ROLE),
        ({"messages": [*turns("q", "a"), SYSTEM, *turns("q", "a")]}, dialogues.LATE_SYSTEM),
        ({"messages": turns("q", "a", "r")}, hh_rlhf.NOT_ASSISTANT_LAST),
        ({"messages": turns("q", "", "r", "b")}, hh_rlhf.EMPTY_TURN),
        ({"conversations": sharegpt("q", "a")[::-1]}, hh_rlhf.NOT_HUMAN_FIRST),
        ({"messages": [{"role": "tool", "content": "x"}]}, dialogues.UNKNOWN_ROLE),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, dialogues.NOT_TEXT),
        ({"messages": None, "prompt": "q"}, shapes.UNKNOWN_SHAPE),
        ({"prompt": 3, "completion": "a"}, dialogues.NOT_TEXT),
        ({"prompt": "q", "completion": "a", "label": False}, shapes.BAD_COMPLETION),
        ({"prompt": "q", "completion": ["a", "b"]}, dialogues.NOT_TEXT),
        ({"prompt": "q", "chosen": [[]], "rejected": "b"}, dialogues.NOT_TEXT),
        ({"instruction": "q", "output": "a", "history": ["ab"]}, dialogues.NOT_TEXT),
        ({"instruction": "q", "output": "a", "input": float("nan")}, dialogues.NOT_TEXT),
        ({"prompt": DIALOGUE + "begun", "completion": "a"}, hh_rlhf.BEGUN_ANSWER),
    ],
)
def test_odd_rows_are_dropped_with_a_reason(row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "q", "completion": "a"}
    found, drops = read([good, row, good])
    assert drops == [reason]
    assert [example.id for example in found] == ["rows-000001", "rows-000003"]


def test_odd_rejected_answers_go_one_by_one() -> None:
    row = {"prompt": "q", "target": "a", "rejected": ["a", "", "b", "Human: c"]}
    found, drops = read([row])
    assert found[0].rejected == ["b"]
    assert sorted(drops) == sorted([shapes.STRAY_REJECTED, *[readers.USELESS_REJECTED] * 2])


def test_ids() -> None:
    row = {"prompt": "q", "target": "a"}
    ids: list[Any] = ["x", 5, "x", None, True, "", 1.5, [1], 10**5000]
    found, _ = read([row | {"id": id} for id in ids])
    assert [e.id for e in found] == ["x", "5", *(f"rows-{n:06d}" for n in range(3, 10))]
    assert [e.id for e in read([row | {"key": "k"}], id="key")[0]] == ["k"]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"text": "a", "n": 1},
            {},
            r'line 1: its columns are "text", "n", which is no known shape',
        ),
        ({}, {}, "line 1: it has no columns"),
        ({"prompt": "q"}, {}, r"data\.columns"),
        ({"a": "q"}, {"prompt": "b"}, r"data\.columns\.prompt: there is no column 'b'; .*\"a\""),
    ],
)
def test_a_file_of_another_shape(row: Any, columns: dict[str, str], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read([row, {"prompt": "q", "target": "a"}], **columns)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["\n\nHuman: q\n\nAssistant: ", "user", "assistant", " a", "gpt", "human"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "answer", "rank", "x"]),
        inner, max_size=3,
    ),
    max_leaves=9,
)  # fmt: skip
COLUMNS = (
    *("prompt", "chosen", "rejected", "messages", "conversations", "instruction", "output", "id"),
    *("input", "history", "system", "completion", "label", "target", "answers", "odd"),
)


GOOD = {
    **{"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a", "rank": 1}]},
    **{"chosen": DIALOGUE + "b", "rejected": DIALOGUE + "c", "messages": turns("q", "a")},
}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=6), max_size=4),
    st.sampled_from(["auto", "hh-rlhf", "nectar", "ultrachat"]),
)
def test_random_rows_give_examples_or_reasons(rows: list[Any], format: str) -> None:
    """Each row is an example, or dropped for one reason; or the error names file and line."""
    drops: list[str] = []
    rows = [GOOD, *(row if format == "auto" else GOOD | row for row in rows)]
    given_rows = [Row(FILE, number, row) for number, row in enumerate(rows, start=1)]

    def drop(reason: str, _what: Any) -> None:
        if reason not in (readers.USELESS_REJECTED, dialogues.STRAY_REJECTED):
            drops.append(reason)

    reader: dict[str, Any] = {
        "auto": lambda: read_shapes(given_rows, ColumnsConfig(), drop, set()),
        "hh-rlhf": lambda: read_hh_rlhf(given_rows, drop),
        "nectar": lambda: read_nectar(given_rows, drop),
        "ultrachat": lambda: read_ultrachat(given_rows, drop),
    }
    found, errors = [], []
    try:
        found += reader[format]()
    except RecordError as error:
        errors.append(error)
    if errors:
        assert format == "hh-rlhf"
        assert "field '" in errors[0].problem
        assert errors[0].line > 1
        return
    assert len(found) + len(drops) == len(rows)
    assert found[0].prompt[0]["content"] == "q"
    for example in found:
        assert example.prompt[-1]["role"] == "user"
        assert example.prompt[-1]["content"].strip()
        assert example.target.strip()
        assert example.target.strip() not in [text.strip() for text in example.rejected]
        json.dumps([example.prompt, example.rejected, example.id])


SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text and ":" not in text
)


@settings(max_examples=100, deadline=None)
@given(st.lists(SAID, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0), SAID)
def test_one_dialogue_in_every_shape(texts: list[str], other: str) -> None:
    """Rendered and parsed again, by readers that share little."""
    *before, target = texts
    if other == target:
        return
    names = ("Human", "Assistant")
    said = "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(before))
    open_end = f"{said}\n\nAssistant: "
    history = [list(pair) for pair in zip(before[:-1:2], before[1::2], strict=True)]
    rows = [
        {"messages": turns(*texts), "rejected": None},
        {"conversations": sharegpt(*texts)},
        {"prompt": turns(*before), "completion": answer(target)},
        {"instruction": before[-1], "history": history, "output": target},
        {"chosen": open_end + target, "rejected": open_end + other},
        {"prompt": open_end, "chosen": target, "rejected": other},
        {"chosen": turns(*texts), "rejected": turns(*before, other)},
        {"prompt": turns(*before), "chosen": target, "rejected": other},
    ]
    found, drops = read(rows)
    assert not drops
    assert [(e.prompt, e.target) for e in found] == [(turns(*before), target)] * len(rows)
    assert [e.rejected for e in found] == [[]] * 4 + [[other]] * 4


@needs_shared
def test_real_data() -> None:
    """GSM8K by named columns; seed tasks as Alpaca rows; MT-Bench's two turns as messages."""
    rows: list[Any] = shared_rows("gsm8k_train_2000.jsonl.gz")
    found, drops = read(rows, prompt="question", target="answer")
    assert [(e.id, e.prompt[0]["content"], e.target) for e in found] == [
        (row["id"], row["question"], row["answer"]) for row in rows
    ]
    assert not drops
    tasks = shared_rows("self_instruct_seed_tasks.jsonl.gz")
    rows = [
        {"instruction": task["instruction"], **case} for task in tasks for case in task["instances"]
    ]
    found, drops = read(rows)
    assert len(found) + len(drops) == len(rows) > 170
    assert set(drops) <= {hh_rlhf.STRAY_MARKER}
    bench = shared_rows("mt_bench_responses.jsonl.gz")
    rows = [
        {"messages": turns(row["prompt"], row["target"], row["turn2"], row["target_turn2"])}
        for row in bench
    ]
    found, drops = read(rows)
    assert len(found) + len(drops) == len(rows) == 64
    assert set(drops) <= {hh_rlhf.STRAY_MARKER}
    assert len(drops) <= 2
    users = shared_rows("self_instruct_user_responses.jsonl.gz")
    found, _ = read([row | {"rejected": row["outputs"]} for row in users])
    for example, row in zip(found, users, strict=True):
        wanted = [t for t in row["outputs"] if t.strip() and t.strip() != row["target"].strip()]
        assert [text for text in wanted if text.removeprefix(" ") not in example.rejected] == [
            text for text in wanted if dialogues.has_marker(text)
        ]


@needs_shared
@pytest.mark.parametrize("name", ["harmless", "helpful"])
def test_transcripts_of_hh_rlhf_as_preferences(name: str) -> None:
    """The parsed shared file by this reader is the raw file by that of `hh-rlhf`."""
    raw = [
        Row(FILE, n, row) for n, row in enumerate(shared_rows(f"hh_{name}-base_raw.jsonl.gz"), 1)
    ]
    kept = {e.id: e for e in read_hh_rlhf(raw, lambda reason, _: None)}
    parsed, _ = read([row | {"id": None} for row in shared_rows(f"hh_{name}-base.jsonl.gz")])
    implicit, _ = read([row.values for row in raw])
    assert len(kept) > 1700
    for found in (parsed, implicit):
        by_id = {e.id: e for e in found}
        assert set(kept) - set(by_id) == set()
        for id, example in kept.items():
            assert [t["content"].strip() for t in by_id[id].prompt] == [
                t["content"] for t in example.prompt
            ]
            assert (by_id[id].target.strip(), by_id[id].rejected[0].strip()) == (
                *(example.target, example.rejected[0]),
            )
