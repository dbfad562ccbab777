"""From messages to token ids, the same way in every stage.

A prompt is what the tokenizer's chat template writes, up to the point where the assistant speaks.
An answer is tokenised on its own and closed by the end token, so its ids do not depend on what
stands before it: the ids that a sampler produced can be trained and scored as they are.
"""

from typing import Any, Literal

from scmini.errors import DataError
from scmini.records import Message


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `DataError`, with the remedy, for a tokenizer without chat template or end token."""
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
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


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    There is one BOS at the start if the template or the tokenizer writes one, and never two.
    Earlier answers are tokenised on their own where the template leaves them as they are.

    Args:
        messages: turns of which the last is not the assistant's.

    Raises:
        DataError: no messages, the assistant's turn comes last, or the template refuses them.
    """
    try:
        pieces = _pieces(tokenizer, messages)
    except _Rewritten:
        pieces = [_render(tokenizer, messages)]
    return _join(tokenizer, pieces)


def response_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an answer with the end token; one written out in the text is plain text."""
    return [*_answer_ids(tokenizer, text), tokenizer.eos_token_id]


def conversation_ids(
    tokenizer: Any, messages: list[Message], target: str, loss_on: Literal["last", "all"]
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
    answer = response_ids(tokenizer, target)
    if loss_on == "last":
        before = prompt_ids(tokenizer, messages)
        return before + answer, [False] * len(before) + [True] * len(answer)
    try:
        pieces = _pieces(tokenizer, messages)
    except _Rewritten as error:
        raise DataError(
            f"the chat template writes {error} differently once another turn follows, so an answer "
            "cannot be learned where it is given; use sft.loss_on: last"
        ) from None
    ids = _join(tokenizer, pieces)
    mask = _mask(tokenizer, pieces, len(ids))
    return ids + answer, mask + [True] * len(answer)


def fit(prompt_ids: list[int], response_len: int, max_length: int) -> list[int]:
    """The end of a prompt that fits before a response; the response is never shortened.

    Raises:
        DataError: the response leaves no room for even one token of the prompt.
    """
    room = max_length - response_len
    if room < 1:
        raise DataError(
            f"a response of {response_len} tokens does not fit into model.max_length: "
            f"{max_length}; raise it, or drop such rows with data.max_target_chars"
        )
    return prompt_ids[-room:]


class _Rewritten(Exception):
    """The template changes an earlier answer; the text says which."""


def _render(tokenizer: Any, messages: list[Message]) -> str:
    """The template's text, up to where the assistant speaks."""
    from jinja2 import TemplateError

    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("a prompt needs a message, and the last may not be the assistant's")
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of {roles}: "
            f"{error}"
        ) from None


def _pieces(tokenizer: Any, messages: list[Message]) -> list[str]:
    """The rendered prompt cut at the earlier answers: template text, answer, template text, ...

    Joined, they are the rendered text; each even piece ends where that of the turns so far does.
    """
    whole = _render(tokenizer, messages)
    pieces, at = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Two answers in a row: no rendered prompt ends where the second begins.
        alone = number == 0 or messages[number - 1]["role"] == "assistant"
        before = "" if alone else _render(tokenizer, messages[:number])
        variants = (message["content"], message["content"].strip())  # many templates trim
        found = [v for v in variants if whole.startswith(before + v)] if before else []
        if not found or len(before) < at:
            raise _Rewritten(f"the assistant's answer in message {number + 1}")
        pieces += [before[at:], found[0]]
        at = len(before) + len(found[0])
    return [*pieces, whole[at:]]


def _join(tokenizer: Any, pieces: list[str]) -> list[int]:
    """Ids of template text and answers in turn, with one BOS if there is to be one."""
    ids = [token for piece in _tokenise(tokenizer, pieces) for token in piece]
    return _bos(tokenizer, ids)


def _tokenise(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    return [
        _answer_ids(tokenizer, piece)
        if number % 2
        else list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        for number, piece in enumerate(pieces)
    ]


def _answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of an answer without end token; special tokens written out in it are plain text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """One BOS where template or tokenizer write one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if ids[:1] == [bos]:
        return ids[1:] if ids[1:2] == [bos] else ids
    return [bos, *ids] if tokenizer("")["input_ids"][:1] == [bos] else ids


def _mask(tokenizer: Any, pieces: list[str], length: int) -> list[bool]:
    """Which ids belong to earlier answers or close them."""
    tokens = _tokenise(tokenizer, pieces)
    for number in range(2, len(tokens), 2):
        if tokens[number][:1] != [tokenizer.eos_token_id]:
            raise DataError(
                "the chat template does not close an answer with the end token "
                f"{tokenizer.eos_token!r}, but goes on with {pieces[number][:20]!r}; use "
                "sft.loss_on: last, or make the closing token the tokenizer's eos_token"
            )
    mask = []
    for number, piece in enumerate(tokens):
        closes = number > 0 and number % 2 == 0
        mask += [number % 2 == 1 or (closes and at == 0) for at in range(len(piece))]
    return [False, *mask][-length:]  # a BOS may have been put in front, or a doubled one taken away
