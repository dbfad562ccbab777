"""Which program works on what: host tables for attention over a packed forest.

Rows are cut into tiles of equal length, wherever the branchings fall. Two facts of the depth-first
order make that enough:

- A key left of row `first` that some query of the tile [first, last) sees is an ancestor of row
  `first`. So a query tile reads the path from `first` up to the root, which is a chain of a few
  intervals of rows, and itself. A stretch whose subtree reaches to `last` is seen by every query
  of the tile and needs no mask.
- The queries that see key j are [j, subtree_end[j]). So a key tile reads one interval of queries,
  which starts at its own first row.

All tables are int32, made by vectorised NumPy once per batch and moved to the device in one copy.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scmini_kernels._radix import Runs
from scmini_kernels.tree import PrefixTree

IntArray: TypeAlias = NDArray[np.int64]


class TileShape(NamedTuple):
    """Rows per tile, and how finely long query ranges are cut.

    Attributes:
        queries: positions per query tile (a tile holds all heads of a group at each of them).
        gradient_queries: the same, for the gradient of the queries.
        keys: keys per key tile.
        step: positions of queries that a key tile takes at a time; pieces are multiples of it.
        pieces: into about how many pieces of equal work the key tiles of one head are cut.
        min_piece: positions of queries below which nothing is cut.
    """

    queries: int
    gradient_queries: int
    keys: int
    step: int
    pieces: int
    min_piece: int


class AttentionTiles(NamedTuple):
    """Tables of one forest, int32, views of one buffer; every table starts on 16 bytes.

    Attributes:
        ends: (T,) subtree_end.
        positions: (T,) position_ids.
        nodes: (N + 1, 4) lo, hi, end, next: a chain of intervals of keys. Node n + 1 holds the
            path of the last row of run n up to the first row that does not lie directly left of
            it; it is visible whole to the queries before `end`; the path goes on at node `next`.
            Node 0 is empty and ends every path.
        query_tiles: (tiles, 5) first, last, lo, bound, node: queries [first, last), whose keys are
            [lo, last), needing no mask before `bound`, and the path from `node` on. Longest work
            first.
        gradient_tiles: the same, cut for the gradient of the queries.
        key_pieces: (pieces, 6) first, last, begin, steady, stop, slot: keys [first, last) against
            the queries [begin, stop), needing no mask from `steady` on. A piece with slot >= 0 is
            one of several of its tile and writes its part to that slot. Longest work first.
        split_tiles: (split tiles, 4) first, last, slot, count: keys whose gradient is the sum of
            `count` slots.
        num_slots: slots in all.
    """

    ends: Tensor
    positions: Tensor
    nodes: Tensor
    query_tiles: Tensor
    gradient_tiles: Tensor
    key_pieces: Tensor
    split_tiles: Tensor
    num_slots: int


def attention_tiles(tree: PrefixTree, shape: TileShape, window: int | None) -> AttentionTiles:
    """The tables of `tree` on its device, kept in `tree.cache` for all layers."""
    key = ("attention tiles", shape, window)
    if key not in tree.cache:
        tree.cache[key] = _build(tree.runs, shape, window, tree.device)
    tiles: AttentionTiles = tree.cache[key]
    return tiles


def _build(
    runs: Runs, shape: TileShape, window: int | None, device: torch.device
) -> AttentionTiles:
    lengths = runs.ends - runs.starts
    depths = first_depths(runs)
    positions = np.arange(runs.ends[-1]) + np.repeat(depths - runs.starts, lengths)
    pieces, split = key_pieces(runs, depths, shape, window)
    tables = {
        "ends": np.repeat(runs.subtree_ends, lengths),
        "positions": positions,
        "nodes": path_nodes(runs),
        "query_tiles": query_tiles(runs, positions, shape.queries, window),
        "gradient_tiles": query_tiles(runs, positions, shape.gradient_queries, window),
        "key_pieces": pieces,
        "split_tiles": split,
    }
    sizes = [-(-table.size // 4) * 4 for table in tables.values()]
    offsets = dict(zip(tables, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    buffer = np.zeros(sum(sizes), dtype=np.int32)
    for name, table in tables.items():
        buffer[offsets[name] : offsets[name] + table.size] = table.ravel()
    on_device = torch.from_numpy(buffer).to(device)
    views = {
        name: on_device[offsets[name] : offsets[name] + table.size].view(table.shape)
        for name, table in tables.items()
    }
    return AttentionTiles(**views, num_slots=int(split[:, 3].sum()))


def first_depths(runs: Runs) -> IntArray:
    """(N,) position of the first row of each run: the lengths of its ancestors together.

    By pointer doubling: as many rounds as the logarithm of the number of nested runs.
    """
    lengths = runs.ends - runs.starts
    up = runs.parents
    depths = np.where(up >= 0, lengths[up], 0)
    while (up >= 0).any():
        depths = depths + np.where(up >= 0, depths[up], 0)
        up = np.where(up >= 0, up[up], -1)
    return depths


def _chain_heads(runs: Runs) -> IntArray:
    """(N,) for each run the highest ancestor that it reaches through first children alone.

    A first child's rows follow its parent's, so such a chain is one interval of rows.
    """
    numbers = np.arange(len(runs.starts))
    return np.maximum.accumulate(np.where(runs.parents == numbers - 1, 0, numbers))


def path_nodes(runs: Runs) -> IntArray:
    """(N + 1, 4): see `AttentionTiles.nodes`."""
    heads = _chain_heads(runs)
    nodes = np.zeros((len(heads) + 1, 4), dtype=np.int64)
    nodes[1:, 0] = runs.starts[heads]
    nodes[1:, 1] = runs.ends
    nodes[1:, 2] = runs.subtree_ends
    nodes[1:, 3] = runs.parents[heads] + 1
    return nodes


def query_tiles(runs: Runs, positions: IntArray, queries: int, window: int | None) -> IntArray:
    """(tiles, 5): see `AttentionTiles.query_tiles`. positions: (T,)."""
    first = np.arange(0, len(positions), queries)
    last = np.minimum(first + queries, len(positions))
    run = np.searchsorted(runs.starts, first, side="right") - 1
    heads = _chain_heads(runs)[run]
    lo = runs.starts[heads]
    # The keys left of `first` in this interval belong to its run, or to the runs above.
    own = np.where(first > runs.starts[run], run, np.maximum(runs.parents[run], 0))
    bound = np.where((lo < first) & (runs.subtree_ends[own] >= last), first, lo)
    table = np.stack((first, last, lo, bound, runs.parents[heads] + 1), axis=1)
    work = positions[first] + (last - first)
    if window is not None:
        work = np.minimum(work, window + queries)
    return table[np.argsort(-work, kind="stable")]


def key_pieces(
    runs: Runs, depths: IntArray, shape: TileShape, window: int | None
) -> tuple[IntArray, IntArray]:
    """(pieces, 6) and (split tiles, 4): see `AttentionTiles`. depths: (N,) from `first_depths`."""
    total = int(runs.ends[-1])
    first = np.arange(0, total, shape.keys)
    last = np.minimum(first + shape.keys, total)
    run = np.searchsorted(runs.starts, first, side="right") - 1
    last_run = np.searchsorted(runs.starts, last, side="left") - 1
    stop = np.maximum.reduceat(runs.subtree_ends, run)
    stop[:-1] = np.maximum(stop[:-1], runs.subtree_ends[last_run[:-1]])
    alone = run == last_run
    steady = np.where(alone, last, stop)
    if window is not None:
        # The last key's window ends in its own run, or reaches into the runs below.
        inside = alone & (last - 1 + window <= runs.ends[run])
        stop = np.where(inside, last - 1 + window, stop)
        steady = stop
    piece = max(shape.min_piece, -(-int((stop - first).sum()) // shape.pieces))
    piece = -(-piece // shape.step) * shape.step
    counts = -(-(stop - first) // piece)
    # Pieces of one tile are equal, not all full but one.
    pieces = -(-(stop - first) // counts)
    pieces = -(-pieces // shape.step) * shape.step
    counts = -(-(stop - first) // pieces)

    tile = np.repeat(np.arange(len(first)), counts)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = first[tile] + number * pieces[tile]
    piece_stop = np.minimum(begin + pieces[tile], stop[tile])
    is_split = counts[tile] > 1
    slot = np.where(is_split, np.cumsum(is_split) - 1, -1)
    table = np.stack(
        (
            first[tile],
            last[tile],
            begin,
            np.clip(steady[tile], begin, piece_stop),
            piece_stop,
            slot,
        ),
        axis=1,
    )
    longest_first = np.argsort(begin - piece_stop, kind="stable")
    split = np.flatnonzero(counts > 1)
    slots = np.cumsum(counts[split]) - counts[split]
    return table[longest_first], np.stack((first[split], last[split], slots, counts[split]), axis=1)
