"""PrefixTree: packing against a pure-Python trie, the worked example, sums, errors."""

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from scmini_kernels import PrefixTree
from scmini_kernels.tree import ScoredSequence
from tests.kernels.forests import pair_forests, twin

PROMPT = [1, 2, 3, 4, 5, 6, 7]
EXAMPLE = [[(PROMPT, [10, 11, 12, 13]), (PROMPT, [20, 21, 22]), (PROMPT, [30, 31, 32, 33, 34])]]


def assert_is_twin(tree, groups):
    """Every array of the tree equals the twin's of the same (ids, mask) groups."""
    expected = twin(groups)
    assert tree.input_ids.tolist() == expected.input_ids
    assert tree.position_ids.tolist() == expected.position_ids
    assert tree.subtree_end.tolist() == expected.subtree_end
    edges = list(zip(tree.edge_rows.tolist(), tree.edge_targets.tolist(), strict=True))
    assert edges == expected.edges
    offsets, indices = (x.tolist() for x in tree.sequence_edges)
    per_sequence = [[edges[i] for i in indices[a:b]] for a, b in itertools.pairwise(offsets)]
    assert per_sequence == expected.sequence_edges
    offsets, indices = (x.tolist() for x in tree.edge_sequences)
    users = [indices[a:b] for a, b in itertools.pairwise(offsets)]
    assert users == [
        [s for s, used in enumerate(expected.sequence_edges) if edge in used]
        for edge in expected.edges
    ]
    assert tree.group_of_sequence.tolist() == expected.group_of_sequence
    assert list(tree.root_starts) == expected.root_starts
    assert list(tree.unbranched) == expected.unbranched
    assert tree.depth == max(expected.position_ids) + 1
    assert tree.num_tokens == len(expected.input_ids)
    assert tree.num_sequences == len(expected.group_of_sequence)
    assert tree.num_flat_tokens == sum(len(ids) for group in groups for ids, _ in group)


def assert_runs_describe(tree):
    """The runs partition the rows, are as long as can be, and say who sees whom."""
    starts, ends, subtree_ends, parents = tree.runs
    end = tree.subtree_end.numpy()
    assert starts.tolist() == [0, *(np.flatnonzero(end[1:] != end[:-1]) + 1).tolist()]
    assert ends.tolist() == [*starts[1:].tolist(), tree.num_tokens]
    assert subtree_ends.tolist() == end[starts].tolist()
    mask = np.tril(np.ones((tree.num_tokens, tree.num_tokens), dtype=bool))
    for n, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        mask[start:stop, :start] = False
        above = parents[n]
        while above >= 0:
            mask[start:stop, starts[above] : ends[above]] = True
            above = parents[above]
    assert (mask == tree.reference_mask().numpy()).all()


def masked(pair):
    prompt, response = pair
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def test_worked_example():
    tree = PrefixTree.pack(EXAMPLE)
    assert (tree.num_tokens, tree.num_flat_tokens, tree.num_sequences) == (19, 33, 3)
    assert tree.edge_rows.tolist() == [6, 7, 8, 9, 6, 11, 12, 6, 14, 15, 16, 17]
    assert tree.edge_targets.tolist() == [10, 11, 12, 13, 20, 21, 22, 30, 31, 32, 33, 34]
    assert tree.position_ids.tolist() == [*range(7), *range(7, 11), *range(7, 10), *range(7, 12)]
    assert tree.subtree_end.tolist() == [19] * 7 + [11] * 4 + [14] * 3 + [19] * 5
    assert tree.sequence_edges.offsets.tolist() == [0, 4, 7, 12]
    assert tree.sequence_edges.indices.tolist() == list(range(12))
    assert tree.root_starts == (0, 19)
    assert tree.unbranched == (False,)
    assert "num_tokens=19" in repr(tree)
    integers = [
        f for f in dataclasses.fields(tree) if isinstance(getattr(tree, f.name), torch.Tensor)
    ]
    assert {getattr(tree, f.name).dtype for f in integers} == {torch.int64}


