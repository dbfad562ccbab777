"""From messages to token ids, the same way in every stage.

A prompt is what the tokenizer's chat template writes, up to the point where the assistant speaks.
An answer is tokenised apart from it and closed by the end token, so its ids do not depend on what
stands before it: the ids that a sampler produced can be trained and scored as they are. They are
those of a text that goes on: a tokenizer that begins every text with a space (Llama, Mistral) puts
none there, unless the template has one before its answers ("Assistant: yes").

Nobody can write a special token: those that are written out in a message become plain text.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from scmini.errors import DataError
from scmini.quoting import plain
from scmini.records import Message

Purpose = Literal["inference", "training"]
"""What a prompt is for. Templates that know the variable `purpose` (those of `parity: original`)
write other strings for training; all others write the same."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `DataError`, with the remedy, for a tokenizer without chat template or end token."""
    name = _name(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{name}: no chat template; put one into the folder as chat_template.jinja "
            "(that of the instruction-tuned model of the same family will do)"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{name}: no end token; set eos_token in tokenizer_config.json to the one with which "
            "the chat template closes an answer"
        )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the tokenizer"


def prompt_ids(
    tokenizer: Any, messages: list[Message], *, purpose: Purpose = "inference"
) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    There is one BOS at the start if the template or the tokenizer writes one, and never two.
    Earlier answers have the ids that they had as answers, where the template leaves them as they
    are.

    Args:
        messages: turns of which the last is not the assistant's.

    Raises:
        DataError: no messages, the assistant's turn comes last, or the template refuses them or
            leaves nothing of them.
    """
    whole = _render(tokenizer, messages, purpose)
    try:
        answers = _answers(tokenizer, messages, whole, purpose)
    except _Rewritten:
        answers = []
    ids = _ids(tokenizer, _tokenise(tokenizer, messages, whole, answers, purpose))
    if not ids:
        raise DataError(f"the chat template of {_name(tokenizer)} leaves nothing of a prompt")
    return ids


def response_ids(tokenizer: Any, text: str, *, purpose: Purpose = "training") -> list[int]:
    """Token ids of an answer with the end token; one written out in the text is plain text."""
    return [*_answer_ids(tokenizer, text, purpose), tokenizer.eos_token_id]


def trained_ids(tokenizer: Any, text: str, sampled: list[int]) -> list[int]:
    """The ids with which a sampled answer is trained: those that the sampler produced.

    `parity: original` alone makes them anew from the text, as it does those of targets: else the
    space that only these begin with would tell chosen from rejected.
    """
    if _habits(tokenizer, "training").alone:
        return response_ids(tokenizer, text.lstrip(" "))
    return sampled


def conversation_ids(
    tokenizer: Any,
    messages: list[Message],
    target: str,
    loss_on: Literal["last", "all"],
    *,
    purpose: Purpose = "training",
) -> tuple[list[int], list[bool]]:
    """Token ids of a prompt with its answer, and which of them are learned.

    Args:
        messages: the prompt, of which the last turn is not the assistant's.
        target: the final answer.
        loss_on: "last" scores the final answer with its end token, "all" every answer of the
            assistant with its end token.

    Returns:
        input ids and a mask of the same length. Before each scored answer stand exactly the ids
        that `prompt_ids` gives for the turns before it.

    Raises:
        DataError: as `prompt_ids`; and for "all" if the template rewrites earlier answers, or
            closes them with another token than the end token.
    """
    answer = response_ids(tokenizer, target, purpose=purpose)
    if loss_on == "last":
        before = prompt_ids(tokenizer, messages, purpose=purpose)
        return before + answer, [False] * len(before) + [True] * len(answer)
    whole = _render(tokenizer, messages, purpose)
    try:
        answers = _answers(tokenizer, messages, whole, purpose)
    except _Rewritten as error:
        raise DataError(
            f"the chat template writes {error} differently once another turn follows, so an answer "
            "cannot be learned where it is given; use sft.loss_on: last"
        ) from None
    pieces = _tokenise(tokenizer, messages, whole, answers, purpose)
    ids = _ids(tokenizer, pieces)
    mask = _mask(tokenizer, pieces, len(ids))
    return ids + answer, mask + [True] * len(answer)


def answer_text(tokenizer: Any, text: str) -> str:
    """A sampled answer's text without the space that the template has before answers."""
    return text.lstrip(" ") if _habits(tokenizer, "inference").lead else text


