"""tree_attention: the PyTorch way against the reference, and both against separate rows."""

import importlib
import itertools
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from scmini_kernels import PrefixTree, _attention_plan, tree_attention
from scmini_kernels._attention_plan import plan
from scmini_kernels.reference import tree_attention_reference
from tests.budget import assert_within_budget, values_and_gradients
from tests.kernels.forests import pair_forests


def ids(*lengths, first=0):
    """Runs of ids that have nothing in common."""
    bounds = torch.tensor([first, *lengths]).cumsum(0).tolist()
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def branching(prompt, responses, first=0):
    head, *tails = ids(prompt, *responses, first=first)
    return [(head, tail) for tail in tails]


FORESTS = {
    "one tree": [branching(7, (4, 3, 5))],
    "one run": [[list(range(37))]],
    "equal documents": [[row] for row in ids(*[11] * 5)],
    "ragged documents": [[row] for row in ids(1, 13, 13, 2, 31, 31, 31, 1, 1)],
    # Branching trees stand between runs of their own length, which may not merge with them.
    "mixed": [*([row] for row in ids(19, 19)), branching(7, (4, 3, 5)), *([r] for r in ids(19, 3))],
    "nested": [[[1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 9, 9, 9], [7], [7, 8, 8], [1, 2, 3, 9, 4]]],
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window of one": {"window": 1},
    "window": {"window": 5},
    "wide window": {"window": 10_000},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 4, "softcap": 0.8, "scale": 1.3},
}


@pytest.fixture(params=["whole trees", "every run apart"])
def cut(request, monkeypatch):
    """The plan weighs calls against wasted scores; these forests are too small to be cut."""
    if request.param == "every run apart":
        monkeypatch.setattr(_attention_plan, "CALL_FLOP", 0.0)
        monkeypatch.setattr(_attention_plan, "MERGE", -1)


