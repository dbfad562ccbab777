"""A tiny BERT in the formats in which encoders are published, and what it gives in plain steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

HIDDEN = 16
POSITIONS = 64
WORDS = [*"abcdefghijklmnopqrstuvwxyz.!?0123456789", "the", "cat", "dog", "says", "meow", "goose"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(**settings: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that puts [CLS] before and [SEP] behind every text."""
    words = [*SPECIAL, *WORDS, *("##" + word for word in WORDS if len(word) == 1)]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": word for name, word in zip(names, SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens, **settings)


def write_bare(folder: Path, **settings: Any) -> Path:
    """A plain transformers folder."""
    words = wordpiece(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=len(words), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=POSITIONS, initializer_range=0.1,
        )  # fmt: skip
        BertModel(shape).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_published(folder: Path, pooling: str = "cls") -> Path:
    """The same as a sentence-transformers folder of today's hub: BERT, pooling, normalisation."""
    write_bare(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, ("", "1_Pooling", "2_Normalize"), strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    (folder / "1_Pooling").mkdir()
    chosen = {
        "word_embedding_dimension": HIDDEN,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(chosen))
    return folder


class Plain:
    """transformers alone, one text (or piece of a text) after another, no padding."""

    def __init__(self, folder: Path, pooling: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pooling = pooling

    def pieces(self, text: str, max_length: int) -> list[list[int]]:
        """Ids with special tokens, as the tokenizer itself cuts them."""
        return self.tokenizer(
            text, truncation=True, max_length=max_length, return_overflowing_tokens=True
        )["input_ids"]

    @torch.inference_mode()
    def pooled(self, ids: list[int]) -> NDArray[np.float64]:
        hidden = self.model(torch.tensor([ids])).last_hidden_state[0].double()
        return (hidden[0] if self.pooling == "cls" else hidden.mean(0)).numpy()

    def vector(self, text: str, max_length: int, *, in_pieces: bool = False) -> NDArray[np.float64]:
        """Unit vector of the first piece, or mean of all, weighted by tokens less [CLS], [SEP]."""
        pieces = self.pieces(text, max_length)[: None if in_pieces else 1]
        mean = np.average(
            [unit(self.pooled(ids)) for ids in pieces],
            axis=0,
            weights=[len(ids) - 2 for ids in pieces],
        )
        return unit(mean)


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same direction, length 1."""
    return vector / np.linalg.norm(vector)
