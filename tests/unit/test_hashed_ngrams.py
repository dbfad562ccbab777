"""The encoder hashed-ngrams, against tf-idf from dictionaries."""

import math
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_texts import ODD

from scmini.models.encoders import build_encoder
from scmini.models.hashed_ngrams import HashedNgramEncoder
from scmini.sections import EmbedConfig

TEXTS = ["The goose says honk!", "the Goose  eats grass", "Ahoy!", "The goose says honk!", "ä"]


def features(text: str) -> Counter[str]:
    """What hashed-ngrams reads of a text, written down anew."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    spaced = " ".join(text.lower().split())
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    trigrams = [spaced[i : i + 3] for i in range(len(spaced) - 2)]
    return Counter(
        [("w", w) for w in words] + [("p", p) for p in pairs] + [("c", c) for c in trigrams]
    )


def slow_cosine(a: str, b: str, corpus: list[str]) -> float:
    """tf-idf cosine from dictionaries, without hashing."""

    def weights(text: str) -> dict[str, float]:
        found = {}
        for feature, count in features(text).items():
            df = sum(feature in features(other) for other in corpus)
            found[feature] = (1 + math.log(count)) * (math.log((1 + len(corpus)) / (1 + df)) + 1)
        return found

    x, y = weights(a), weights(b)
    dot = sum(x[f] * y.get(f, 0.0) for f in x)
    return dot / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


def test_hashed_ngrams_are_tf_idf() -> None:
    encoder = HashedNgramEncoder(1 << 20)  # so wide that no two features meet
    encoder.fit([TEXTS[:2], [], TEXTS[2:]])
    vectors, long = encoder.encode(TEXTS)
    assert not long.any()
    for i, a in enumerate(TEXTS):
        for j, b in enumerate(TEXTS):
            assert float(vectors[i] @ vectors[j]) == pytest.approx(
                slow_cosine(a, b, TEXTS), abs=1e-5
            )


def test_hashed_ngrams_shape_and_blanks() -> None:
    encoder, shares = HashedNgramEncoder(64), []
    encoder.fit([TEXTS])
    vectors, _ = encoder.encode(["", " \n", "a b"], shares.append)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([0, 0, 1])
    assert shares == [1.0]
    assert encoder.encode([])[0].shape == (0, 64)
    many = [f"{number} geese" for number in range(600)]
    together = encoder.encode(many)[0]
    assert (together[[0, 256, 599]] == encoder.encode([many[i] for i in (0, 256, 599)])[0]).all()
    with pytest.raises(RuntimeError, match="fit"):
        HashedNgramEncoder(64).encode(["a"])


def test_hashed_ngrams_are_the_same_in_every_process() -> None:
    code = (
        "from scmini.models.hashed_ngrams import HashedNgramEncoder as H; import hashlib;"
        "e = H(512); e.fit([['the cat says', 'meow']]);"
        "print(hashlib.sha256(e.encode(['the cat', 'a dog'])[0].tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


def test_what_was_fitted_is_kept(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("read again")
        yield

    kept = tmp_path / "scratch" / "rarity.npy"
    first, second, other = HashedNgramEncoder(64), HashedNgramEncoder(64), HashedNgramEncoder(128)
    first.fit([TEXTS], kept)
    second.fit(never(), kept)
    assert (first.encode(TEXTS)[0] == second.encode(TEXTS)[0]).all()
    for damage in (kept.read_bytes()[:-3], b"", b"junk"):
        kept.write_bytes(damage)
        again = HashedNgramEncoder(64)
        again.fit([TEXTS], kept)
        assert (first.encode(TEXTS)[0] == again.encode(TEXTS)[0]).all()
    other.fit([TEXTS], kept)  # of another size: not taken
    assert other.encode(TEXTS)[0].shape == (5, 128)


def test_odd_texts() -> None:
    encoder = build_encoder(EmbedConfig(dimensions=256))
    encoder.fit([ODD])
    vectors, long = encoder.encode(ODD)
    expected = [1.0 if text.strip() else 0.0 for text in ODD]
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx(expected, abs=1e-6)
    assert not long.any()
