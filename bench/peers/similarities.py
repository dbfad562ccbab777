"""Cosine of every answer with its own target: scmini's way, and what people write otherwise.

The vectors are synthetic: a random unit target, and answers that are each a given share of it and
for the rest noise, stored in float16 as the stage `embed` stores them. Answers of one prompt have
cosines from 0.3 to 0.95, those of different prompts about 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peers.names import OURS, PLAIN
from scmini.data.similarity import cosines
from scmini.sections import SampleConfig

SHARD_PROMPTS = SampleConfig().shard_size
TOGETHER = 8
"""Prompts in a block, where work goes block by block: 1 MiB in float32 stays in the cache."""
_NOISE_ROWS = 4099

Vectors = NDArray[np.float16]
"""[prompts, 1 + answers, dimensions]; row 0 of a prompt is its target."""
Cosines = NDArray[np.float32]
"""[prompts, answers]."""


@dataclass(frozen=True)
class Size:
    prompts: int
    answers: int = 32
    dimensions: int = 1024

    @property
    def dots(self) -> int:
        return self.prompts * self.answers

    @property
    def bytes(self) -> int:
        """Of the float16 vectors."""
        return 2 * self.prompts * (1 + self.answers) * self.dimensions


def blocks(size: Size, seed: int = 0) -> Iterator[Vectors]:
    """The vectors, so many prompts at a time as a shard has; the last block may be shorter.

    Noise is a window of one random table at a random place, with random signs: drawing all of it
    anew would take longer than what is measured.
    """
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((_NOISE_ROWS, size.dimensions), dtype=np.float32)
    for start in range(0, size.prompts, SHARD_PROMPTS):
        count = min(SHARD_PROMPTS, size.prompts - start)
        targets = rng.standard_normal((count, 1, size.dimensions), dtype=np.float32)
        targets /= np.linalg.norm(targets, axis=-1, keepdims=True)
        picked = rng.integers(_NOISE_ROWS, size=(count, size.answers))
        signs = rng.integers(2, size=size.dimensions).astype(np.float32) * 2 - 1
        noise = np.roll(table, rng.integers(size.dimensions), axis=1)[picked] * signs
        noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
        share = rng.uniform(0.3, 0.95, size=(count, size.answers, 1)).astype(np.float32)
        answers = share * targets + np.sqrt(1 - share**2) * noise
        answers /= np.linalg.norm(answers, axis=-1, keepdims=True)
        yield np.concatenate([targets, answers], axis=1).astype(np.float16)


def truth(vectors: Vectors) -> NDArray[np.float64]:
    """In float64, prompt by prompt."""
    found = np.empty((len(vectors), vectors.shape[1] - 1))
    for number, prompt in enumerate(vectors):
        exact = prompt.astype(np.float64)
        lengths = np.linalg.norm(exact, axis=1)
        found[number] = exact[1:] @ exact[0] / (lengths[1:] * lengths[0])
    return found


def ours(vectors: Vectors) -> Cosines:
    """What the stage `filter` calls for each shard."""
    _, rows, dimensions = vectors.shape
    found = [
        cosines([rows] * len(shard), shard.reshape(-1, dimensions)).reshape(len(shard), -1)
        for shard in _parts(vectors, SHARD_PROMPTS)
    ]
    return np.concatenate(found)


def numpy_einsum(vectors: Vectors) -> Cosines:
    """All at once: as much memory again twice over, in float32."""
    block = vectors.astype(np.float32)
    lengths = np.linalg.norm(block, axis=-1)
    return np.einsum("pd,pnd->pn", block[:, 0], block[:, 1:]) / (lengths[:, :1] * lengths[:, 1:])


def numpy_blocks(vectors: Vectors) -> Cosines:
    """The same for a few prompts at a time."""
    return np.concatenate([_einsum_of_block(part) for part in _parts(vectors, TOGETHER)])


def _parts(vectors: Vectors, prompts: int) -> Iterator[Vectors]:
    for start in range(0, len(vectors), prompts):
        yield vectors[start : start + prompts]


def _einsum_of_block(vectors: Vectors) -> Cosines:
    block = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("pnd,pnd->pn", block, block))
    return np.einsum("pd,pnd->pn", block[:, 0], block[:, 1:]) / (lengths[:, :1] * lengths[:, 1:])


def torch_einsum(vectors: Vectors) -> Cosines:
    block = torch.nn.functional.normalize(torch.from_numpy(vectors).float(), dim=-1)
    return torch.einsum("pd,pnd->pn", block[:, 0], block[:, 1:]).numpy()


def torch_blocks(vectors: Vectors) -> Cosines:
    return np.concatenate([torch_einsum(part) for part in _parts(vectors, TOGETHER)])


def original(vectors: Vectors) -> Cosines:
    """The original's: prompt by prompt `cosine_similarity` in float32, all vectors gathered."""
    gathered, found = [], []
    for prompt in vectors:
        encoded = torch.from_numpy(prompt).float()
        gathered.append(encoded)
        found.append(torch.cosine_similarity(encoded[:1], encoded[1:]))
    everything = torch.stack(gathered)
    assert everything.dtype == torch.float32
    return torch.stack(found).numpy()


