"""Small tokenizers, models and files for the tests of data, sampling and filtering."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scmini.store import Work

SHARED = Path(os.environ.get("SCMINI_SHARED", Path(__file__).resolve().parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared data here")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = CHATML, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written; eos is <|im_end|>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(
        ["user assistant system the cat says meow and the dog says woof"], trainer
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", **kwargs
    )
    made.chat_template = template
    return made


def tiny_llama(
    vocab_size: int, *, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> LlamaForCausalLM:
    settings = {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 32} | kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            intermediate_size=48,
            num_hidden_layers=2,
            initializer_range=0.4,
            attn_implementation="sdpa",
            **settings,
        )
        return LlamaForCausalLM(config).to(dtype).eval()


def shared_rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(SHARED / "data" / name, "rt", encoding="utf-8", newline="\n") as handle:
        return [json.loads(line) for line in handle]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def work(folder: Path, method: str | None = None) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(path=folder, method=method)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
