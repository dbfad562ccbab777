"""Cutting an optimizer step into micro-batches."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import response_groups, text_groups

from scmini.training.batches import Group, Microbatch, cut
from scmini_kernels import PrefixTree


def _sequences(batches: list[Microbatch]) -> list[object]:
    """Every sequence in the order in which it is computed."""
    found: list[object] = []
    for batch in batches:
        for group in batch.groups:
            for start, stop in batch.parts or [(0, len(group.sequences))]:
                found += group.sequences[start:stop]
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 120), st.integers(0, 5))
def test_everything_once_in_order_within_the_limit(sizes: list[int], limit: int, seed: int) -> None:
    groups = response_groups(sizes, seed)
    batches = cut(groups, limit)
    everything = [sequence for group in groups for sequence in group.sequences]
    assert [id(s) for s in _sequences(batches)] == [id(s) for s in everything]
    for batch in batches:
        if batch.parts is None:
            assert batch.tree().num_tokens <= limit
            continue
        (group,) = batch.groups
        assert group.num_tokens > limit
        for (start, stop), tree in zip(batch.parts, batch.part_trees(), strict=True):
            assert stop > start
            assert tree.num_tokens <= limit or stop - start == 1


def test_fills_up() -> None:
    groups = text_groups(8)
    total = sum(group.num_tokens for group in groups)
    assert [len(b.groups) for b in cut(groups, total)] == [8]
    batches = cut(groups, max(group.num_tokens for group in groups))
    for one, two in pairwise(batches):
        joined = sum(group.num_tokens for group in (*one.groups, two.groups[0]))
        assert joined > max(group.num_tokens for group in groups)


def test_one_long_sequence_is_not_cut() -> None:
    groups = text_groups(2)
    batches = cut(groups, 1)
    assert [b.parts for b in batches] == [None, None]


@pytest.mark.parametrize("group", [*response_groups([1, 4]), *text_groups(2)])
def test_num_tokens(group: Group) -> None:
    assert group.num_tokens == PrefixTree.pack([group.sequences]).num_tokens
    tree = PrefixTree.pack([group.sequences])
    counts = tree.sequence_edges.offsets.diff().tolist()
    assert counts == group.num_scored