@settings(max_examples=250, deadline=None, derandomize=True)
@given(pair_forests())
def test_pack_is_the_trie_of_its_pairs(groups):
    assert_is_twin(PrefixTree.pack(groups), [[masked(pair) for pair in group] for group in groups])
    assert_runs_describe(PrefixTree.pack(groups))
    counts = [PrefixTree.count_tokens(group) for group in groups]
    assert sum(counts) == PrefixTree.pack(groups).num_tokens


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_pack_is_the_trie_of_masked_and_plain_sequences(data):
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=8)
    groups = data.draw(st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=3))
    flags = [
        [[False, *data.draw(st.lists(st.booleans(), min_size=len(s) - 1, max_size=len(s) - 1))]
         for s in group]
        for group in groups
    ]  # fmt: skip
    pairs = [list(zip(*both, strict=True)) for both in zip(groups, flags, strict=True)]
    tree = PrefixTree.pack([[ScoredSequence(*pair) for pair in group] for group in pairs])
    assert_is_twin(tree, pairs)
    plain = [[(s, [False] + [True] * (len(s) - 1)) for s in group] for group in groups]
    assert_is_twin(PrefixTree.pack(groups), plain)


@pytest.mark.parametrize(
    "group",
    [
        [[5]],
        [[5], [5], [5]],
        [[5, 6, 7, 8], [5, 6], [5, 6, 7]],
        [[5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 6, 9]],
        [[5, 6], [7, 8], [5, 9], [7]],
        [[i] for i in range(40)],
        [list(range(3000)), [0, 1, 2]],
    ],
)
def test_corner_cases(group):
    plain = [(ids, [False] + [True] * (len(ids) - 1)) for ids in group]
    if len(group[0]) < 100:  # the twin recurses once per token
        assert_is_twin(PrefixTree.pack([group, group]), [plain, plain])
    else:
        tree = PrefixTree.pack([group])
        assert tree.input_ids.tolist() == list(range(3000))
        assert tree.subtree_end.unique().tolist() == [3000]
        assert tree.sequence_edges.indices.tolist() == [*range(2999), 0, 1]


def test_children_keep_their_order_when_a_run_is_split_late():
    tree = PrefixTree.pack([[[1, 2, 3], [9, 1], [1, 7], [1, 2, 0]]])
    assert tree.input_ids.tolist() == [1, 2, 3, 0, 7, 9, 1]
    assert tree.root_starts == (0, 5, 7)


def test_containers_of_ids_are_equivalent():
    kinds = (list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.int32))
    rows = [PrefixTree.pack([[(kind(PROMPT), kind([8, 9]))]]) for kind in kinds]
    rows += [PrefixTree.pack([[kind([*PROMPT, 8, 9])]]) for kind in kinds]
    assert all(row.input_ids.tolist() == [*PROMPT, 8, 9] for row in rows)
    # A tuple of two ids is a plain sequence, not a pair.
    assert PrefixTree.pack([[(4, 5)]]).edge_targets.tolist() == [5]


def test_the_callers_arrays_are_not_aliased():
    ids = np.arange(5)
    tree = PrefixTree.pack([[ids]])
    ids[:] = 7
    assert tree.input_ids.tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pair_forests())
def test_reference_mask_shows_each_token_exactly_its_prefix(groups):
    tree = PrefixTree.pack(groups)
    mask = tree.reference_mask()
    assert mask.dtype == torch.bool
    # What row i sees, in order, are the tokens of its path, one of each depth.
    prefixes = {tuple(tree.input_ids[seen].tolist()) for seen in mask}
    sequences = [prompt + response for group in groups for prompt, response in group]
    assert prefixes == {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    for i, seen in enumerate(mask):
        assert tree.position_ids[seen].tolist() == list(range(int(tree.position_ids[i]) + 1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pair_forests(), st.integers(0, 2**31))
def test_sequence_logps_sum_each_sequences_edges(groups, seed):
    tree = PrefixTree.pack(groups)
    generator = torch.Generator().manual_seed(seed)
    token_logps = torch.randn(len(tree.edge_rows), generator=generator, requires_grad=True)
    sums = tree.sequence_logps(token_logps)
    member = torch.zeros(tree.num_sequences, len(tree.edge_rows), dtype=torch.float64)
    for s, (a, b) in enumerate(itertools.pairwise(tree.sequence_edges.offsets.tolist())):
        member[s, tree.sequence_edges.indices[a:b]] = 1
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), member @ token_logps.detach().double())
    upstream = torch.randn(tree.num_sequences, generator=generator)
    (gradient,) = torch.autograd.grad(sums, token_logps, upstream)
    torch.testing.assert_close(gradient.double(), upstream.double() @ member)