def qkv(tree, heads, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(1, h, tree.num_tokens, size, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]
    return tensors[:3], tensors[3]


def assert_same(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("groups", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize(
    ("heads", "size", "dtype"), [((6, 2), 5, torch.float64), ((3, 3), 24, torch.float32)]
)
def test_torch_is_the_reference(groups, options, heads, size, dtype):
    tree = PrefixTree.pack(groups)
    inputs, upstream = qkv(tree, heads, size, dtype)

    def torch_way(q, k, v):
        return tree_attention(q, k, v, tree, impl="torch", **options)

    def reference(q, k, v):
        return tree_attention_reference(q, k, v, tree, **options)

    got = values_and_gradients(torch_way, inputs, upstream)
    assert got[0].dtype == dtype
    assert_same(
        got, values_and_gradients(reference, inputs, upstream), 200 * torch.finfo(dtype).eps
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pair_forests())
def test_any_forest(groups):
    tree = PrefixTree.pack(groups)
    inputs, upstream = qkv(tree, (2, 1), 3, torch.float64)
    for window in (None, 3):
        expected = values_and_gradients(
            lambda *x, w=window: tree_attention_reference(*x, tree, window=w), inputs, upstream
        )
        for call_flop in (0.0, _attention_plan.CALL_FLOP):
            with mock.patch.object(_attention_plan, "CALL_FLOP", call_flop):
                got = values_and_gradients(
                    lambda *x, w=window: tree_attention(*x, tree, window=w), inputs, upstream
                )
            tree.cache.clear()
            assert_same(got, expected, 1e-12)


def covered(tree, pieces, window):
    """(T, T) how often each pair of query and key is scored, by the meaning of the pieces."""
    counts = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.int64)
    seen = tree.reference_mask()
    if window is not None:
        seen &= tree.position_ids[:, None] - tree.position_ids[None, :] < window
    for piece in pieces:
        block = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
        if piece.kind == "tree":
            counts[block] += seen[block]
        elif piece.kind == "full":
            counts[block] += 1
        else:
            length = (piece.q_stop - piece.q_start) // piece.repeats
            ones = [torch.ones(length, length).tril()] * piece.repeats
            counts[block] += torch.block_diag(*ones).long()
    return counts, seen.long()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pair_forests(), st.sampled_from([None, 1, 2, 5, 9]), st.sampled_from([1.0, 1e5, 1e7, 1e12]))
def test_the_plan_covers_each_visible_pair_once(groups, window, flop_per_score):
    tree = PrefixTree.pack(groups)
    pieces = plan(tree, window, flop_per_score)
    counts, seen = covered(tree, pieces, window)
    assert torch.equal(counts, seen)
    own = [row for p in pieces if p.kind != "full" for row in range(p.q_start, p.q_stop)]
    assert own == list(range(tree.num_tokens))


def test_the_plan_leaves_out_what_the_mask_excludes():
    """512 prompt tokens and 9 responses of 256: no mask at all, and responses in one batch."""
    tree = PrefixTree.pack([branching(512, [256] * 9)])
    pieces = plan(tree, None, 14 * 8 * 64)
    assert pieces == [
        ("causal", 0, 512, 0, 512, 1),
        ("causal", 512, 2816, 512, 2816, 9),
        ("full", 512, 2816, 0, 512, 1),
    ]


def test_a_window_over_one_long_run_takes_a_band():
    tree = PrefixTree.pack([[list(range(1000))]])
    pieces = plan(tree, 100, 14 * 8 * 64)
    assert sum((p.q_stop - p.q_start) * (p.k_stop - p.k_start) for p in pieces) < 200_000


def test_many_small_subtrees_share_a_piece():
    tree = PrefixTree.pack([branching(9, [3, 4, 2, 5] * 4)])
    assert plan(tree, None, 14 * 8 * 64) == [("tree", 0, 65, 0, 65, 1)]
    long_prompt = PrefixTree.pack([branching(900, [3, 4, 2, 5] * 4)])
    kinds = [piece[:3] for piece in plan(long_prompt, None, 14 * 8 * 64)]
    assert kinds == [("causal", 0, 900), ("tree", 900, 956), ("full", 900, 956)]


def test_a_long_chain_of_branchings_is_no_deep_recursion():
    ids = list(range(13_000))
    tree = PrefixTree.pack([[[*ids[: 10 * n], 20_000 + n] for n in range(1, 1300)]])
    assert len(plan(tree, None, 1e9)) > 1000


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", FORESTS.values(), ids=FORESTS)
def test_each_sequence_gets_its_own_causal_attention(groups, window, impl):
    """Forward and gradients equal those of one causal call per sequence, unpacked."""
    tree = PrefixTree.pack(groups)
    inputs, _ = qkv(tree, (4, 2), 6, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    packed = tree_attention(*leaves, tree, window=window, impl=impl)
    mask = tree.reference_mask()
    generator = torch.Generator().manual_seed(1)
    ours = theirs = 0
    for group_index, group in enumerate(groups):
        for sequence in group:
            tokens = sequence[0] + sequence[1] if isinstance(sequence, tuple) else sequence
            rows = next(
                mask[i].nonzero()[:, 0]
                for i in range(tree.num_tokens)
                if tree.input_ids[mask[i]].tolist() == tokens
                and _group_of_row(tree, i, groups) == group_index
            )
            own = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            if window is not None:
                own = own.triu(1 - window)
            alone = F.scaled_dot_product_attention(
                *(x[:, :, rows] for x in leaves), attn_mask=own, enable_gqa=True
            )
            torch.testing.assert_close(packed[:, :, rows], alone, rtol=1e-12, atol=1e-12)
            weights = torch.randn(alone.shape, generator=generator, dtype=torch.float64)
            ours = ours + (packed[:, :, rows] * weights).sum()
            theirs = theirs + (alone * weights).sum()
    assert_same(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), 1e-11)


def _group_of_row(tree, row, groups):
    ends = torch.tensor([PrefixTree.count_tokens(group) for group in groups]).cumsum(0)
    return int(torch.searchsorted(ends, row, right=True))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", ["one tree", "mixed"])
def test_half_precision_keeps_the_budget(name, options, dtype):
    tree = PrefixTree.pack(FORESTS[name])
    inputs, upstream = qkv(tree, (6, 2), 40, dtype)
    mask = tree.reference_mask()
    if "window" in options:
        distance = tree.position_ids[:, None] - tree.position_ids[None, :]
        mask &= distance < options["window"]

    def plain(q, k, v):
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        scores = q @ k.mT * 40**-0.5
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, torch.float64)
        return weights.to(q.dtype) @ v

    def ours(q, k, v):
        return tree_attention(q, k, v, tree, **options)

    assert_within_budget(ours, plain, inputs, upstream)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl, options):
    tree = PrefixTree.pack(FORESTS["one tree"])
    inputs, _ = qkv(tree, (4, 2), 3, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: tree_attention(*x, tree, impl=impl, **options), leaves, fast_mode=True
    )


