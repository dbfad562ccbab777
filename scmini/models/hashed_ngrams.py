"""The encoder `hashed-ngrams`: texts to tf-idf vectors of words, word pairs and trigrams, hashed.

It needs no download and no GPU.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scmini.store import write_atomic

Vectors = NDArray[np.float32]
Flags = NDArray[np.bool_]

_WORD = re.compile(r"\w+|[^\w\s]")
_ROWS = 256
"""Texts hashed at a time."""


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

    def fit(self, batches: Iterable[list[str]], kept: Path | None = None) -> None:
        """Count in how many of the texts each feature occurs.

        Args:
            kept: where the result is left for another time, and found if it is there.
        """
        self._rarity = _read_rarity(kept, self.dimensions)
        if self._rarity is not None:
            return
        frequency = np.zeros(self.dimensions)
        number = 0
        for texts in batches:
            for start in range(0, len(texts), _ROWS):
                found = self._hash.transform(texts[start : start + _ROWS]).indices
                frequency += np.bincount(found, minlength=self.dimensions)
            number += len(texts)
        self._rarity = np.log((1 + number) / (1 + frequency)) + 1
        if kept is not None:
            buffer = io.BytesIO()
            np.save(buffer, self._rarity, allow_pickle=False)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, buffer.getvalue())

    def encode(
        self, texts: list[str], on_share: Callable[[float], None] = lambda share: None
    ) -> tuple[Vectors, Flags]:
        """[texts, dimensions] float32 of length 1, zeros for a blank text; no text is too long."""
        from sklearn.preprocessing import normalize

        if self._rarity is None:
            raise RuntimeError("fit the encoder before use")
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts), _ROWS):
            counts = self._hash.transform(texts[start : start + _ROWS])
            counts.data = (np.log(counts.data) + 1) * self._rarity[counts.indices]
            rows = normalize(counts).astype(np.float32)
            vectors[start : start + _ROWS] = rows.toarray()
            on_share(min(1.0, (start + _ROWS) / len(texts)))
        return vectors, np.zeros(len(texts), np.bool_)


def _read_rarity(path: Path | None, dimensions: int) -> NDArray[np.float64] | None:
    """What an earlier `fit` left; None where it left nothing, or nothing that fits."""
    if path is None or not path.exists():
        return None
    try:
        rarity = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = rarity.shape == (dimensions,) and rarity.dtype == np.float64
    return rarity if fits and np.isfinite(rarity).all() else None


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
