"""Texts to unit vectors, whose inner product says how alike two texts are.

`hashed-ngrams` needs no download: words, pairs of words and character trigrams. Anything else is
the folder or the name on the Hugging Face hub of a sentence-transformers model.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scmini.errors import DataError, DoesNotFit, EnvironmentProblem
from scmini.sections import EmbedConfig

Vectors = NDArray[np.float32]

_WORD = re.compile(r"\w+|[^\w\s]")


class Encoder(Protocol):
    """What the stage `embed` asks of an encoder."""

    dimensions: int

    def fit(self, batches: Iterable[list[str]]) -> None:
        """Learn what there is to learn from all texts; they need not fit into memory at once."""

    def encode(self, texts: list[str]) -> Vectors:
        """[texts, dimensions] float32 of length 1; a text with nothing in it gives zeros."""

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than the encoder reads."""


def build_encoder(config: EmbedConfig) -> Encoder:
    """The encoder that `embed.encoder` names.

    Raises:
        DataError: a folder that is missing or holds no such model.
        EnvironmentProblem: a missing package, or a hub name that cannot be fetched.
    """
    if config.encoder == "hashed-ngrams":
        return HashedNgramEncoder(config.dimensions)
    return SentenceTransformerEncoder(config.encoder, config.max_length, 64)


class HashedNgramEncoder:
    """Words, word pairs and character trigrams, hashed; log-frequency times rarity (tf-idf).

    The hash is MurmurHash3, the same in every process. Rarity is the smoothed inverse document
    frequency over the texts given to `fit`: ln((1 + N) / (1 + df)) + 1.
    """

    def __init__(self, dimensions: int) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self.dimensions = dimensions
        self._rarity: NDArray[np.float64] | None = None
        self._hash = HashingVectorizer(
            analyzer=_features, n_features=dimensions, alternate_sign=False, norm=None
        )

    def fit(self, batches: Iterable[list[str]]) -> None:
        """Count in how many of the texts each feature occurs."""
        frequency = np.zeros(self.dimensions)
        number = 0
        for texts in batches:
            if texts:
                found = self._hash.transform(texts).indices
                frequency += np.bincount(found, minlength=self.dimensions)
                number += len(texts)
        self._rarity = np.log((1 + number) / (1 + frequency)) + 1

    def encode(self, texts: list[str]) -> Vectors:
        """[texts, dimensions] float32 of length 1; a text with nothing in it gives zeros."""
        from sklearn.preprocessing import normalize

        if self._rarity is None:
            raise RuntimeError("fit the encoder before use")
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        counts = self._hash.transform(texts)
        counts.data = (np.log(counts.data) + 1) * self._rarity[counts.indices]
        return normalize(counts).toarray().astype(np.float32)

    def count_truncated(self, texts: list[str]) -> int:
        """None: texts are read to their end."""
        return 0


class SentenceTransformerEncoder:
    """A sentence-transformers model, on the GPU if there is one."""

    def __init__(self, name: str, max_length: int, batch_size: int) -> None:
        self._model = _load_sentence_transformer(name)
        self._model.max_seq_length = min(max_length, self._model.max_seq_length or max_length)
        self._batch_size = batch_size
        self.dimensions = int(self._model.encode(["a"]).shape[1])

    def fit(self, batches: Iterable[list[str]]) -> None:
        """Nothing is learned, nothing is read."""

    def encode(self, texts: list[str]) -> Vectors:
        """[texts, dimensions] float32 of length 1; a text with nothing in it gives zeros.

        Raises:
            DoesNotFit: the GPU's memory does not even hold one text.
        """
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        places = [place for place, text in enumerate(texts) if text.strip()]
        if places:
            vectors[places] = self._encode([texts[place] for place in places])
        return vectors

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than the encoder reads."""
        if not texts:
            return 0
        ids = self._model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return sum(len(tokens) > self._model.max_seq_length for tokens in ids)

    def _encode(self, texts: list[str]) -> Vectors:
        """Halve the batch until it fits."""
        import torch

        while True:
            try:
                vectors = self._model.encode(
                    texts,
                    batch_size=self._batch_size,
                    normalize_embeddings=True,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                )
                return vectors.astype(np.float32)
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise DoesNotFit(
                        "embed: one text does not fit into the GPU's memory; lower embed.max_length"
                    ) from None
                self._batch_size //= 2
                torch.cuda.empty_cache()


def _features(text: str) -> Iterator[str]:
    """Words and signs, pairs of them, and character trigrams within the text, all in lower case."""
    text = text.lower()
    words = _WORD.findall(text)
    for word in words:
        yield "w " + word
    for pair in pairwise(words):
        yield "p " + " ".join(pair)
    spaced = " ".join(text.split())
    for start in range(len(spaced) - 2):
        yield "c " + spaced[start : start + 3]


def _load_sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EnvironmentProblem(
            f"embed.encoder: {name} needs a package that is missing ({error}); "
            "pip install sentence-transformers"
        ) from None
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if local and not Path(name).is_dir():
        raise DataError(f"embed.encoder: the folder {name} does not exist")
    try:
        return SentenceTransformer(name, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        if Path(name).is_dir():
            raise DataError(f"embed.encoder: {name} holds no usable encoder ({reason})") from None
        raise EnvironmentProblem(
            f"embed.encoder: {name} could not be fetched ({reason}); check the name and the "
            "connection, or download it elsewhere and give the folder"
        ) from None
