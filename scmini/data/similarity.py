"""Cosines between embeddings, exact, by FAISS, from float16 vectors as they are stored.

Vectors are widened to float32 a block at a time, small enough that lengths and dot products find
it in the cache: that is what makes it faster than one einsum over everything. FAISS takes one row
after another in the same way, so equal vectors have equal cosines wherever they stand.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""Equal vectors are alike at any threshold: their cosine may come out as 0.9999999."""
_BLOCK = 1 << 18
"""Most float32 numbers (1 MiB) that are worked on at once."""
_NARROWEST = 16
"""Vectors of fewer dimensions get zeros: for those FAISS has ways that depend on a row's place."""


class NotFinite(ValueError):
    """A vector has an infinite component or one that is no number; `row` says which vector."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite")
        self.row = row


def cosines(groups: Sequence[int], vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """Cosine of each group's first vector with each of its others, in [-1, 1].

    Args:
        groups: number of rows (at least 1) of each group; they follow one another in `vectors`.
        vectors: [rows, dimensions] of any length; a zero vector has cosine 0 with all.

    Returns:
        [rows - len(groups)] in the order of the rows.

    Raises:
        NotFinite: of the first such row.
    """
    import torch

    faiss = _faiss()
    dimensions = vectors.shape[1]
    width = max(dimensions, _NARROWEST)
    blocks = list(_blocks(groups, max(1, _BLOCK // width)))
    size = max((sum(block) for block in blocks), default=0)
    wide = np.zeros((size, width), np.float32)
    squares, dots = np.empty(size, np.float32), np.empty(size, np.float32)
    found = np.empty(len(vectors) - len(groups), np.float32)
    at, row, done = faiss.swig_ptr, 0, 0
    for block in blocks:
        rows = sum(block)
        stored = vectors[row : row + rows]
        # numpy widens float16 one by one; of a file in memory torch may only have a copy
        given = torch.from_numpy(stored if stored.flags.writeable else stored.copy())
        torch.from_numpy(wide)[:rows, :dimensions].copy_(given)
        faiss.fvec_norms_L2sqr(at(squares), at(wide), width, rows)
        if not np.isfinite(squares[:rows]).all():
            raise NotFinite(row + int(np.argmin(np.isfinite(squares[:rows]))))
        lengths = np.sqrt(squares[:rows])
        lengths[lengths == 0] = 1
        start = 0
        for number in block:
            first, end = start + 1, start + number
            if number > 1:
                target, others = at(wide[start]), at(wide[first:end])
                faiss.fvec_inner_products_ny(at(dots[first:end]), target, others, width, number - 1)
            found[done : done + number - 1] = dots[first:end] / (
                lengths[start] * lengths[first:end]
            )
            done, start = done + number - 1, end
        row += rows
    return np.clip(found, -1, 1, out=found)


def group_similarity(groups: Sequence[int], vectors: NDArray[np.float16]) -> list[list[float]]:
    """`cosines`, a list for each group."""
    flat, found, start = cosines(groups, vectors).tolist(), [], 0
    for rows in groups:
        found.append(flat[start : start + rows - 1])
        start += rows - 1
    return found


def first_of_alike(vectors: NDArray[np.float16], rows: Sequence[int], least: float) -> list[int]:
    """Those of `rows` that are not alike to an earlier one that stays.

    Args:
        vectors: [all rows, dimensions], finite, of any length; a zero vector is alike to none.
        rows: those to look at, in order.
        least: the cosine (above 0) from which on two vectors are alike.
    """
    faiss = _faiss()
    wide = vectors[list(rows)].astype(np.float32)
    faiss.normalize_L2(wide)
    at, count = faiss.swig_ptr, 0
    values = np.empty(len(wide), np.float32)
    kept = []
    for row, vector in zip(rows, wide, strict=True):
        if count:
            faiss.fvec_inner_products_ny(at(values), at(vector), at(wide), wide.shape[1], count)
        if not (values[:count] >= least * (1 - ROUNDING)).any():
            wide[count] = vector  # those that stay come to stand side by side
            kept.append(row)
            count += 1
    return kept


def _faiss() -> Any:
    """FAISS; its type stubs leave out the functions on single vectors."""
    import faiss

    return faiss


def _blocks(groups: Sequence[int], most: int) -> Iterator[list[int]]:
    """Whole groups, one after another, of at most so many rows together unless one has more."""
    block: list[int] = []
    rows = 0
    for number in groups:
        if block and rows + number > most:
            yield block
            block, rows = [], 0
        block.append(number)
        rows += number
    if block:
        yield block
