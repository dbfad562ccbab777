"""Tiny models, tokenizers and data for the tests of loading and training."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scmini.records import Example, write_examples
from scmini.seeding import rng
from scmini.stages.base import train_tokenizer
from scmini.training.batches import Group

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE,
            sliding_window=5,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
}


def tiny_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = MODELS[name]()
    return model.eval()


def with_lora(model: PreTrainedModel, r: int = 4, dropout: float = 0.0) -> PeftModel:
    """A LoRA adapter of which B is not zero: with B = 0 half the gradients would be zero."""
    lora = LoraConfig(
        r=r, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(5)
    peft = get_peft_model(model, lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft


def random_ids(seed: int, length: int) -> list[int]:
    return [rng(seed, "ids", str(i)).randrange(2, VOCABULARY) for i in range(length)]


def response_groups(sizes: list[int], seed: int = 0) -> list[Group]:
    """Prompts of 5 to 9 tokens with 1 + k responses of 3 to 8 tokens, some with a common start."""
    groups = []
    for number, k in enumerate(sizes):
        draw = rng(seed, "group", str(number))
        begin = random_ids(seed * 1000 + number, 2)
        responses = [
            (begin if draw.random() < 0.5 else [])
            + random_ids(seed * 1000 + 100 * number + j + 1, draw.randint(3, 6))
            for j in range(1 + k)
        ]
        prompt = random_ids(seed * 77 + number, draw.randint(5, 9))
        ref = [draw.uniform(-40.0, -10.0) for _ in responses]
        groups.append(Group.of_responses(f"p{number}", prompt, responses, ref))
    return groups


def text_groups(number: int, seed: int = 0) -> list[Group]:
    groups = []
    for i in range(number):
        draw = rng(seed, "text", str(i))
        ids = random_ids(seed * 500 + i, draw.randint(6, 14))
        groups.append(Group.of_text(f"t{i}", ids, [j >= len(ids) // 2 for j in range(len(ids))]))
    return groups


def separate_logps(model: nn.Module, groups: list[Group]) -> Tensor:
    """The slow twin of trees: one ordinary forward pass with plain attention per sequence."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.set_attn_implementation("sdpa")
    found = []
    for group in groups:
        for sequence in group.sequences:
            prompt, response = sequence
            ids = torch.tensor([[*prompt, *response]])
            logits = model(input_ids=ids).logits[0]
            if logits.dtype != torch.float64:
                logits = logits.float()
            table = logits.log_softmax(-1)
            steps = range(len(prompt), ids.shape[1])
            found.append(torch.stack([table[i - 1, ids[0, i]] for i in steps]).sum())
    return torch.stack(found)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


ANIMALS = ("cat", "dog", "owl", "fox", "bee", "elk")


def dialogues(number: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(number):
        one, two = ANIMALS[i % 6], ANIMALS[(i // 6) % 6]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Who meets the {one} number {i}?"},
                    {"role": "assistant", "content": f"The {two} meets the {one}."},
                ]
            }
        )
    return rows


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([row["messages"] for row in dialogues(60)], 300)


def write_model(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A saved Llama with its tokenizer, as the stage `base` would leave it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    shape |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_train(folder: Path, number: int, rejected: bool = False) -> list[Example]:
    examples = [
        Example(
            f"e{i}",
            row["messages"][:1],
            row["messages"][1]["content"],
            [f"I do not know {i}."] if rejected else [],
        )
        for i, row in enumerate(dialogues(number))
    ]
    write_examples(folder / "train.jsonl", examples)
    return examples
