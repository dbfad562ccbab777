"""Tile tables of tree attention: every pair that the mask allows is visited exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from scmini_kernels import PrefixTree
from scmini_kernels.triton.tiles import TileShape, attention_tiles, first_depths
from tests.kernels.forests import pair_forests
from tests.kernels.test_tree_attention import FORESTS, branching

SHAPES = [
    TileShape(queries=1, gradient_queries=3, keys=4, step=1, pieces=50, min_piece=1),
    TileShape(queries=5, gradient_queries=8, keys=16, step=3, pieces=20, min_piece=2),
    TileShape(queries=64, gradient_queries=64, keys=64, step=16, pieces=1, min_piece=512),
]
WINDOWS = (None, 1, 3, 8)
TRIES = {
    **FORESTS,
    "one token": [[[3]]],
    "many tiny": [[[n]] for n in range(70)],
    "giant": [branching(150, (60, 2, 1, 33))],
    # Every other token branches: runs of one token, 40 of them nested.
    "comb": [[[*range(n), 99 + n] for n in range(1, 41)]],
    "reversed comb": [[[*range(n), 99 + n] for n in range(40, 0, -1)]],
}


def allowed_pairs(tree, window):
    mask = tree.reference_mask().numpy()
    if window is not None:
        positions = tree.position_ids.numpy()
        mask = mask & (positions[:, None] - positions[None, :] < window)
    return mask.astype(np.int64)


def visible_pairs(tiles, queries, keys, window):
    """The kernels' mask, for ranges of rows."""
    ends, positions = tiles.ends.numpy(), tiles.positions.numpy()
    i, j = np.arange(*queries)[:, None], np.arange(*keys)[None, :]
    seen = (j <= i) & (i < ends[j])
    return seen if window is None else seen & (positions[i] - positions[j] < window)


def pairs_of_query_tiles(tiles, table, block, window, total):
    """How often the forward kernel adds each (query, key), walking as it does."""
    count = np.zeros((total, total), dtype=np.int64)
    nodes, positions = tiles.nodes.numpy(), tiles.positions.numpy()
    for first, last, lo, bound, node in table.tolist():
        hi = last
        oldest = 0 if window is None else positions[first:last].min() - window + 1
        while lo < hi:
            steady = lo + (bound - lo) // block * block
            if window is not None:
                hidden = max(oldest - positions[lo], 0)
                lo += hidden
                steady, node = lo, 0 if hidden else node
            assert lo <= steady <= hi
            count[first:last, lo:steady] += 1
            count[first:last, steady:hi] += visible_pairs(
                tiles, (first, last), (steady, hi), window
            )
            lo, hi, end, following = nodes[node].tolist()
            bound, node = (hi if end >= last else lo), following
    return count


def pairs_of_key_pieces(tiles, shape, window, total):
    """How often the key gradient kernel adds each (query, key), walking as it does."""
    count = np.zeros((total, total), dtype=np.int64)
    ends, positions = tiles.ends.numpy(), tiles.positions.numpy()
    for first, last, begin, steady, stop, _ in tiles.key_pieces.tolist():
        if window is None:
            steady = stop - (stop - steady) // shape.step * shape.step
            count[begin:steady, first:last] += visible_pairs(
                tiles, (begin, steady), (first, last), None
            )
            count[steady:stop, first:last] += 1
            continue
        horizon = positions[first:last].max() + window
        while begin < stop:
            reach = max(horizon - positions[begin], 0)
            seen = min(begin + reach, stop)
            count[begin:seen, first:last] += visible_pairs(
                tiles, (begin, seen), (first, last), window
            )
            begin = seen if reach else ends[begin]
    return count


def assert_every_pair_once(tree, shape, window):
    tiles = attention_tiles(tree, shape, window)
    expected = allowed_pairs(tree, window)
    total = tree.num_tokens
    for table in (tiles.query_tiles, tiles.gradient_tiles):
        for block in (1, 4, 16):
            got = pairs_of_query_tiles(tiles, table, block, window, total)
            np.testing.assert_array_equal(got, expected)
        assert sorted(i for a, b, *_ in table.tolist() for i in range(a, b)) == list(range(total))
    np.testing.assert_array_equal(pairs_of_key_pieces(tiles, shape, window, total), expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.queries} queries")