def fit(
    prompt_ids: list[int], response_len: int, max_length: int, *, bos: int | None = None
) -> list[int]:
    """The end of a prompt that fits before a response; the response is never shortened.

    Args:
        bos: where the prompt begins with it, so does what is left: models that were trained with a
            beginning-of-sequence token answer badly without it.

    Raises:
        DataError: the response leaves no room for even one token of the prompt.
    """
    room = max_length - response_len
    if room < 1:
        raise DataError(
            f"a response of {response_len} tokens does not fit into model.max_length: "
            f"{max_length}; raise it, or drop such rows with data.max_target_chars"
        )
    if bos is not None and prompt_ids[:1] == [bos] and 1 < room < len(prompt_ids):
        return [bos, *prompt_ids[1 - room :]]
    return prompt_ids[-room:]


class _Rewritten(Exception):
    """The template changes an earlier answer; the text says which."""


class _Habits(NamedTuple):
    """How a template writes answers."""

    lead: str
    """Spaces between the prompt and an answer. They are of the answer: Llama's tokenizers make one
    token of a space and a word."""
    alone: bool
    """Whether the ids of an answer are those of its text alone, as if nothing stood before it. So
    does the original's framework (`parity: original`)."""


class _Span(NamedTuple):
    """A part of the rendered prompt that is plain text."""

    start: int
    end: int
    answer: str | None
    """An earlier answer of the assistant; None: another message's text."""


class _Piece(NamedTuple):
    """Some ids of a prompt, and whether they are an earlier answer."""

    ids: list[int]
    is_answer: bool


def _render(tokenizer: Any, messages: list[Message], purpose: Purpose) -> str:
    """The template's text, up to where the assistant speaks.

    transformers runs templates in Jinja's sandbox, where they reach no Python; but what they do to
    texts and numbers may raise anything.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("a prompt needs a message, and the last may not be the assistant's")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, purpose=purpose
            )
        )
    except MemoryError:
        raise
    except Exception as error:
        roles = plain(", ".join(message["role"] for message in messages), 120)
        raise DataError(
            f"the chat template of {_name(tokenizer)} refuses a conversation of {roles}: "
            f"{plain(error) or type(error).__name__}"
        ) from None


def _habits(tokenizer: Any, purpose: Purpose) -> _Habits:
    return _habits_of(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token, purpose)


@lru_cache(maxsize=16)
def _habits_of(tokenizer: Any, _template: str, _end: str, purpose: Purpose) -> _Habits:
    """What a small conversation shows."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "word"}
    try:
        before = _render(tokenizer, [question], purpose)
        whole = _render(tokenizer, [question, answer, question], purpose)
        alone = purpose == "training" and before != _render(tokenizer, [question], "inference")
    except DataError:
        return _Habits("", alone=False)
    behind = whole.removeprefix(before)
    text = behind.lstrip(" ")
    known = whole.startswith(before) and text.startswith("word")
    return _Habits(behind[: len(behind) - len(text)] if known else "", alone)


def _answers(tokenizer: Any, messages: list[Message], whole: str, purpose: Purpose) -> list[_Span]:
    """Where the earlier answers are; before each stands the prompt of the turns so far."""
    lead = _habits(tokenizer, purpose).lead
    found: list[_Span] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Two answers in a row: no rendered prompt ends where the second begins.
        alone = number == 0 or messages[number - 1]["role"] == "assistant"
        before = "" if alone else _render(tokenizer, messages[:number], purpose)
        variants = (message["content"], message["content"].strip())  # many templates trim
        fitting = [v for v in variants if whole.startswith(before + lead + v)] if before else []
        start = len(before)
        if not fitting or (found and start < found[-1].end):
            raise _Rewritten(f"the assistant's answer in message {number + 1}")
        end = start + len(lead) + len(fitting[0])
        found.append(_Span(start, end, fitting[0]))
    return found


def ids_of(
    tokenizer: Any, messages: list[Message], render: Callable[[list[Message]], str]
) -> list[int]:
    """Ids of a conversation as `render` writes it, no BOS added; as everywhere, special tokens that
    are written out in a message become plain text."""
    whole, ids, at = render(messages), list[int](), 0
    for span in _typed(tokenizer, messages, whole, render):
        ids += _encode(tokenizer, whole[at : span.start], first=at == 0)
        ids += _encode(tokenizer, whole[span.start : span.end], plain=True)
        at = span.end
    return ids + _encode(tokenizer, whole[at:], first=at == 0)