def test_pieces_are_planned_once_per_forest_and_window():
    tree = PrefixTree.pack(FORESTS["mixed"])
    (q, k, v), _ = qkv(tree, (2, 2), 4, torch.float32)
    for _ in range(3):
        for window in (None, 5, 1000, tree.depth):
            tree_attention(q, k, v, tree, window=window)
    assert len(tree.cache) == 2


def test_differentiable_once():
    tree = PrefixTree.pack(FORESTS["one tree"])
    (q, k, v), _ = qkv(tree, (2, 1), 4, torch.float64)
    (grad,) = torch.autograd.grad(
        tree_attention(q.requires_grad_(), k, v, tree).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradient_goes_only_where_it_is_asked_for():
    tree = PrefixTree.pack(FORESTS["one tree"])
    (q, k, v), upstream = qkv(tree, (2, 1), 4, torch.float64)
    q.requires_grad_()
    tree_attention(q, k, v, tree).backward(upstream)
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is None


def test_torch_is_the_automatic_choice():
    tree = PrefixTree.pack(FORESTS["mixed"])
    (q, k, v), _ = qkv(tree, (2, 1), 8, torch.float32)
    chosen = tree_attention(q, k, v, tree)
    assert torch.equal(chosen, tree_attention(q, k, v, tree, impl="torch"))
    assert not torch.equal(chosen, tree_attention(q, k, v, tree, impl="reference"))


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"capability": (7, 5)}, False),
        ({"triton": None}, False),
        ({"dtype": torch.float64}, False),
        ({"size": 257}, False),
        ({"is_cuda": False}, False),
    ],
    ids=str,
)
def test_triton_is_chosen_where_it_runs(change, served, monkeypatch):
    """Of CUDA tensors that are none: nothing is launched."""
    card = {"capability": (8, 0), "triton": object(), "dtype": torch.bfloat16, "size": 256}
    card |= {"is_cuda": True} | change
    module = importlib.import_module("scmini_kernels.tree_attention")
    monkeypatch.setattr(module, "find_spec", lambda name: card[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card["capability"])
    q = mock.Mock(is_cuda=card["is_cuda"], dtype=card["dtype"], shape=(1, 2, 3, card["size"]))
    assert module._triton_serves(q) == served


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(1, 4, 18, 8)}, r"q: expected shape \(1, Hq, 19, Dh\).*got \(1, 4, 18, 8\)"),
        ({"q": zeros(2, 4, 19, 8)}, r"got \(2, 4, 19, 8\)"),
        ({"q": zeros(4, 19, 8)}, r"got \(4, 19, 8\)"),
        ({"q": zeros(1, 4, 19, 8, dtype=torch.int64)}, "floating-point dtype, got torch.int64"),
        ({"k": zeros(2, 19, 8)}, r"k: expected shape \(1, 'Hkv', 19, 8\), got \(2, 19, 8\)"),
        ({"k": zeros(1, 2, 19, 7)}, r"k: expected shape \(1, 2, 19, 8\), got \(1, 2, 19, 7\)"),
        ({"v": zeros(1, 4, 19, 8)}, r"v: expected shape \(1, 2, 19, 8\), got \(1, 4, 19, 8\)"),
        ({"v": zeros(1, 2, 19, 8, dtype=torch.float64)}, "v: expected q's dtype torch.float32"),
        ({"k": zeros(1, 2, 19, 8, device="meta")}, "k: expected q's device cpu, got meta"),
        ({"q": zeros(1, 3, 19, 8)}, "q has 3 heads, expected a multiple of the 2 heads"),
        ({"k": zeros(1, 0, 19, 8), "v": zeros(1, 0, 19, 8)}, "multiple of the 0 heads"),
        ({"tree": PrefixTree.pack(FORESTS["one tree"]).to("meta")}, "tree: expected q's device"),
        ({"window": 0}, "window: expected at least 1"),
        ({"softcap": 0.0}, "softcap: expected a positive number, got 0.0"),
        (
            {"impl": "triton?"},
            "impl: expected one of auto, triton, torch, reference, got 'triton\\?'",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "q": zeros(1, 4, 19, 8),
        "k": zeros(1, 2, 19, 8),
        "v": zeros(1, 2, 19, 8),
        "tree": PrefixTree.pack(FORESTS["one tree"]),
    }
    with pytest.raises(ValueError, match=message):
        tree_attention(**(arguments | change))
