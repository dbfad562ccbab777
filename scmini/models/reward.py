"""Reward models: any causal sequence-classification model with one label, scored on prefix trees.

All answers to one prompt share it in a packed forest, and the reward is read at the last token that
is not padding, as transformers' own forward does. Equal answers to a prompt get equal rewards to
the last bit, so an answer that repeats the target ties with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scmini.errors import ConfigError, DataError
from scmini.models import original_reward, reward_formats
from scmini.models.attention import hidden_states
from scmini.models.memory import Knob, free, is_out_of_memory, too_large
from scmini.models.reward_formats import Format
from scmini.models.reward_loading import HEAD, KEY, load_model
from scmini.records import Message
from scmini_kernels import PrefixTree

Question = tuple[Sequence[Message], Sequence[str]]
"""A prompt and the answers to it."""
Group = list[list[int]]
"""The conversations of one question, as token ids."""
WHILE = "while grading"
LESS_MEMORY = "reward.load_in_4bit: true or a smaller reward.max_length"


def reward_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: str,
    *,
    pad_token_id: int | None,
    max_length: int,
    chat_template: Format | None = None,
) -> list[int]:
    """Token ids that a reward model reads: the whole conversation in its format.

    Padding tokens at the end are left out (a template may end with one), for the reward is read at
    the last token before them; what is too long loses its beginning.

    Raises:
        DataError: nothing is left to read.
    """
    conversation = [*prompt, {"role": "assistant", "content": response}]
    ids = reward_formats.conversation_ids(tokenizer, conversation, chat_template)
    while ids and ids[-1] == pad_token_id:
        ids.pop()
    if not ids:
        raise DataError(f"the chat template of the reward model left no token of {response!r:.60}")
    return ids[-max_length:]


class RewardModel:
    """A reward model with its tokenizer, ready to score.

    `full` counts the conversations read so far that have all of `max_length` tokens: longer ones
    among them have lost their beginnings.

    Args:
        model: sequence classification with one label and a linear head `score`.
        max_length: longest conversation in tokens.
        tokens_per_microbatch: tokens of a packed row; one prompt's answers may exceed it. Where a
            GPU's memory runs out it becomes less, and stays so.
        chat_template: a format by name; None is the tokenizer's own template.
        parity: "original" scores as `original_reward` describes.

    Raises:
        ConfigError: the head is another, or the tokenizer cannot write the format.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        tokens_per_microbatch: int,
        chat_template: Format | None = None,
        parity: Literal["none", "original"] = "none",
    ) -> None:
        reward_formats.check_format(tokenizer, chat_template)
        if parity == "original":
            original_reward.check_original(model, tokenizer)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.full = 0
        self.knob = Knob(tokens_per_microbatch, "reward.tokens_per_microbatch")
        self.chat_template = chat_template
        self.parity = parity
        self.head = _head(model)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: str,
        max_length: int,
        tokens_per_microbatch: int,
        revision: str | None = None,
        body: str | None = None,
        load_in_4bit: bool = False,
        chat_template: Format | None = None,
        parity: Literal["none", "original"] = "none",
    ) -> RewardModel:
        """Read a reward model from a folder or the hub; see `reward_loading.load_model`.

        In float32 the head computes whatever `dtype` is, except with parity.
        """
        model, tokenizer = load_model(
            source, revision=revision, body=body, dtype=dtype, load_in_4bit=load_in_4bit
        )
        return cls(
            model,
            tokenizer,
            max_length=max_length,
            tokens_per_microbatch=tokens_per_microbatch,
            chat_template=chat_template,
            parity=parity,
        )

    def score(self, prompt: Sequence[Message], responses: Sequence[str]) -> list[float]:
        """Rewards of several answers to one prompt."""
        return self.score_all([(prompt, responses)])[0]

    def score_all(self, questions: Sequence[Question]) -> list[list[float]]:
        """Rewards of the answers to several prompts, packed up to `tokens_per_microbatch`.

        The order of the work is that of the sizes, so that rows fill up; that of the results is
        the questions'.

        Raises:
            DataError: a conversation that cannot be read, or a reward that is not finite.
            DoesNotFit: a single conversation is too long for the GPU's memory.
        """
        if self.parity == "original":
            return self._score_as_original(questions)
        groups = [self._sequences(*question) for question in questions]
        found: list[list[float]] = [[] for _ in groups]
        sizes = _sizes(groups)
        waiting = fill(sizes, self.knob.tokens)
        while waiting:
            numbers = waiting[0]
            rewards = self._try([groups[number] for number in numbers])
            if rewards is None:
                row = sum(sizes[number] for number in numbers)
                if row <= self.knob.tokens:  # else another knob would make the same row
                    self.knob.halve(row, WHILE)
                if len(numbers) > 1:
                    waiting = fill(sizes, self.knob.tokens)
                    continue
                rewards = self._one_by_one(groups[numbers[0]])
            left = iter(rewards)
            for number in numbers:
                found[number] = [next(left) for _ in groups[number]]
                sizes[number] = 0
            waiting = waiting[1:]
        return found

    def _try(self, groups: list[Group]) -> list[float] | None:
        """Rewards of a row; None where a GPU's memory ran out."""
        try:
            return self._rewards(groups)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free()  # not before the traceback is gone
        return None

    def _one_by_one(self, group: Group) -> list[float]:
        """Rewards of one question's answers, each in a row of its own; equal ones are one row."""
        found: dict[tuple[int, ...], float] = {}
        for ids in group:
            if tuple(ids) not in found:
                alone = self._try([[ids]])
                if alone is None:
                    raise too_large(self.knob.key, len(ids), WHILE, LESS_MEMORY)
                found[tuple(ids)] = alone[0]
        return [found[tuple(ids)] for ids in group]

    def _score_as_original(self, questions: Sequence[Question]) -> list[list[float]]:
        rows = [
            original_reward.original_row(
                self.tokenizer, [*prompt, {"role": "assistant", "content": text}], self.max_length
            )
            for prompt, texts in questions
            for text in texts
        ]
        for row in rows:
            self._check_vocabulary(row.ids)
        self.full += sum(len(row.ids) == self.max_length for row in rows)
        while (rewards := self._try_as_original(rows)) is None:
            if self.knob.tokens < 2 * min(len(row.ids) + 1 for row in rows):  # all are alone
                raise too_large(self.knob.key, self.max_length, WHILE, LESS_MEMORY)
            self.knob.halve(self.knob.tokens, WHILE)
        left = iter(_finite(rewards))
        return [[next(left) for _ in texts] for _, texts in questions]

    def _try_as_original(self, rows: Sequence[original_reward.Padded]) -> list[float] | None:
        """Rewards of rows; None where a GPU's memory ran out."""
        try:
            return original_reward.original_rewards(
                self.model,
                self.head,
                rows,
                padding=self.tokenizer.unk_token_id,
                max_length=self.max_length,
                tokens_per_microbatch=self.knob.tokens,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free()
        return None

    def _sequences(self, prompt: Sequence[Message], responses: Sequence[str]) -> Group:
        pad = self.model.config.get_text_config().pad_token_id
        group = [
            reward_ids(
                self.tokenizer,
                prompt,
                text,
                pad_token_id=pad,
                max_length=self.max_length,
                chat_template=self.chat_template,
            )
            for text in responses
        ]
        for ids in group:
            self._check_vocabulary(ids)
        self.full += sum(len(ids) == self.max_length for ids in group)
        return group

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        """On a GPU an id without an embedding would only show as a device error."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{KEY}: the tokenizer writes {token!r} (id {max(ids)}), but the reward model has "
                f"embeddings for {rows} tokens: they do not belong together"
            )

    @torch.inference_mode()
    def _rewards(self, groups: list[Group]) -> list[float]:
        tree = PrefixTree.pack(groups).to(self.model.device)
        # Every row once: two copies of a row in one product may differ in the last bit.
        rows, copies = last_rows(tree, groups).unique(return_inverse=True)
        hidden = hidden_states(self.model, tree)[rows]
        rewards = nn.functional.linear(hidden.float(), self.head.weight.float())[copies, 0]
        return _finite(rewards.tolist())


def fill(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items, in rows whose sizes add up to the capacity at most (first fit, decreasing).

    An item above the capacity has a row to itself. Items of size 0 have none.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        if sizes[number] == 0:
            continue
        row = next((r for r, left in enumerate(room) if sizes[number] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def _sizes(groups: Sequence[Group]) -> list[int]:
    return [PrefixTree.count_tokens(group) if group else 0 for group in groups]


def last_rows(tree: PrefixTree, groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Row of each sequence's last token; (S,) int64 on the tree's device.

    Args:
        tree: packed from `groups` with every token after the first scored, so that its edges are
            the rows that have a parent, in order.
        groups: the ids that were packed.
    """
    rows = torch.arange(tree.num_tokens, device=tree.device)
    children = rows[tree.position_ids > 0]
    offsets, indices = tree.sequence_edges
    lengths = torch.tensor([len(ids) for group in groups for ids in group], device=tree.device)
    if int(lengths.min()) < 2:
        raise DataError("a conversation of one token has no answer in it")
    return children[indices[offsets[1:] - 1]]


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, HEAD, None)
    if type(head) is not nn.Linear or head.bias is not None or head.out_features != 1:
        raise ConfigError(
            f"{KEY}: {type(model).__name__} is not a causal decoder with a one-label linear head "
            f"`{HEAD}` (Llama, Mistral, Qwen, Gemma reward models are)"
        )
    return head


def _finite(rewards: list[float]) -> list[float]:
    if not all(math.isfinite(reward) for reward in rewards):
        raise DataError(
            f"{KEY}: the reward model gave a reward that is not finite; reward.dtype: bfloat16 or "
            "float32 has the range that float16 lacks"
        )
    return rewards
