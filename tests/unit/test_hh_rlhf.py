"""Raw HH-RLHF transcripts."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import SHARED, needs_shared, shared_rows, write_lines

from scmini.data import hh_rlhf
from scmini.data.hh_rlhf import OddTranscript, parse_row, parse_transcript, read_hh_rlhf
from scmini.data.readers import file_rows
from scmini.errors import DataError, RecordError


def transcript(*turns: str) -> str:
    return "".join(
        f"\n\n{'Assistant' if number % 2 else 'Human'}: {text}" for number, text in enumerate(turns)
    )


def test_a_clean_row() -> None:
    example = parse_row(
        "x",
        transcript("hi", " hello ", "a\n\nb?", "yes"),
        transcript("hi", "hello", "a\n\nb?", "no"),
    )
    assert example.prompt == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a\n\nb?"},
    ]
    assert (example.target, example.rejected) == ("yes", ["no"])


GOOD = transcript("hi", "yes")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("hi", GOOD, hh_rlhf.NOT_HUMAN_FIRST),
        ("\n\nAssistant: hi", GOOD, hh_rlhf.NOT_HUMAN_FIRST),
        ("well" + GOOD, GOOD, hh_rlhf.NOT_HUMAN_FIRST),
        (GOOD + "\n\nHuman: and?", GOOD, hh_rlhf.NOT_ASSISTANT_LAST),
        (GOOD + "\n\nAssistant: more", GOOD, hh_rlhf.REPEATED_ROLE),
        ("\n\nHuman: hi" + GOOD, GOOD, hh_rlhf.REPEATED_ROLE),
        (transcript("hi", "", "so", "yes"), GOOD, hh_rlhf.EMPTY_TURN),
        (transcript("", "yes"), GOOD, hh_rlhf.EMPTY_TURN),
        (transcript("hi", ""), GOOD, hh_rlhf.EMPTY_CHOSEN),
        (GOOD, transcript("hi", " \n"), hh_rlhf.EMPTY_REJECTED),
        (transcript("hi", "yes. Human: no"), GOOD, hh_rlhf.STRAY_MARKER),
        (GOOD, transcript("hi", "Assistant: no"), hh_rlhf.STRAY_MARKER),
        (GOOD, transcript("ho", "no"), hh_rlhf.PROMPTS_DIFFER),
        (GOOD, transcript("hi", "yes "), hh_rlhf.SAME_ANSWERS),
    ],
)
def test_odd_rows(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(OddTranscript) as caught:
        parse_row("x", chosen, rejected)
    assert str(caught.value) == reason
    assert reason in hh_rlhf.REASONS


def test_a_person_may_write_markers() -> None:
    assert (
        parse_transcript(transcript("what does Human: mean?", "you"))[0]["content"].count(":") == 1
    )


def test_files(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            {"chosen": GOOD, "rejected": transcript("hi", "no\x85\u2028")},
            {"chosen": GOOD, "rejected": GOOD},
        ],
    )
    drops: Counter[str] = Counter()
    found = list(read_hh_rlhf(file_rows([path]), lambda reason, _: drops.update([reason])))
    assert [e.id for e in found] == ["a-000001"]
    assert drops == {hh_rlhf.SAME_ANSWERS: 1}
    broken = write_lines(tmp_path / "b.jsonl", [{"chosen": GOOD, "rejected": 3}])
    with pytest.raises(RecordError, match=r"b.jsonl, line 1: field 'rejected'"):
        list(read_hh_rlhf(file_rows([broken]), print))


def test_damaged_files_name_file_and_line(tmp_path: Path) -> None:
    rows = [
        {"chosen": transcript(str(i), "a" * i), "rejected": transcript(str(i), "b")}
        for i in range(1, 800)
    ]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"torn.jsonl.gz: the compressed data is damaged after line [1-9]"
    ):
        list(read_hh_rlhf(file_rows([torn]), print))
    for content, message in [
        (b"\xff\xfe{}\n", "line 1: not UTF-8"),
        (b"\n{]\n", "line 2: not JSON"),
        (b"[]\n", "line 1: expected an object"),
        (b'{"chosen": "\\ud800", "rejected": ""}\n', "line 1: an escape"),
    ]:
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_hh_rlhf(file_rows([path]), print))
    with pytest.raises(DataError, match="No such file"):
        list(read_hh_rlhf(file_rows([tmp_path / "none.jsonl"]), print))


@needs_shared
@pytest.mark.parametrize("name", ["harmless", "helpful"])
def test_every_row_of_the_real_files_is_imported_or_dropped_for_a_reason(name: str) -> None:
    """`clean` of the shared files agrees but for answers with a glued-in transcript: dropped here.

    These are flagged `inline_marker_assistant` there, and one, where the marker stands behind a
    quotation mark, is not flagged at all.
    """
    drops: list[str] = []
    raw = SHARED / "data" / f"hh_{name}-base_raw.jsonl.gz"
    found = {
        e.id: e for e in read_hh_rlhf(file_rows([raw]), lambda reason, _: drops.append(reason))
    }
    rows = shared_rows(f"hh_{name}-base.jsonl.gz")
    assert len(found) + len(drops) == len(rows)
    assert set(drops) <= set(hh_rlhf.REASONS)
    unlike = []
    for number, row in enumerate(rows, start=1):
        example = found.get(f"hh_{name}-base_raw-{number:06d}")
        if example is None:
            unlike += [row["odd"]] if row["clean"] else []
            continue
        assert row["clean"]
        roles = {"human": "user", "gpt": "assistant"}
        assert example.prompt == [
            {"role": roles[m["from"]], "content": m["value"].strip()} for m in row["conversations"]
        ]
        assert example.target == row["chosen"].strip()
        assert example.rejected == [row["rejected"].strip()]
    marked = [odd for odd in unlike if any("inline_marker" in flag for flag in odd)]
    assert len(unlike) == {"harmless": 36, "helpful": 24}[name]
    assert len(unlike) - len(marked) == {"harmless": 0, "helpful": 1}[name]