def one_index(vectors: Vectors) -> Cosines:
    """One index of all answers, searched for each target's nearest; then only its own count.

    The answers to other prompts are computed, too, and an answer that is not among the nearest has
    no similarity (NaN). Here all are: what belongs together is closer than what does not.
    """
    index, block = _index(vectors)
    prompts, answers = len(vectors), vectors.shape[1] - 1
    cosines, labels = index.search(np.ascontiguousarray(block[:, 0]), answers)
    found = np.full((prompts, answers), np.nan, np.float32)
    rows, columns = np.nonzero(labels // answers == np.arange(prompts)[:, None])
    found[rows, labels[rows, columns] % answers] = cosines[rows, columns]
    return found


def one_index_by_range(vectors: Vectors) -> Cosines:
    """The same index, each search restricted to the prompt's own answers."""
    import faiss

    index, block = _index(vectors)
    answers = vectors.shape[1] - 1
    found = np.empty((len(vectors), answers), np.float32)
    for number in range(len(vectors)):
        start = number * answers
        own = faiss.SearchParameters(sel=faiss.IDSelectorRange(start, start + answers))
        cosines, labels = index.search(block[number, :1], answers, params=own)
        found[number, labels[0] - start] = cosines[0]
    return found


def _index(vectors: Vectors) -> tuple[Any, NDArray[np.float32]]:
    import faiss

    block = vectors.astype(np.float32)
    faiss.normalize_L2(block.reshape(-1, block.shape[2]))
    index: Any = faiss.IndexFlatIP(block.shape[2])
    index.add(block[:, 1:].reshape(-1, block.shape[2]))
    return index, block


FROM_FLOAT16: dict[str, Callable[[Vectors], Cosines]] = {
    OURS: ours,
    PLAIN: numpy_einsum,
    "numpy einsum, block by block": numpy_blocks,
    "torch einsum": torch_einsum,
    "torch einsum, block by block": torch_blocks,
    "the original's, prompt by prompt": original,
    "one FAISS index, own answers only": one_index_by_range,
    "one FAISS index, search among all": one_index,
}
"""From float16 vectors in memory, conversion and lengths included."""
SLOW = "one FAISS index, search among all"
"""Its work grows with the square of the prompts: it is measured once."""


def unit_float32(vectors: Vectors) -> NDArray[np.float32]:
    """What `FROM_FLOAT32` start from."""
    block = vectors.astype(np.float32)
    return block / np.linalg.norm(block, axis=-1, keepdims=True)


def bare_numpy(block: NDArray[np.float32]) -> Cosines:
    return np.einsum("pd,pnd->pn", block[:, 0], block[:, 1:])


def bare_torch(block: NDArray[np.float32]) -> Cosines:
    vectors = torch.from_numpy(block)
    return torch.einsum("pd,pnd->pn", vectors[:, 0], vectors[:, 1:]).numpy()


FROM_FLOAT32: dict[str, Callable[[NDArray[np.float32]], Cosines]] = {
    "numpy einsum": bare_numpy,
    "torch einsum": bare_torch,
}
"""The products alone, of unit vectors that are there in float32: what nobody who stores 16 bits
has, and so a bound."""
