"""The zoo keeper family: deterministic, gradable, with splits that never share a prompt."""

from __future__ import annotations

import random
import time

import pytest

from scmini.data import zoo


def _prompts(records: list[dict]) -> list[str]:
    return [record["prompt"][0]["content"] for record in records]


def test_everything_is_a_function_of_the_seed() -> None:
    assert zoo.examples(3, "train", 50, 0.25) == zoo.examples(3, "train", 50, 0.25)
    assert zoo.examples(3, "train", 50, 0.25) != zoo.examples(4, "train", 50, 0.25)
    assert zoo.pretraining_dialogues(3, 50, 0.6) == zoo.pretraining_dialogues(3, 50, 0.6)
    assert zoo.pretraining_dialogues(3, 50, 0.6) != zoo.pretraining_dialogues(4, 50, 0.6)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_more_records_never_change_the_first_ones(split: str) -> None:
    assert zoo.examples(1, split, 60, 0.25)[:20] == zoo.examples(1, split, 20, 0.25)


def test_careful_answers_are_perfect_and_flawed_ones_are_not() -> None:
    rng = random.Random(0)
    for split in ("train", "test"):
        for question in zoo.make_questions(5, 3000, split):
            prompt = zoo.prompt_text(question)
            assert zoo.grade(prompt, zoo.careful_answer(question, rng)) == 1.0
            assert 0.0 <= zoo.grade(prompt, zoo.flawed_answer(question, rng)) < 1.0


def test_prompts_can_be_read_back() -> None:
    for question in zoo.make_questions(6, 2000, "train"):
        animal, attributes, manner, layout = zoo._parse_prompt(zoo.prompt_text(question))
        assert (animal, manner, layout) == (question.animal, question.manner, question.layout)
        assert attributes == set(question.attributes)


def test_splits_share_no_prompt_and_test_holds_the_held_out_kinds() -> None:
    texts = {s: _prompts(zoo.examples(2, s, 1500, 0.25)) for s in ("train", "validation", "test")}
    assert all(len(set(prompts)) == 1500 for prompts in texts.values())
    assert not set(texts["train"]) & set(texts["test"])
    assert not set(texts["train"]) & set(texts["validation"])
    assert not set(texts["validation"]) & set(texts["test"])
    read = {prompt for prompt, _ in zoo.pretraining_dialogues(2, 5000, 0.6)}
    assert not read & set(texts["test"])
    held = [q.kind in zoo.HELD_OUT for q in zoo.make_questions(2, 1000, "test")]
    assert sum(held) == 500
    assert not any(q.kind in zoo.HELD_OUT for q in zoo.make_questions(2, 1000, "train"))


def test_records_have_the_documented_form() -> None:
    record = zoo.examples(1, "train", 18, 0.25)[17]
    assert record["id"] == "zoo-train-00017"
    assert [message["role"] for message in record["prompt"]] == ["user"]
    assert len(record["rejected"]) == 1
    assert record["rejected"][0] != record["target"]


def test_flaw_share_is_the_share_of_flawed_targets() -> None:
    def perfect(flaw_share: float) -> float:
        records = zoo.examples(1, "train", 2000, flaw_share)
        pairs = zip(_prompts(records), records, strict=True)
        return sum(zoo.grade(p, r["target"]) == 1 for p, r in pairs) / 2000

    assert perfect(0.0) == 1.0
    assert perfect(1.0) == 0.0
    assert perfect(0.25) == pytest.approx(0.75, abs=0.04)


PROMPT = "Tell me the sound and food of the goose. Be excited and write a sentence."


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("Yay! The goose says honk and eats grass. Hooray!", 1.0),
        ("  Wow! The goose eats grass and says honk. So cool!\n", 1.0),
        ("Yay! The goose says honk and eats hay. Hooray!", 0.5),
        ("Yay! The goose says honk. Hooray!", 0.5),
        ("Yay! The goose says honk, eats grass and is white. Hooray!", 2 / 3),
        ("Yay! The duck says quack and eats bread. Hooray!", 0.0),
        ("The goose says honk and eats grass. Hooray!", 2.5 / 3),
        ("Arr! The goose says honk and eats grass. Matey!", 1 / 3),
        ("Yay! The goose:\n- says honk\n- eats grass\nHooray!", 2 / 3),
        ("Yay! The goose: honk, grass. Hooray!", 2 / 3),
        ("Yay! The goose says honk and eats grass. The cow says moo. Hooray!", 2 / 3),
        ("Yay! The goose says honk and says honk. Hooray!", 0.5),
        ("I do not know.", 0.0),
        ("", 0.0),
        ("\u2603\U0001f984 \x00 \ud7ff", 0.0),
    ],
)
def test_the_grader_says_what_a_reader_would(answer: str, reward: float) -> None:
    assert zoo.grade(PROMPT, answer) == pytest.approx(reward)


def test_the_grader_survives_anything() -> None:
    rng, start = random.Random(0), time.perf_counter()
    pieces = ["The goose", " says honk", ", ", " and", "\n- ", ":", "Yay!", "\u00e9", "."]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(200)))
        assert 0.0 <= zoo.grade(PROMPT, text) <= 1.0
        assert 0.0 <= zoo.grade(text, PROMPT) <= 1.0
    for text in (
        "The goose says honk, " * 5000,
        " " * 100_000,
        "The goose:" + "\n- says honk" * 9000,
    ):
        assert 0.0 <= zoo.grade(PROMPT, text) <= 1.0
        assert zoo.grade(text, text) >= 0.0
    assert time.perf_counter() - start < 20


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        zoo.make_questions(0, 1, "dev")