@pytest.mark.parametrize("groups", TRIES.values(), ids=TRIES)
def test_every_allowed_pair_is_visited_once(groups, shape, window):
    assert_every_pair_once(PrefixTree.pack(groups), shape, window)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pair_forests())
def test_every_allowed_pair_is_visited_once_in_any_forest(groups):
    tree = PrefixTree.pack(groups)
    for shape in SHAPES:
        for window in (None, 2):
            assert_every_pair_once(tree, shape, window)


@pytest.mark.parametrize("groups", TRIES.values(), ids=TRIES)
def test_row_tables_are_those_of_the_tree(groups):
    tree = PrefixTree.pack(groups)
    tiles = attention_tiles(tree, SHAPES[0], None)
    assert torch.equal(tiles.ends.long(), tree.subtree_end)
    assert torch.equal(tiles.positions.long(), tree.position_ids)
    assert first_depths(tree.runs).tolist() == tree.position_ids[tree.runs.starts].tolist()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.queries} queries")
def test_pieces_of_a_tile_have_slots_of_their_own_in_order(shape, window):
    tree = PrefixTree.pack(TRIES["giant"])
    tiles = attention_tiles(tree, shape, window)
    parts = {}
    for first, last, begin, _, stop, slot in tiles.key_pieces.tolist():
        assert begin < stop
        parts.setdefault((first, last), []).append((begin, stop, slot))
    split = {(a, b): list(range(slot, slot + n)) for a, b, slot, n in tiles.split_tiles.tolist()}
    for tile, pieces in parts.items():
        pieces.sort()
        assert [slot for *_, slot in pieces] == split.get(tile, [-1])
        assert all((b - a) % shape.step == 0 for a, b, _ in pieces[:-1])
    assert sum(map(len, split.values())) == tiles.num_slots
    assert (shape.pieces > 1) == (tiles.num_slots > 0)


def test_longest_work_first():
    tiles = attention_tiles(PrefixTree.pack(TRIES["giant"]), SHAPES[1], None)
    begin, stop = tiles.key_pieces[:, 2], tiles.key_pieces[:, 4]
    assert torch.all((stop - begin).diff() <= 0)
    depth = tiles.positions[tiles.query_tiles[:, 0].long()]
    assert torch.all(depth[:-1] >= depth[1:] - SHAPES[1].queries)


def test_prompt_of_many_responses_needs_no_mask():
    """What makes the tables worth it: whole blocks of the prompt, and few programs."""
    tree = PrefixTree.pack([branching(64, (48,) * 4)])
    shape = TileShape(16, 16, 16, 4, pieces=1, min_piece=512)
    tiles = attention_tiles(tree, shape, None)
    assert len(tiles.query_tiles) == tree.num_tokens // 16
    for first, _, lo, bound, node in tiles.query_tiles.tolist():
        start = 0 if first < 112 else 64 + (first - 64) // 48 * 48  # the first response is joined
        assert (lo, bound) == (start, first)
        assert tiles.nodes[node].tolist()[:2] == ([0, 0] if first < 112 else [0, 64])
    for first, last, begin, steady, stop, _ in tiles.key_pieces.tolist():
        end = tree.num_tokens if first < 64 else 64 + ((first - 64) // 48 + 1) * 48
        assert (begin, steady, stop) == (first, last, end)


def test_tables_are_made_once_per_shape_and_window_and_are_aligned():
    tree = PrefixTree.pack(TRIES["mixed"])
    tiles = attention_tiles(tree, SHAPES[0], None)
    assert attention_tiles(tree, SHAPES[0], None) is tiles
    assert attention_tiles(tree, SHAPES[1], None) is not tiles
    assert attention_tiles(tree, SHAPES[0], 3) is not tiles
    for table in tiles[:-1]:
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        assert table.storage_offset() % 4 == 0
    assert len({table.untyped_storage().data_ptr() for table in tiles[:-1]}) == 1
