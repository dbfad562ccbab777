"""Rows of Nectar and of UltraChat as published."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import needs_shared, shared_rows

from scmini.data import dialogues, hh_rlhf, nectar, readers
from scmini.data.nectar import read_nectar
from scmini.data.readers import Row
from scmini.data.ultrachat import read_ultrachat
from scmini.errors import RecordError
from scmini.records import Example

FILE = Path("Nectar/train")
ASKED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: "


def read(rows: list[Any], reader: Any = read_nectar) -> tuple[list[Example], list[str]]:
    drops: list[str] = []
    given = [Row(FILE, number, row) for number, row in enumerate(rows, start=1)]
    return list(reader(given, lambda reason, _: drops.append(reason))), drops


def ranked(*answers: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"answer": text, "model": "m", "rank": rank} for text, rank in answers]


def test_the_best_ranked_is_the_target_and_the_others_follow_in_order() -> None:
    answers = ranked(("c", 3.0), (" a \n", 1.0), ("d", 7), ("b", 2.0), ("also first", 1.0))
    (example,), drops = read([{"prompt": ASKED, "answers": answers, "turns": 2}])
    assert [turn["content"] for turn in example.prompt] == ["hi", "hello", "why?"]
    assert [turn["role"] for turn in example.prompt] == ["user", "assistant", "user"]
    assert (example.target, example.rejected) == ("a", ["b", "c", "d"])
    assert example.id == "train-000001"
    assert not drops


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi"}, hh_rlhf.NOT_HUMAN_FIRST),
        ({"prompt": "\n\nHuman: \n\nAssistant: "}, hh_rlhf.EMPTY_TURN),
        ({"prompt": ASKED + "because"}, hh_rlhf.BEGUN_ANSWER),
        ({"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant: "}, hh_rlhf.REPEATED_ROLE),
        ({"prompt": None}, dialogues.NOT_TEXT),
        ({"answers": None}, dialogues.NOT_TEXT),
        ({"answers": []}, nectar.UNRANKED),
        ({"answers": ranked(("a", None))}, nectar.UNRANKED),
        ({"answers": ranked(("a", 1), ("b", float("nan")))}, nectar.UNRANKED),
        ({"answers": ranked(("a", True))}, nectar.UNRANKED),
        ({"answers": ranked((3, 1))}, nectar.UNRANKED),
        ({"answers": ["a"]}, nectar.UNRANKED),
        ({"answers": ranked((" ", 1), ("b", 2))}, readers.EMPTY_TARGET),
        ({"answers": ranked(("a\n\nHuman: more", 1))}, hh_rlhf.STRAY_MARKER),
    ],
)
def test_odd_rows_of_nectar(row: dict[str, Any], reason: str) -> None:
    good = {"prompt": ASKED, "answers": ranked(("a", 1), ("b", 10**400))}
    found, drops = read([good | row, good])
    assert drops == [reason]
    assert [example.rejected for example in found] == [["b"]]


def test_odd_answers_of_nectar() -> None:
    answers = ranked(("a", 1), ("", 2), (" a", 3), ("b\n\nHuman: c", 4), ("d", 5))
    (example,), drops = read([{"prompt": ASKED, "answers": answers}])
    assert example.rejected == ["d"]
    assert sorted(drops) == sorted([dialogues.STRAY_REJECTED, *[readers.USELESS_REJECTED] * 2])


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_nectar, {"prompt": ASKED}, r"train, line 1: field 'answers' is missing.*auto"),
        (read_nectar, {"messages": []}, "field 'prompt' is missing"),
        (read_ultrachat, {"prompt": "q"}, r"line 1: field 'messages' is missing.*auto"),
    ],
)
def test_another_data_set(reader: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read([row], reader)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_ultrachat() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "prompt_id": "x", "messages": chat("q", "a", "r", "b")},
        {"prompt": "q", "prompt_id": "x", "messages": chat("q", "a")},
        {"messages": chat("q", "a", "r")},
        {"messages": chat("q", "")},
        {"messages": chat("q", "a\n\nHuman: b")},
        {"messages": None},
    ]
    found, drops = read(rows, read_ultrachat)
    assert [(e.prompt, e.target) for e in found] == [
        (chat("q", "a", "r"), "b"),
        (chat("q"), "a"),
    ]
    assert drops == [
        *(hh_rlhf.NOT_ASSISTANT_LAST, readers.EMPTY_TARGET, hh_rlhf.STRAY_MARKER),
        dialogues.NOT_TEXT,
    ]


@needs_shared
def test_rows_made_of_real_answers() -> None:
    """Nectar's and UltraChat's rows as MT-Bench's prompts and ranked answers would give them."""
    source = shared_rows("mt_bench_responses.jsonl.gz")
    rows, chats = [], []
    for row in source:
        asked = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
        answers = [(row["target"], 1.0), *((t, 2.0 + i) for i, t in enumerate(row["outputs"]))]
        rows.append({"prompt": asked, "answers": ranked(*answers[::-1])})
        turns = chat(row["prompt"], row["target"], row["turn2"], row["target_turn2"])
        chats.append({"prompt": row["prompt"], "messages": turns})
    found, drops = read(rows)
    odd = [reason for reason in drops if reason in hh_rlhf.REASONS]
    assert len(found) + len(odd) == len(source)
    assert len(odd) <= 2
    by_id = {f"train-{n:06d}": row for n, row in enumerate(source, start=1)}
    for example in found:
        row = by_id[example.id]
        assert example.prompt == [{"role": "user", "content": row["prompt"].strip()}]
        assert example.target == row["target"].strip()
        wanted = [text.strip() for text in row["outputs"] if not dialogues.has_marker(text)]
        assert example.rejected == [t for t in wanted if t not in ("", example.target)]
    found, drops = read(chats, read_ultrachat)
    assert len(found) + len(drops) == len(source)
    assert all(len(example.prompt) == 3 for example in found)
