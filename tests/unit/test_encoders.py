"""Encoders and the stage `embed`."""

import json
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
import torch
from data_helpers import files_of, tokenizer, work
from transformers import BertConfig, BertModel

from scmini.config import Config
from scmini.errors import DataError, DoesNotFit, EnvironmentProblem
from scmini.models.encoders import HashedNgramEncoder, SentenceTransformerEncoder, build_encoder
from scmini.records import Example, Response, Samples, write_examples, write_samples
from scmini.sections import EmbedConfig
from scmini.stages import embed

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
    vectors = encoder.encode(TEXTS)
    for i, a in enumerate(TEXTS):
        for j, b in enumerate(TEXTS):
            assert float(vectors[i] @ vectors[j]) == pytest.approx(
                slow_cosine(a, b, TEXTS), abs=1e-5
            )


def test_hashed_ngrams_shape_and_blanks() -> None:
    encoder = HashedNgramEncoder(64)
    encoder.fit([TEXTS])
    vectors = encoder.encode(["", " \n", "a b"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([0, 0, 1])
    assert encoder.encode([]).shape == (0, 64)
    with pytest.raises(RuntimeError, match="fit"):
        HashedNgramEncoder(64).encode(["a"])


def test_hashed_ngrams_are_the_same_in_every_process() -> None:
    code = (
        "from scmini.models.encoders import HashedNgramEncoder as H; import sys, hashlib;"
        "e = H(512); e.fit([['the cat says', 'meow']]);"
        "print(hashlib.sha256(e.encode(['the cat', 'a dog']).tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as a sentence-transformers folder with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bert")
    words = tokenizer(cls_token="<s>", sep_token="<|im_end|>", mask_token="<pad>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(shape).save_pretrained(folder / "bare")
    words.save_pretrained(folder / "bare")
    part = Transformer(str(folder / "bare"))
    model = SentenceTransformer(modules=[part, Pooling(16, "mean")], device="cpu")
    model.save(str(folder / "whole"))
    return folder / "whole"


def test_sentence_transformer(sentence_model: Path) -> None:
    encoder = build_encoder(EmbedConfig(encoder=str(sentence_model), max_length=8))
    assert encoder.dimensions == 16
    encoder.fit(iter([["never read"]]))
    texts = ["the cat says meow", "", "dog", "  ", "the cat says meow"]
    vectors = encoder.encode(texts)
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 0, 1, 0, 1], abs=1e-6)
    assert vectors[0] == pytest.approx(vectors[4], abs=1e-6)
    assert vectors[0] != pytest.approx(vectors[2], abs=1e-2)
    long = "the cat says meow " * 9
    assert encoder.count_truncated(["dog", long, long]) == 2
    assert encoder.count_truncated([]) == 0
    assert encoder.encode([long])[0] == pytest.approx(encoder.encode([long + "dog dog"])[0])


def test_out_of_memory_halves_the_batch(
    sentence_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = SentenceTransformerEncoder(str(sentence_model), 8, 8)
    plain = encoder.encode(["dog", "cat"])
    encode, limit = encoder._model.encode, 2

    def small_card(texts: list[str], batch_size: int, **more: Any) -> Any:
        if batch_size > limit:
            raise torch.OutOfMemoryError("no")
        return encode(texts, batch_size=batch_size, **more)

    monkeypatch.setattr(encoder._model, "encode", small_card)
    assert encoder.encode(["dog", "cat"]) == pytest.approx(plain)
    limit = 0
    with pytest.raises(DoesNotFit, match=r"embed\.max_length"):
        encoder.encode(["dog"])


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_encoder(EmbedConfig(encoder=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no usable encoder"):
        build_encoder(EmbedConfig(encoder=str(tmp_path / "empty")))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EnvironmentProblem, match="pip install sentence-transformers"):
        build_encoder(EmbedConfig(encoder="some/encoder"))


def write_inputs(tmp_path: Path) -> dict[str, Path]:
    examples = [
        Example(str(i), [{"role": "user", "content": "q"}], f"target {i}") for i in range(5)
    ]
    write_examples(tmp_path / "data" / "train.jsonl", examples)
    texts = [["one", "two", "two"], [], ["", "target 2"], ["one"], ["three four"]]
    rows = [
        Samples(str(i), [1], [Response(text, [2], "stop") for text in group])
        for i, group in enumerate(texts)
    ]
    write_samples(tmp_path / "sample" / "part-00000.parquet", rows[:3])
    write_samples(tmp_path / "sample" / "part-00001.parquet", rows[3:])
    return {"data": tmp_path / "data", "sample": tmp_path / "sample"}


def test_embed_stage(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    config = Config.model_validate({"embed": {"dimensions": 256}})
    made = work(tmp_path / "out")
    embed.run(config, inputs, made)
    shards = list(embed.read_vectors(made.path))
    assert [groups for groups, _ in shards] == [
        [("0", 4), ("1", 1), ("2", 3)],
        [("3", 2), ("4", 2)],
    ]
    vectors = shards[0][1]
    assert vectors.dtype == np.float16
    assert (vectors[2] == vectors[3]).all()
    assert (vectors[7] == vectors[5]).all()  # target 2, and the answer that equals it
    assert not vectors[6].any()
    assert np.linalg.norm(np.delete(vectors, 6, 0).astype(float), axis=1) == pytest.approx(
        1, abs=2e-3
    )
    assert made.counts == {"empty texts (zero vector)": 1}
    assert made.notes["dimensions"] == 256


def test_embed_stage_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    inputs, config = write_inputs(tmp_path), Config()
    whole, torn = work(tmp_path / "a"), work(tmp_path / "b")
    embed.run(config, inputs, whole)
    embed.run(config, inputs, torn)
    (torn.path / "part-00001.npy").unlink()
    again = work(torn.path)
    embed.run(config, inputs, again)
    assert files_of(torn.path) == files_of(whole.path)
    assert again.counts == whole.counts


def test_embeddings_that_do_not_fit_together(tmp_path: Path) -> None:
    made = work(tmp_path / "out")
    embed.run(Config(), write_inputs(tmp_path), made)
    ids = made.path / "part-00001.ids.json"
    ids.write_text(json.dumps([{"id": "3", "rows": 2}]))
    with pytest.raises(DataError, match=r"part-00001.npy: 4 vectors do not fit"):
        list(embed.read_vectors(made.path))
    (made.path / "part-00000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"part-00000.npy: not readable"):
        list(embed.read_vectors(made.path))
