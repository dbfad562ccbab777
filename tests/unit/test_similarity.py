"""Cosines and near-duplicates: against plain ones, and the same for the same vectors."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini.data.similarity import NotFinite, cosines, first_of_alike, group_similarity


def plain_cosines(groups: list[int], vectors: Any) -> list[float]:
    """One after another, in float64."""
    found, start = [], 0
    for rows in groups:
        target, *others = vectors[start : start + rows].astype(np.float64)
        for other in others:
            lengths = np.linalg.norm(target) * np.linalg.norm(other)
            found.append(float(target @ other / lengths) if lengths else 0.0)
        start += rows
    return found


@pytest.mark.filterwarnings("error")  # torch's, about arrays that are read-only
@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(1, 40), max_size=12),
    dimensions=st.sampled_from([1, 3, 4, 8, 12, 24, 257, 1024]),
    seed=st.integers(0, 99),
)
def test_cosines_equal_the_plain_ones(groups: list[int], dimensions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(sum(groups), dimensions)).astype(np.float16)
    vectors[rng.random(len(vectors)) < 0.1] = 0
    vectors.flags.writeable = bool(seed % 2)  # as those of a file in memory are
    found = cosines(groups, vectors)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(plain_cosines(groups, vectors), abs=1e-6)
    assert list(chain(*group_similarity(groups, vectors))) == found.tolist()
    assert [len(values) + 1 for values in group_similarity(groups, vectors)] == groups


def test_a_group_larger_than_a_block() -> None:
    vectors = np.random.default_rng(0).normal(size=(705, 1024)).astype(np.float16)
    groups = [2, 700, 3]
    assert cosines(groups, vectors).tolist() == pytest.approx(
        plain_cosines(groups, vectors), abs=1e-6
    )
    assert group_similarity([1, 1], vectors[:2]) == [[], []]


@pytest.mark.parametrize("dimensions", [4, 5, 12, 24, 384, 1023, 1024])
def test_equal_vectors_have_equal_cosines_wherever_they_stand(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    target, answer = rng.normal(size=(2, dimensions)).astype(np.float16)
    groups = rng.integers(2, 50, size=30).tolist()
    vectors = rng.normal(size=(sum(groups), dimensions)).astype(np.float16)
    marked = rng.random(len(vectors)) < 0.5
    vectors[marked] = answer
    starts = np.cumsum([0, *groups[:-1]])
    vectors[starts] = target
    marked[starts] = False
    others = np.delete(np.arange(len(vectors)), starts)
    same = cosines(groups, vectors)[marked[others]]
    assert len(same) > 100
    assert len(set(same.tolist())) == 1


def test_no_cosine_is_above_one() -> None:
    """Rounding may take that of equal vectors there, and a limit of 1 would then drop them."""
    vectors = np.random.default_rng(1).normal(size=(500, 99)).astype(np.float16)
    found = cosines([2] * 500, np.repeat(vectors, 2, axis=0))
    assert found.max() == 1
    assert found.min() > 1 - 1e-6
    opposite = np.stack([vectors, -vectors], axis=1).reshape(1000, 99)
    assert cosines([2] * 500, opposite).min() == -1


def test_a_vector_that_is_not_finite_is_named() -> None:
    for value in (np.nan, np.inf, -np.inf):
        for row in (0, 4, 6):
            vectors = np.ones((7, 8), np.float16)
            vectors[row, 3] = value
            vectors[row + 1 :] = value
            with pytest.raises(NotFinite) as caught:
                cosines([4, 3], vectors)
            assert caught.value.row == row
    vectors = np.ones((900, 1024), np.float16)  # several blocks
    vectors[777, 0] = np.nan
    with pytest.raises(NotFinite, match="row 777 is not finite"):
        cosines([9] * 100, vectors)


def test_near_duplicates_go_in_the_order_of_generation() -> None:
    angles = np.radians([0, 20, 40, 41, 90, 0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    limit = float(np.cos(np.radians(25)))
    # 20 is too near to 0; 40 is only near to 20, which is gone; 41 is near to 40
    assert first_of_alike(vectors, range(6), limit) == [0, 2, 4]
    assert first_of_alike(vectors, [5, 3, 2], limit) == [5, 3]
    assert first_of_alike(vectors, range(6), 1.0) == [0, 1, 2, 3, 4]
    assert first_of_alike(vectors, [], 0.5) == []
    assert first_of_alike(np.zeros((3, 4), np.float16), range(3), 1e-9) == [0, 1, 2]


def test_equal_vectors_are_alike_at_any_threshold() -> None:
    """Their cosine may be 0.9999999 in float32."""
    vectors = np.random.default_rng(3).normal(size=(200, 99)).astype(np.float16)
    assert first_of_alike(np.repeat(vectors, 2, axis=0), range(400), 1.0) == list(range(0, 400, 2))
