"""Stage `data`: prompts and targets to train on, and held-out ones on which methods are judged.

Where the stage `base` trains the model itself, it also writes what that reads: dialogues
(corpus.jsonl) and preferences (preferences.jsonl), of the training side only. Where the stage
`sample` takes the answers that came with the data, they are written to responses.jsonl.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

from scmini import console
from scmini.config import Config
from scmini.data import zoo
from scmini.data.importers import read_examples
from scmini.data.readers import Row
from scmini.data.self_contrast import AnswerFile
from scmini.data.split import prompt_digest, split, within_limits
from scmini.errors import DataError
from scmini.records import Example, Message, write_examples, write_jsonl
from scmini.sections import DataConfig
from scmini.store import Work

ZOO_FLAWED_TARGETS = 0.30
"""Share of the demo's targets with flaws: human targets have them too."""
ZOO_CAREFUL_DIALOGUES = 0.65
"""Share of careful answers in what the demo's base model reads."""
ZOO_NUM_TRAIN = 3072
"""Training prompts of the demo where data.num_train is empty."""
NOTED_CHARS, SHOWN_CHARS = 300, 100
"""Of a row that is left out: characters in the manifest and on the screen."""
WITHOUT_ANSWERS = "training prompts without an answer in the data"


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write train.jsonl and test.jsonl, and what else is read of these:

    corpus.jsonl, preferences.jsonl: for the stage `base`.
    responses.jsonl: {"id", "responses": [text, ...]} for each row of train.jsonl, in its order.

    Raises:
        DataError: a file is missing or damaged, too few rows remain, or no training prompt has an
            answer where answers are wanted.
        RecordError: a row is malformed; names file and line.
    """
    with ExitStack() as stack:
        answers = None
        if config.sample.engine == "data":
            answers = stack.enter_context(AnswerFile(work.path))
        zoo_data = config.data.format == "zoo"
        sides = _zoo(config) if zoo_data else _from_files(config.data, work, answers)
        train, test, dialogues = sides
        chosen = train[: config.data.num_train]
        write_examples(work.path / "train.jsonl", chosen)
        write_examples(work.path / "test.jsonl", test)
        if answers is not None:
            _write_responses(chosen, answers, work)
    if config.model.model_name_or_path is None:
        corpus = islice(dialogues, config.data.num_pretraining)
        if not write_jsonl(work.path / "corpus.jsonl", ({"messages": d} for d in corpus)):
            raise DataError("data.num_pretraining: 0 leaves nothing to train a base model on")
        write_jsonl(work.path / "preferences.jsonl", _preferences(train))
    work.note("rows", {"train": len(chosen), "test": len(test), "usable": len(train) + len(test)})


Sides = tuple[list[Example], list[Example], Iterable[list[Message]]]
"""Train, test, and dialogues for the base model."""


def _zoo(config: Config) -> Sides:
    seed, data = config.seed, config.data
    num_train = data.num_train or ZOO_NUM_TRAIN
    train = _examples(zoo.examples(seed, "train", num_train, ZOO_FLAWED_TARGETS))
    test = _examples(zoo.examples(seed, "test", data.num_test, ZOO_FLAWED_TARGETS))
    shared = {prompt_digest(e.prompt) for e in train} & {prompt_digest(e.prompt) for e in test}
    if shared:
        raise AssertionError(f"{len(shared)} prompts of the zoo are in train and test")
    pairs = zoo.pretraining_dialogues(seed, data.num_pretraining, ZOO_CAREFUL_DIALOGUES)
    user = ([{"role": "user", "content": prompt}, _assistant(answer)] for prompt, answer in pairs)
    return train, test, user


def _examples(rows: list[dict[str, Any]]) -> list[Example]:
    return [Example(**row) for row in rows]


def _from_files(data: DataConfig, work: Work, answers: AnswerFile | None) -> Sides:
    drop = _Dropped(work)
    taken: set[str] = set()

    def usable(name: str | None) -> list[Example]:
        answered = answers.add if answers else None
        found = read_examples(data, drop, split=name, taken=taken, answered=answered)
        return list(within_limits(found, data.max_prompt_chars, data.max_target_chars, drop))

    tests = usable(data.dataset_test_split) if data.dataset_test_split else None
    examples = usable(None)
    _check_ids(chain(tests or (), examples))
    train, test = split(
        examples,
        data.num_test,
        drop,
        tests=tests,
        first_turn=data.test_prompts == "first-turn",
    )
    if drop.samples:
        work.note("dropped", drop.samples)
    return train, test, _dialogues(train)


class _Dropped:
    """Counts what is left out, and shows the first of each reason."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.samples: dict[str, str] = {}
        """Reason -> the row or example, cut."""

    def __call__(self, reason: str, what: Row | Example) -> None:
        self._work.count(reason)
        if reason not in self.samples:
            self.samples[reason] = _one_line(f"{what.id}: {_shown(what)}")[:NOTED_CHARS]
            console.say(f"left out, {reason}: {self.samples[reason][:SHOWN_CHARS]}")


def _shown(what: Row | Example) -> str:
    if isinstance(what, Example):
        return " ... ".join([*(turn["content"] for turn in what.prompt), what.target])
    try:
        return json.dumps(what.values, ensure_ascii=False, default=str)
    except RecursionError:
        return "nested too deeply to be shown"


def _one_line(text: str) -> str:
    """Without line ends, escape sequences and characters that turn the direction of writing."""
    plain = (c if c.isprintable() else " " for c in console.clean(text))
    return " ".join("".join(plain).split())


def _write_responses(train: list[Example], answers: AnswerFile, work: Work) -> None:
    without = total = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal without, total
        for example in train:
            found = answers.of(example.id)
            without += not found
            total += len(found)
            yield {"id": example.id, "responses": found}

    write_jsonl(work.path / "responses.jsonl", rows())
    if not total:
        raise DataError(
            "sample.engine: data takes the answers that came with the data, but the files of "
            "data.path hold none for a training prompt (rows with a field 'outputs'); name the "
            "original project's responses/*.jsonl, or choose another sample.engine"
        )
    if without:
        work.count(WITHOUT_ANSWERS, without)
    work.note("answers", total)


def _check_ids(examples: Iterable[Example]) -> None:
    """Ids made of file names clash where files of one name lie in different folders."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(
                f"data.path: two files give the id {example.id!r}; give the files different names"
            )
        seen.add(example.id)


def _dialogues(train: list[Example]) -> Iterator[list[Message]]:
    """Each prompt with its target and with each rejected answer, one after another."""
    for example in train:
        for answer in (example.target, *example.rejected):
            yield [*example.prompt, _assistant(answer)]


def _preferences(train: list[Example]) -> Iterator[dict[str, Any]]:
    for example in train:
        for rejected in example.rejected:
            yield {"prompt": example.prompt, "chosen": example.target, "rejected": rejected}


def _assistant(answer: str) -> Message:
    return {"role": "assistant", "content": answer}
