"""Encoders of sentence-transformers, against plain transformers one text at a time."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_texts import ODD
from tiny_bert import HIDDEN, POSITIONS, WORDS, Plain, wordpiece, write_bare, write_published

from scmini.errors import ConfigError, DataError, DoesNotFit, EnvironmentProblem
from scmini.models import sentence_encoder
from scmini.models.encoders import build_encoder
from scmini.models.sentence_encoder import SentenceTransformerEncoder
from scmini.sections import EmbedConfig

LONG = "the cat says meow. " * 9


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"), "cls")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bare(tmp_path_factory.mktemp("bare"))


def build(folder: Path, **config: Any) -> SentenceTransformerEncoder:
    made = build_encoder(EmbedConfig(encoder=str(folder), **config))
    assert isinstance(made, SentenceTransformerEncoder)
    return made


def alike(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("kind", "pooling", "expected"),
    [("published", None, "cls"), ("published", "mean", "mean"), ("published", "cls", "cls"),
     ("bare", None, "mean"), ("bare", "cls", "cls")],
)  # fmt: skip
def test_pooling(
    request: pytest.FixtureRequest, kind: str, pooling: str | None, expected: str
) -> None:
    folder = request.getfixturevalue(kind)
    encoder = build(folder, max_length=12, **({"pooling": pooling} if pooling else {}))
    texts = ["the cat says meow", "dog", LONG, "the cat", "goose! 12"]
    vectors, long = encoder.encode(texts)
    assert (encoder.dimensions, vectors.dtype) == (HIDDEN, np.float32)
    assert long.tolist() == [False, False, True, False, False]
    plain = Plain(folder, expected)
    alike(vectors, [plain.vector(text, 12) for text in texts])
    other = Plain(folder, "mean" if expected == "cls" else "cls")
    assert abs(vectors[0] - other.vector(texts[0], 12)).max() > 0.01


def test_blank_texts_and_repeats(published: Path) -> None:
    encoder = build(published)
    encoder.fit(iter([["never read"]]))
    texts = ["the cat says meow", "", "dog", "  ", "the cat says meow", "\u200b"]
    vectors, long = encoder.encode(texts)
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.tolist() == pytest.approx([1, 0, 1, 0, 1, 0], abs=1e-6)
    alike(vectors[0], vectors[4], 1e-6)
    assert abs(vectors[0] - vectors[2]).max() > 0.01
    assert not long.any()
    assert encoder.encode([])[0].shape == (0, HIDDEN)
    assert encoder.encode([" "])[0].tolist() == [[0] * HIDDEN]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_long_texts_in_pieces(published: Path, pooling: str) -> None:
    encoder = build(published, max_length=10, long_texts="mean", pooling=pooling)
    plain = Plain(published, pooling)
    # 8 and 16 tokens fill one and two pieces to the last; 9 and 17 leave one token over.
    texts = [" ".join(WORDS[i % 26] for i in range(n)) for n in (7, 8, 9, 16, 17)] + [LONG, "dog"]
    vectors, long = encoder.encode(texts)
    assert long.tolist() == [False, False, True, True, True, True, False]
    assert [len(plain.pieces(text, 10)) for text in texts] == [1, 1, 2, 2, 3, 6, 1]
    alike(vectors, [plain.vector(text, 10, in_pieces=True) for text in texts])
    cut = build(published, max_length=10, pooling=pooling).encode(texts)[0]
    alike(cut, [plain.vector(text, 10) for text in texts])
    assert abs(cut[5] - vectors[5]).max() > 1e-3


def watch(encoder: SentenceTransformerEncoder) -> list[tuple[int, int]]:
    """Shapes of the batches to come."""
    shapes: list[tuple[int, int]] = []
    encoder._model.register_forward_pre_hook(
        lambda module, arguments: shapes.append(tuple(arguments[0]["input_ids"].shape))
    )
    return shapes


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), max_size=20),
    budget=st.integers(1, 120),
    in_pieces=st.booleans(),
)
def test_batches_never_matter(
    published: Path, counts: list[int], budget: int, in_pieces: bool
) -> None:
    texts = [" ".join(WORDS[(i * i + n) % 26] for i in range(n)) for n in counts]
    long_texts = "mean" if in_pieces else "truncate"
    encoder = build(published, max_length=16, tokens_per_batch=budget, long_texts=long_texts)
    alone = [encoder.encode([text])[0][0] for text in texts]
    shapes, shares = watch(encoder), []
    vectors, _ = encoder.encode(texts, shares.append)
    if texts:
        alike(vectors, alone, 1e-5)
    assert all(rows == 1 or rows * width <= budget for rows, width in shapes)
    assert shares == sorted(shares)
    if any(counts):
        assert shares[-1] == 1.0
        pieces = [max(1, math.ceil(n / 14)) if in_pieces else 1 for n in counts if n]
        assert sum(rows for rows, _ in shapes) == sum(pieces)


def test_same_as_the_library_itself(published: Path) -> None:
    encoder = build(published, max_length=20)
    texts = ["Ahoy!", "ä", "the Goose  eats grass", LONG, "the dog says 12"]
    texts += [text for text in ODD if len(text) < 100]
    texts = [text for text in texts if encoder._tokenize([text])[0].size]
    assert len(texts) > 10
    encoder._model.max_seq_length = 20
    alike(encoder.encode(texts)[0], encoder._model.encode(texts, normalize_embeddings=True))


def small_memory(
    encoder: SentenceTransformerEncoder, most: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """The forward fails above so many tokens, padding included; the batches that failed."""
    forward, failed = encoder._model.forward, []

    def patched(features: dict[str, Any], **more: Any) -> Any:
        rows, width = features["input_ids"].shape
        if rows * width > most:
            failed.append((rows, width))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features, **more)

    monkeypatch.setattr(encoder._model, "forward", patched)
    return failed


def test_out_of_memory_halves_the_budget(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(WORDS[i % 26] for i in range(n)) for n in range(1, 30)] * 2
    expected = build(published).encode(texts)[0]
    encoder = build(published)
    failed = small_memory(encoder, 300, monkeypatch)
    alike(encoder.encode(texts)[0], expected)
    assert 1 <= len(failed) <= 4  # 58 texts of up to 31 tokens -> at most 9
    assert encoder._budget <= 300 < 2 * encoder._budget + 31
    failed.clear()
    alike(encoder.encode(texts)[0], expected)
    assert not failed  # the budget stays halved


def test_what_was_tried_is_halved(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(published)
    failed = small_memory(encoder, 12, monkeypatch)  # far below the budget
    encoder.encode(["a b", "c d", "e f", "g h"])
    assert failed == [(4, 4)]


def test_one_text_that_does_not_fit(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(published)
    small_memory(encoder, 20, monkeypatch)
    with pytest.raises(DoesNotFit, match=r"47 tokens .* lower embed\.max_length"):
        encoder.encode(["dog", LONG])

    def broken(features: Any, **more: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(encoder._model, "forward", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        encoder.encode(["dog"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pooling_is_float32(bare: Path, dtype: str) -> None:
    encoder = build(bare, dtype=dtype)
    assert {p.dtype for p in encoder._model.parameters()} == {getattr(torch, dtype)}
    texts = ["the cat says meow. " * n for n in (1, 5, 9)]
    vectors = encoder.encode(texts)[0]
    rounded = Plain(bare, "mean", getattr(torch, dtype))
    # Padding moves the 16-bit hidden states a little; one at a time they are the same.
    alone = [encoder.encode([text])[0][0] for text in texts]
    alike(alone, [rounded.vector(text, 64) for text in texts], 1e-6)
    exact = build(bare).encode(texts)[0]
    assert (np.einsum("ij,ij->i", vectors, exact) > 0.999).all()
    assert not (vectors == exact).all()


def test_auto_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = sentence_encoder._dtype
    gpu = torch.device("cuda", 0)
    assert chosen("auto", torch.device("cpu")) == torch.float32
    assert chosen("float16", torch.device("cpu")) == torch.float16
    for capability, dtype in (((7, 5), torch.float16), ((8, 6), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert chosen("auto", gpu) == dtype


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders that sentence-transformers itself writes, from modules of its own."""
    from sentence_transformers import SentenceTransformer

    def save(modules: list[Any], **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("library")
        SentenceTransformer(modules=modules, device="cpu", **settings).save(str(folder))
        return folder

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_modules(bare: Path, library: Callable[..., Path], dtype: str) -> None:
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        modules = [Transformer(str(bare)), Pooling(HIDDEN, "mean"), Dense(HIDDEN, 6), Normalize()]
    encoder = build(library(modules), dtype=dtype)
    assert encoder.dimensions == 6
    dense = encoder._model[2]
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    plain = Plain(bare, "mean", getattr(torch, dtype))
    pooled = torch.tensor(plain.pooled(plain.pieces("the cat", 64)[0]), dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(dense.linear(pooled).tanh(), dim=0)
    alike(encoder.encode(["the cat"])[0][0], expected.double().numpy(), 1e-6)


def test_default_prompt_and_shortened_vectors(bare: Path, library: Callable[..., Path]) -> None:
    from sentence_transformers.models import Pooling, Transformer

    modules = [Transformer(str(bare)), Pooling(HIDDEN, "mean")]
    settings = {"prompts": {"same": "the dog says "}, "default_prompt_name": "same"}
    encoder = build(library(modules, **settings))
    alike(encoder.encode(["cat", " "])[0][0], Plain(bare, "mean").vector("the dog says cat", 64))
    assert not encoder.encode([" "])[0].any()
    encoder._model.truncate_dim = 5
    encoder.dimensions = 5
    expected = encoder._model.encode(["cat", "dog"], normalize_embeddings=True)
    alike(encoder.encode(["cat", "dog"])[0], expected)


def test_padding_on_the_left(tmp_path: Path) -> None:
    folder = write_bare(tmp_path / "left", padding_side="left")
    encoder = build(folder)
    assert encoder._tokenizer.padding_side == "left"
    texts = ["dog", "the cat says meow", "a b c d e f g"]
    expected = encoder._model.encode(texts, normalize_embeddings=True, batch_size=3)
    alike(encoder.encode(texts)[0], expected)


def test_limits(published: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sentence_encoder, "say", said.append)
    for folder, limit in ((published, 48), (bare, POSITIONS)):
        shapes = watch(encoder := build(folder))
        assert said.pop().endswith(f"reads {limit} tokens of a text, fewer than embed.max_length")
        assert encoder.encode([" ".join(["a"] * (limit - 2)), "b " * (limit - 1)])[1].tolist() == [
            False, True,
        ]  # fmt: skip
        assert shapes == [(2, limit)]
    build(bare, max_length=POSITIONS)
    assert not said


@pytest.mark.parametrize("long_texts", ["truncate", "mean"])
def test_odd_texts(published: Path, long_texts: str) -> None:
    encoder = build(published, long_texts=long_texts, max_length=16)
    vectors, long = encoder.encode(ODD)
    assert vectors.shape[0] == len(long) == len(ODD)
    lengths = np.linalg.norm(vectors, axis=1)
    assert ((abs(lengths - 1) < 1e-5) | (lengths == 0)).all()
    assert lengths[-1] == pytest.approx(1, abs=1e-5)
    assert long[-1]


def test_numbers_that_are_not_finite_are_passed_on(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build(published)
    broken = np.array([[np.nan] * HIDDEN, [1e25] * HIDDEN, [np.inf, *[1.0] * (HIDDEN - 1)]])
    monkeypatch.setattr(encoder, "_forward", lambda pieces: broken[: len(pieces)])
    vectors = encoder.encode(["dog", "cat", "a"])[0]
    assert np.isfinite(vectors).all(axis=1).tolist() == [False, True, False]
    assert np.linalg.norm(vectors[1]) == pytest.approx(1)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no usable encoder"):
        build(tmp_path / "empty")
    torn = write_bare(tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="holds no usable encoder"):
        build(torn)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EnvironmentProblem, match="pip install sentence-transformers"):
        build_encoder(EmbedConfig(encoder="some/encoder"))


def test_models_that_cannot_do_it(library: Callable[..., Path]) -> None:
    from sentence_transformers.models import StaticEmbedding

    core = wordpiece().backend_tokenizer
    folder = library([StaticEmbedding(core, embedding_dim=8)])
    with pytest.raises(DataError, match="no text encoder with a transformers tokenizer"):
        build(folder)
    with pytest.raises(ConfigError, match=r"embed\.pooling: x has no pooling layer"):
        sentence_encoder._set_pooling(torch.nn.Sequential(torch.nn.Identity()), "cls", "x")