def test_sequence_logps_dtypes_empty_responses_and_higher_derivatives():
    tree = PrefixTree.pack([[([1, 2], []), ([1, 2], [3]), ([1, 2], [3, 4])], [([5], [])]])
    token_logps = torch.tensor([-1.5, -0.25])
    assert tree.sequence_logps(token_logps).tolist() == [0, -1.5, -1.75, 0]
    assert tree.sequence_logps(token_logps.bfloat16()).dtype == torch.float32
    double = token_logps.double().requires_grad_()
    assert tree.sequence_logps(double).dtype == torch.float64
    assert torch.autograd.gradcheck(tree.sequence_logps, double)
    assert torch.autograd.gradgradcheck(lambda x: tree.sequence_logps(x).square(), double)
    nothing = PrefixTree.pack([[([1], [])]])
    assert nothing.sequence_logps(torch.empty(0)).tolist() == [0]


def test_to_keeps_the_object_on_its_own_device_and_moves_everything_elsewhere():
    tree = PrefixTree.pack(EXAMPLE)
    tree.cache["key"] = "made for the CPU"
    assert tree.to("cpu") is tree
    moved = tree.to("meta", non_blocking=True)
    assert moved.cache == {}
    assert moved.root_starts == tree.root_starts
    values = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    tensors = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    assert len(tensors) == 10
    assert all(x.device.type == "meta" for x in tensors)


def test_max_tokens_says_by_how_much():
    assert PrefixTree.pack(EXAMPLE, max_tokens=19).num_tokens == 19
    with pytest.raises(ValueError, match=r"has 19 tokens, 2 more than max_tokens=17"):
        PrefixTree.pack(EXAMPLE, max_tokens=17)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([[[1]], []], "group 1 is empty"),
        ([[[1], []]], "group 0, sequence 1 is empty"),
        ([[([], [])]], "group 0, sequence 0 is empty"),
        ([[([], [1])]], "empty prompt"),
        ([[[1, -3]]], "must not be negative, got -3"),
        ([[([1], [2, -1])]], "group 0, sequence 0, response: token ids must not be negative"),
        ([[[1.0, 2.0]]], "integer token ids, got float64"),
        ([[[True, False]]], "integer token ids, got bool"),
        ([[torch.zeros(2, 3, dtype=torch.int64)]], r"1-D token ids, got shape \(2, 3\)"),
        ([[[[1, 2], [3]]]], "got nested lists"),
        ([[5, 6]], r"1-D token ids, got shape \(\)"),
        ([[ScoredSequence([1, 2], [True, False])]], "first token has no predictor"),
        ([[ScoredSequence([1, 2], [False])]], r"of shape \(2,\), got bool of shape \(1,\)"),
        ([[ScoredSequence([1, 2], [0, 1])]], "bool mask `scored` .* got int64"),
        ([[ScoredSequence([], np.empty(0, dtype=bool))]], "sequence 0 is empty"),
    ],
)
def test_mistakes_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        PrefixTree.pack(groups)


@pytest.mark.parametrize(
    "token_logps", [torch.zeros(3), torch.zeros(12, 1), torch.zeros(12, dtype=torch.int64)]
)
def test_sequence_logps_refuses_what_is_not_one_number_per_edge(token_logps):
    with pytest.raises(ValueError, match=r"floating point of shape \(12,\)"):
        PrefixTree.pack(EXAMPLE).sequence_logps(token_logps)


def test_sequence_logps_refuses_another_device():
    with pytest.raises(ValueError, match="on meta, the tree on cpu"):
        PrefixTree.pack(EXAMPLE).sequence_logps(torch.zeros(12, device="meta"))


def test_a_pair_where_a_group_should_be_is_refused() -> None:
    prompt = [1, 2]
    with pytest.raises(ValueError, match=r"group 0 is one \(prompt, response\) pair"):
        PrefixTree.pack([(prompt, [5, 6]), (prompt, [5, 7])])
    with pytest.raises(ValueError, match="group 0 is one"):
        PrefixTree.pack([(np.array(prompt), torch.tensor([5, 6]))])
    assert PrefixTree.pack([((prompt, [5, 6]), (prompt, [5, 7]))]).num_tokens == 5
