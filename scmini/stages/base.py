"""What a download would bring: a tokenizer, a small Llama and a reward model, made on the spot.

For a model that is named: its copy with the tokens that the chat template needs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scmini.config import Config
from scmini.errors import DataError
from scmini.models import loading
from scmini.models.added_tokens import add_tokens
from scmini.records import Message, read_jsonl
from scmini.sections import TrainingConfig
from scmini.seeding import derived_seed
from scmini.store import Work, sealing, write_atomic
from scmini.training import checkpoints
from scmini.training.batches import Group
from scmini.training.losses import SFTObjective
from scmini.training.trainer import Trained, train

START, END, PAD = SPECIAL = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without the line feed between turns."""
SHARED_SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "warmup_ratio",
    "tokens_per_microbatch",
    "save_steps",
    "logging_steps",
)
ADAM_BETA2 = 0.95
"""The second moment of short pretraining runs forgets faster than AdamW's default."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Make model/ from corpus.jsonl, and reward_model/ where a model is to grade.

    Where a model is named, model/ is that model with the tokens of its chat template.

    Raises:
        DataError: an empty corpus, no preference to train the reward model on, or a named model to
            which tokens cannot be added.
        EnvironmentProblem: the named model cannot be fetched.
    """
    if config.model.model_name_or_path is not None:
        name = config.model.model_name_or_path
        for key, value in add_tokens(config.model, name, work.path / "model").items():
            work.note(key, value)
        return
    preferences = inputs["data"] / "preferences.jsonl"
    makes_grader = config.grader == "model" and config.reward.model_name_or_path is None
    if makes_grader and next(read_jsonl(preferences), None) is None:
        raise DataError(
            "the data has no rejected responses, so no reward model can be trained on it; "
            "name one in reward.model_name_or_path"
        )
    model_folder, facts = work.path / "model", work.path / "scratch" / "model.json"
    if not facts.is_file():
        made = _make_model(config, inputs["data"] / "corpus.jsonl", work.path)
        facts.parent.mkdir(exist_ok=True)
        with sealing(facts):
            write_atomic(facts, json.dumps(made).encode())
    made = json.loads(facts.read_bytes())
    if made["too_long"]:
        work.count("dialogue longer than model.max_length", made["too_long"])
    peak = round(checkpoints.peak_gib(), 3)
    Trained(made["steps"], peak, made.get("tokens_per_microbatch")).note_in(work)
    if makes_grader:
        from scmini.training.reward_model import train_reward_model

        tokenizer = loading.load_tokenizer(str(model_folder))
        out = work.path / "reward_model"
        for key, value in train_reward_model(
            config, tokenizer, model_folder, preferences, out
        ).items():
            work.note(key, value)


def train_tokenizer(corpus: list[list[Message]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can write any text, with a ChatML template; no BOS.

    Deterministic: the same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = [PAD, START, END]  # their ids in this order
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    # With the roles, so that these become single tokens.
    texts = (_text(message) for messages in corpus for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def conversations(
    tokenizer: PreTrainedTokenizerFast, corpus: list[list[Message]]
) -> Iterator[tuple[list[int], list[bool]]]:
    """What `chat.conversation_ids(..., "all")` gives for each dialogue, all texts encoded at once.

    That is possible because the template is known to be `CHAT_TEMPLATE`.
    """
    start, end = (cast(int, tokenizer.convert_tokens_to_ids(t)) for t in (START, END))
    opening = [start, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
    turns = [message for messages in corpus for message in messages]
    answers = iter(
        _encode(tokenizer, [m["content"] for m in turns if m["role"] == "assistant"], plain=True)
    )
    others = iter(
        _encode(tokenizer, [_text(m) for m in turns if m["role"] != "assistant"], plain=False)
    )
    for messages in corpus:
        ids: list[int] = []
        scored: list[bool] = []
        for message in messages:
            is_answer = message["role"] == "assistant"
            head = opening if is_answer else [start]
            body = [*next(answers if is_answer else others), end]
            if not is_answer and any(token in message["content"] for token in SPECIAL):
                role, content = f"{message['role']}\n", message["content"]
                plain = _encode(tokenizer, [role, content], plain=True)
                body = [*plain[0], *plain[1], end]
            ids += head + body
            scored += [False] * len(head) + [is_answer] * len(body)
        yield ids, scored


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], *, plain: bool
) -> list[list[int]]:
    """Token ids; special tokens written out in a text are text if `plain`, as in chat.py."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=plain)
    return list(encoded["input_ids"])


def new_llama(config: Config, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A float32 Llama with random weights (from the seed) and tied embeddings."""
    shape = config.base
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        initializer_range=shape.initializer_range,
        max_position_embeddings=config.model.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "base"))
        model = LlamaForCausalLM(settings)
    model.generation_config = GenerationConfig.from_model_config(settings)
    return model.float()


def _make_model(config: Config, corpus_path: Path, out: Path) -> dict[str, int | None]:
    """Train and write model/; again from the newest checkpoint where that was begun or done."""
    corpus = [_messages(row, number, corpus_path) for number, row in read_jsonl(corpus_path)]
    if not corpus:
        raise DataError(f"{corpus_path}: empty; set data.num_pretraining above 0")
    base = config.base
    tokenizer = train_tokenizer(corpus, base.vocab_size)
    groups = [
        Group.of_text(
            str(number), ids, scored if base.loss_on == "answers" else _all_but_first(ids)
        )
        for number, (ids, scored) in enumerate(conversations(tokenizer, corpus))
        if len(ids) <= config.model.max_length
    ]
    settings = TrainingConfig.model_validate(
        {
            **{name: getattr(base, name) for name in SHARED_SETTINGS},
            "prompts_per_step": base.dialogues_per_step,
            "gradient_checkpointing": False,
        }
    )
    trained = train(
        cast(Any, new_llama(config, tokenizer)).to(loading.device()),
        groups,
        SFTObjective(),
        settings,
        out=out,
        seed=config.seed,
        save_as="model",
        tokenizer=tokenizer,
        adam_beta2=ADAM_BETA2,
    )
    return {
        "too_long": len(corpus) - len(groups),
        "steps": trained.steps,
        "tokens_per_microbatch": trained.tokens_per_microbatch,
    }


def _all_but_first(ids: list[int]) -> list[bool]:
    return [False] + [True] * (len(ids) - 1)


def _messages(row: dict[str, Any], number: int, path: Path) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{path}, line {number}: field 'messages': expected two turns or more")
    return messages


def _text(message: Message) -> str:
    """What the template writes between special tokens."""
    return f"{message['role']}\n{message['content']}"
