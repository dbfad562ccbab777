"""The example that is shown before a stage works, decoded from the ids that it uses."""

import io
import json
import os
from pathlib import Path

import pytest
from chat_helpers import byte_tokenizer, llama_tokenizer, turns, with_template
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scmini import chat, console
from scmini.display import Display
from scmini.training import example
from scmini.training.batches import Group
from scmini.training.example import marked, show_example, show_group

ZEPHYR = with_template(llama_tokenizer(), "zephyr")


@pytest.fixture(autouse=True)
def _nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "_shown", set())


def test_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, learned = chat.conversation_ids(ZEPHYR, turns("Who </s>?"), "It is I.\nYes.", "last")
    group = Group.of_text("e1", ids, learned)
    show_group(tmp_path, ZEPHYR, group)
    assert (tmp_path / "example.txt").read_text(encoding="utf-8") == (
        f"example e1 (tokens: prompt {len(ids) - sum(learned)}, learned {sum(learned)})\n"
        "--- prompt\n⟦<s>⟧<|system|>\n⟦</s>⟧\n<|user|>\nWho </s>?⟦</s>⟧\n<|assistant|>\n\n"
        "--- learned\nIt is I.\nYes.⟦</s>⟧\n"
    )
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("example e1 (tokens: ")
    assert shown[1] == "  prompt    ⟦<s>⟧<|system|>"
    assert shown[5] == "            <|assistant|>⏎"
    assert shown[-2:] == ["  learned   It is I.", "            Yes.⟦</s>⟧"]
    show_group(tmp_path, ZEPHYR, group)
    assert capsys.readouterr().err == "", "once is enough"


def test_a_space_before_an_answer_is_seen() -> None:
    openchat = with_template(llama_tokenizer(), "openchat")
    assert marked(openchat, chat.response_ids(openchat, "yes")) == " yes⟦<|end_of_turn|>⟧"
    assert marked(ZEPHYR, chat.response_ids(ZEPHYR, "yes")) == "yes⟦</s>⟧"


def test_pairs_show_one_rejected_response(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = [chat.response_ids(ZEPHYR, text) for text in ("good", "bad", "worse")]
    prompt = chat.prompt_ids(ZEPHYR, turns("u"))
    show_group(tmp_path, ZEPHYR, Group.of_responses("p", prompt, responses))
    text = (tmp_path / "example.txt").read_text(encoding="utf-8")
    assert text.endswith("--- chosen\ngood⟦</s>⟧\n--- rejected\nbad⟦</s>⟧\n")
    assert "worse" not in capsys.readouterr().err


def test_escapes_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = byte_tokenizer()
    ids = made("\x1b[31mred\x07 ⟦</s>⟧", split_special_tokens=True)["input_ids"]
    show_example(tmp_path, made, "id\x1b[2J", [("prompt", ids)])
    for text in ((tmp_path / "example.txt").read_text(), capsys.readouterr().err):
        assert "\x1b" not in text
        assert "red [</s>]" in text


PARTS = st.lists(
    st.tuples(st.sampled_from(["prompt", "learned"]), st.text("ab\n ⟦⟧é", max_size=400)), max_size=9
)


@settings(max_examples=100, deadline=None)
@given(PARTS)
def test_never_more_than_a_dozen_lines(parts: list[tuple[str, str]]) -> None:
    rows = console._shortened(parts)
    assert 1 + sum(len(lines) for _, lines in rows) <= console.EXAMPLE_LINES
    assert all(len(line) <= console.EXAMPLE_WIDTH for _, lines in rows for line in lines)
    if len(parts) == 1 and parts[0][1].count("\n") < 6 and len(parts[0][1]) <= 100:
        assert "\n".join(rows[0][1]).replace("⏎", "\n") == parts[0][1]


def test_long_texts_keep_both_ends() -> None:
    text = "\n".join(f"line {n}" for n in range(100)) + "x" * 200
    ((_, lines),) = console._shortened([("prompt", text)])
    assert lines[0] == "line 0"
    assert "..." in lines
    assert lines[-1].startswith("line 99xx")
    assert lines[-1].endswith("xx")


def test_through_the_pipe_and_in_colours(capsys: pytest.CaptureFixture[str]) -> None:
    receive, send = os.pipe()
    try:
        console.send_events_to(send)
        console.example("example e", [("prompt", "[bold]u⟦</s>⟧"), ("learned", "a\nb")])
    finally:
        console._events_fd = None
        os.close(send)
    event = json.loads(os.read(receive, 65536))
    os.close(receive)
    plain = "example e\n  prompt    [bold]u⟦</s>⟧\n  learned   a\n            b"
    assert (event["event"], event["text"]) == ("example", plain)
    with Display(live=False) as display:
        display.example("sft", event)
    assert capsys.readouterr().err == f"sft: {plain}\n"
    shown_on = io.StringIO()
    terminal = Console(force_terminal=True, color_system="standard", width=120, file=shown_on)
    with Display(live=True, console=terminal) as display:
        display.example("sft", event)
    shown = shown_on.getvalue()
    assert "\x1b[35m⟦</s>⟧" in shown
    assert "[bold]u" in shown
