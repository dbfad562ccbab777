"""Reward models: any causal sequence-classification model with one label, scored on prefix trees.

All answers to one prompt share it in a packed forest, and the reward is read at the last token that
is not padding, as transformers' own forward does. Equal texts get equal rewards to the last bit, so
an answer that repeats the target ties with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scmini.errors import ConfigError, DataError, EnvironmentProblem
from scmini.models.attention import hidden_states
from scmini.models.loading import device, quietly
from scmini.records import Message
from scmini_kernels import PrefixTree

KEY = "reward.model_name_or_path"

Question = tuple[Sequence[Message], Sequence[str]]
"""A prompt and the answers to it."""


def reward_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: str,
    *,
    pad_token_id: int | None,
    max_length: int,
) -> list[int]:
    """Token ids that a reward model reads: the whole conversation through the chat template.

    Padding tokens at the end are left out (a template may end with one), for the reward is read at
    the last token before them; what is too long loses its beginning.

    Raises:
        DataError: nothing is left to read.
    """
    conversation = [*prompt, {"role": "assistant", "content": response}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise DataError(
            f"the chat template of the reward model refuses a conversation of {roles}: {error}"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    while ids and ids[-1] == pad_token_id:
        ids.pop()
    if not ids:
        raise DataError(f"the chat template of the reward model left no token of {response!r:.60}")
    return ids[-max_length:]


class RewardModel:
    """A reward model with its tokenizer, ready to score."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        tokens_per_microbatch: int,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.tokens_per_microbatch = tokens_per_microbatch
        self.head = _head(model)

    @classmethod
    def load(
        cls, source: str, *, dtype: str, max_length: int, tokens_per_microbatch: int
    ) -> RewardModel:
        """Read a reward model from a folder or the hub, safetensors only.

        Args:
            dtype: "float32", "bfloat16" or "float16"; the reward head computes in float32 anyway.
            max_length: longest conversation in tokens.
            tokens_per_microbatch: tokens of a packed row; one prompt's answers may exceed it.

        Raises:
            ConfigError: not a causal decoder with one label, or it has no chat template.
            DataError: a local folder that cannot be read.
            EnvironmentProblem: a hub name that cannot be fetched.
        """
        _check_labels(source)
        where = device()
        options: dict[str, Any] = {"device_map": {"": where}} if where.type != "cpu" else {}
        try:
            with quietly():
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    source,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    attn_implementation="sdpa",
                    output_loading_info=True,
                    **options,
                )
                tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(source, error) from None
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])[0]
            raise ConfigError(f"{KEY}: {source} has no weights for {missing}: not a reward model")
        if not tokenizer.chat_template:
            raise ConfigError(f"{KEY}: the tokenizer of {source} has no chat template")
        limits = {"max_length": max_length, "tokens_per_microbatch": tokens_per_microbatch}
        return cls(model, tokenizer, **limits)

    def score(self, prompt: Sequence[Message], responses: Sequence[str]) -> list[float]:
        """Rewards of several answers to one prompt."""
        return self.score_all([(prompt, responses)])[0]

    def score_all(self, questions: Sequence[Question]) -> list[list[float]]:
        """Rewards of the answers to several prompts, packed up to `tokens_per_microbatch`."""
        groups = [self._sequences(*question) for question in questions]
        found: list[list[float]] = []
        for batch in self._batches(groups):
            rewards = iter(self._rewards(batch))
            found += [[next(rewards) for _ in group] for group in batch]
        return found

    def _sequences(self, prompt: Sequence[Message], responses: Sequence[str]) -> list[list[int]]:
        pad = self.model.config.get_text_config().pad_token_id
        limits = {"pad_token_id": pad, "max_length": self.max_length}
        return [reward_ids(self.tokenizer, prompt, text, **limits) for text in responses]

    def _batches(self, groups: list[list[list[int]]]) -> list[list[list[list[int]]]]:
        batches: list[list[list[list[int]]]] = []
        filled = self.tokens_per_microbatch
        for group in groups:
            size = PrefixTree.count_tokens(group)
            if filled + size > self.tokens_per_microbatch:
                batches.append([])
                filled = 0
            batches[-1].append(group)
            filled += size
        return batches

    @torch.inference_mode()
    def _rewards(self, groups: list[list[list[int]]]) -> list[float]:
        tree = PrefixTree.pack(groups).to(self.model.device)
        # Every row once: two copies of a row in one product may differ in the last bit.
        rows, copies = last_rows(tree, groups).unique(return_inverse=True)
        hidden = hidden_states(self.model, tree)[rows]
        rewards = nn.functional.linear(hidden.float(), self.head.weight.float())[copies, 0]
        if not torch.isfinite(rewards).all():
            raise DataError(f"{KEY}: the reward model gave a reward that is not finite")
        return [float(reward) for reward in rewards]


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
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ConfigError(
            f"{KEY}: {type(model).__name__} is not a causal decoder with a one-label linear head "
            "`score` (Llama, Mistral, Qwen, Gemma reward models are)"
        )
    return head


def _check_labels(source: str) -> None:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise DataError(f"{KEY}: the folder {source} does not exist")
    try:
        labels = AutoConfig.from_pretrained(source).num_labels
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from None
    if labels != 1:
        raise ConfigError(f"{KEY}: {source} has {labels} labels; a reward model has one")


def _unreadable(source: str, error: Exception) -> DataError | EnvironmentProblem:
    reason = " ".join(str(error).split())[:300]
    if Path(source).is_dir():
        return DataError(f"{KEY}: {source} holds no readable model in safetensors ({reason})")
    return EnvironmentProblem(
        f"{KEY}: {source} could not be fetched from the Hugging Face hub ({reason}); check the "
        "name and the connection, or download it elsewhere and give the folder"
    )