def _typed(
    tokenizer: Any, messages: list[Message], whole: str, render: Callable[[list[Message]], str]
) -> list[_Span]:
    """Where the messages are in which a special token is written out.

    None where the template does not write them as they are, or trimmed at one end or both.
    """
    special = _special(tokenizer, len(tokenizer))
    hits = {n for n, m in enumerate(messages) if special and special.search(m["content"])}
    if not hits:
        return []
    mark = "\ue000"
    while any(mark in message["content"] for message in messages):
        mark += "\ue000"
    marked = [
        {**m, "content": f"{mark}{n}\ue001"} if n in hits else m for n, m in enumerate(messages)
    ]
    parts = re.split(f"{mark}([0-9]+)\ue001", render(marked))
    found, at = [], 0
    for before, number, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        content = messages[int(number)]["content"]
        at += len(before)
        trimmed = (content, content.strip(), content.lstrip(), content.rstrip())
        fitting = [text for text in trimmed if whole.startswith(text + after, at)]
        if not fitting:
            return []
        # The spaces before a word are of its token.
        start = at - len(before) + len(before.rstrip(" "))
        at += len(fitting[0])
        found.append(_Span(start, at, None))
    return found if whole.startswith(parts[0]) and at + len(parts[-1]) == len(whole) else []


@lru_cache(maxsize=4)
def _special(tokenizer: Any, _size: int) -> re.Pattern[str] | None:
    """Finds special tokens in a text."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _tokenise(
    tokenizer: Any,
    messages: list[Message],
    whole: str,
    answers: list[_Span],
    purpose: Purpose,
) -> list[_Piece]:
    """The ids of a rendered prompt, cut where plain text begins and ends."""
    typed = [
        span
        for span in _typed(
            tokenizer, messages, whole, lambda marked: _render(tokenizer, marked, purpose)
        )
        if not any(span.start < answer.end and answer.start < span.end for answer in answers)
    ]
    pieces, at = [], 0
    for span in sorted([*answers, *typed]):
        pieces.append(_Piece(_encode(tokenizer, whole[at : span.start], first=at == 0), False))
        if span.answer is None:
            ids = _encode(tokenizer, whole[span.start : span.end], plain=True)
        else:
            ids = _answer_ids(tokenizer, span.answer, purpose)
        pieces.append(_Piece(ids, span.answer is not None))
        at = span.end
    return [*pieces, _Piece(_encode(tokenizer, whole[at:], first=at == 0), False)]


def _answer_ids(tokenizer: Any, text: str, purpose: Purpose) -> list[int]:
    """Ids of an answer without end token; special tokens written out in it are plain text."""
    habits = _habits(tokenizer, purpose)
    if habits.lead:
        text = habits.lead + text.lstrip(" ")
    return _encode(tokenizer, text, plain=True, first=habits.alone)


def _encode(tokenizer: Any, text: str, *, plain: bool = False, first: bool = False) -> list[int]:
    """Ids of a part of a text.

    Args:
        plain: special tokens written out in it are plain text.
        first: it begins the text. Before anything else a tokenizer may put a space.
    """
    options = {"add_special_tokens": False} | ({"split_special_tokens": True} if plain else {})
    if not first and _begins_with_space(tokenizer):
        # A line feed merges with no word, so its ids are those before the text's.
        before = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        ids = list(tokenizer("\n" + text, **options)["input_ids"])
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return list(tokenizer(text, **options)["input_ids"])


@lru_cache(maxsize=4)
def _begins_with_space(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a space (SentencePiece's mark) before a text's first word."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581")


def _ids(tokenizer: Any, pieces: list[_Piece]) -> list[int]:
    """All ids, with one BOS at the start where template or tokenizer write one."""
    ids = [token for piece in pieces for token in piece.ids]
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if ids[:1] == [bos]:
        return ids[1:] if ids[1:2] == [bos] else ids
    return [bos, *ids] if tokenizer("")["input_ids"][:1] == [bos] else ids


def _mask(tokenizer: Any, pieces: list[_Piece], length: int) -> list[bool]:
    """Which ids belong to earlier answers or close them."""
    mask = []
    for before, piece in pairwise([_Piece([], False), *pieces]):
        if before.is_answer and piece.ids[:1] != [tokenizer.eos_token_id]:
            raise DataError(
                "the chat template does not close an answer with the end token "
                f"{tokenizer.eos_token!r}, but goes on with {tokenizer.decode(piece.ids[:8])!r}; "
                "use sft.loss_on: last, or make the closing token the tokenizer's eos_token"
            )
        closes = before.is_answer
        mask += [piece.is_answer or (closes and at == 0) for at in range(len(piece.ids))]
    return [False, *mask][-length:]  # a BOS may have been put in front, or a doubled one taken away
