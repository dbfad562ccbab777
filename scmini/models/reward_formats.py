"""How a reward model is shown a conversation.

`starling` is the format of Starling-RM-7B-alpha's model card, written out for several turns:

    <s>[INST] {user} </s> [/INST] {answer}</s>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from scmini.chat import ids_of
from scmini.chat_templates import TEMPLATES, missing_tokens
from scmini.errors import ConfigError, DataError
from scmini.quoting import plain
from scmini.records import Message

KEY = "reward.chat_template"

Format = Literal["starling", "llama-2", "zephyr", "openchat", "chatml"]


def check_format(tokenizer: PreTrainedTokenizerBase, chat_template: Format | None) -> None:
    """ConfigError where a tokenizer cannot write a format; None is the tokenizer's own template."""
    name = getattr(tokenizer, "name_or_path", "") or "the reward model"
    if chat_template is None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{KEY} is needed: the tokenizer of {name} has no chat template; say which format "
                "the reward model was trained on"
            )
        return
    if chat_template == "starling":
        ids = tokenizer("<s></s>", add_special_tokens=False)["input_ids"]
        lacks = ids != [tokenizer.bos_token_id, tokenizer.eos_token_id]
        tokens = ["<s> and </s> as first and last token of a text"] if lacks else []
    else:
        tokens = missing_tokens(tokenizer, TEMPLATES[chat_template].tokens)
        if tokenizer.eos_token is None:
            tokens.append("end token")
    if tokens:
        raise ConfigError(
            f"{KEY}: {chat_template} does not suit the tokenizer of {name}, which has no "
            f"{tokens[0]}; name the format that the reward model was trained on"
        )


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    chat_template: Format | None = None,
) -> list[int]:
    """Token ids of a whole conversation, the answer to grade last; one BOS at most in front.

    Special tokens that are written out in a message are plain text: no answer can end itself, or
    give itself another turn.

    Raises:
        DataError: the format cannot write these roles.
    """
    ids = ids_of(
        tokenizer, list(conversation), lambda messages: _text(tokenizer, messages, chat_template)
    )
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if chat_template in TEMPLATES and tokenizer("")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]  # these templates leave it to the tokenizer
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _text(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    chat_template: Format | None,
) -> str:
    if chat_template == "starling":
        return "".join(f"<s>[INST] {u} </s> [/INST] {a}</s>" for u, a in turns(conversation))
    template = None if chat_template is None else TEMPLATES[chat_template].text
    messages = list(conversation)
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except MemoryError:
        raise
    except Exception as error:  # what a template does to texts and numbers may raise anything
        roles = plain(", ".join(message["role"] for message in conversation), 120)
        raise DataError(
            f"the chat template of the reward model refuses a conversation of {roles}: "
            f"{plain(error) or type(error).__name__}"
        ) from None


def turns(conversation: Sequence[Message]) -> list[tuple[str, str]]:
    """Pairs of user and assistant; a system message goes in front of the first user's.

    Raises:
        DataError: the two do not take turns.
    """
    messages = list(conversation)
    system = ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    if not messages or [m["role"] for m in messages] != ["user", "assistant"] * (
        len(messages) // 2
    ):
        roles = ", ".join(message["role"] for message in conversation)
        raise DataError(
            f"{KEY}: starling writes turns of user and assistant, not a conversation of {roles}"
        )
    texts = [message["content"] for message in messages]
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    return list(zip(texts[::2], texts[1::2], strict=True))
