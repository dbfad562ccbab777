"""Tree attention in Triton against the reference: interpreted on a CPU, compiled on a GPU."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint

from scmini_kernels import PrefixTree
from scmini_kernels.reference import tree_attention_reference
from tests.budget import assert_within_budget, values_and_gradients
from tests.kernels.forests import pair_forests
from tests.kernels.test_tree_attention import FORESTS, branching, ids, qkv

pytest.importorskip("triton")

from scmini_kernels.triton import tree_attention as launcher
from scmini_kernels.triton.variants import SHARED_LIMIT

MIXED, RAGGED = FORESTS["mixed"], FORESTS["ragged documents"]
# Runs of one to six tokens, nested, so that a tile holds parts of several trees.
BUSHY = [[[*range(n), 90 + n, 90 + n // 2] for n in (9, 3, 5, 12, 2, 7)] for _ in range(4)]
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 4, "softcap": 0.8, "scale": 1.3},
}


def arguments(q, tree, scale=None, window=None, softcap=None):
    """(scale, window, softcap) as `tree_attention` passes them on."""
    window = None if window is None or window >= tree.depth else window
    return q.shape[-1] ** -0.5 if scale is None else scale, window, softcap


def attend(q, k, v, tree, **options):
    return launcher.triton_attention(q, k, v, tree, *arguments(q, tree, **options))


def reference(q, k, v, tree, **options):
    return tree_attention_reference(q, k, v, tree, *arguments(q, tree, **options))


def plain_half(q, k, v, tree, **options):
    """What one writes in 16 bits, each intermediate result rounded."""
    scale, window, softcap = arguments(q, tree, **options)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = tree.reference_mask()
    if window is not None:
        mask &= tree.position_ids[:, None] - tree.position_ids[None, :] < window
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def assert_kernels_keep_the_budget(groups, heads, size, dtype, device, **options):
    tree, inputs, upstream = on(device, groups, heads, size, dtype)
    plain = reference if dtype == torch.float32 else plain_half
    assert_within_budget(
        lambda q, k, v: attend(q, k, v, tree, **options),
        lambda q, k, v: plain(q, k, v, tree, **options),
        inputs,
        upstream,
    )


def on(device, groups, heads, size, dtype=torch.float32, seed=0):
    """(tree, [q, k, v], upstream gradient) on the device."""
    tree = PrefixTree.pack(groups).to(device)
    inputs, upstream = qkv(tree, heads, size, dtype, seed)
    return tree, [x.to(device) for x in inputs], upstream.to(device)


def assert_close(got, expected, factor=200):
    for x, y in zip(got, expected, strict=True):
        tolerance = factor * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("groups", [MIXED, RAGGED, BUSHY], ids=["mixed", "ragged", "bushy"])
def test_fp32_keeps_the_budget(groups, options, device):
    assert_kernels_keep_the_budget(groups, (6, 2), 24, torch.float32, device, **options)


# In the interpreter a cast to bf16 truncates, where hardware rounds; the budget has room for it.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "window", "softcap", "window and softcap"])
def test_half_precision_keeps_the_budget(name, dtype, device):
    assert_kernels_keep_the_budget(MIXED, (6, 2), 40, dtype, device, **OPTIONS[name])


# One, few and many heads per key head; groups that divide no tile; one larger than a tile.
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (7, 1), (8, 1), (34, 1)], ids=str)
def test_grouped_heads(heads, device):
    groups = BUSHY[:1] if heads == (34, 1) else MIXED
    for window in (None, 11):
        assert_kernels_keep_the_budget(groups, heads, 16, torch.float16, device, window=window)


@pytest.mark.parametrize("size", [1, 5, 64, 80, 96, 128, 256])
def test_head_sizes(size, device):
    groups = [*BUSHY[:2], branching(30, (20, 1, 14))]
    tree, inputs, upstream = on(device, groups, (4, 2), size)
    assert_close(
        values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream),
        values_and_gradients(
            lambda *x: reference(*x, tree), [x.double() for x in inputs], upstream.double()
        ),
    )
    if size >= 64:
        assert_kernels_keep_the_budget(groups, (4, 2), size, torch.float16, device)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(pair_forests())
def test_any_forest(groups):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree, inputs, upstream = on(device, groups, (3, 1), 8)
    for window in (None, 3):
        assert_close(
            values_and_gradients(lambda *x, w=window: attend(*x, tree, window=w), inputs, upstream),
            values_and_gradients(
                lambda *x, w=window: reference(*x, tree, window=w),
                [x.double() for x in inputs],
                upstream.double(),
            ),
        )


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    "groups",
    [[branching(110, (50, 1, 40))], [[row] for row in ids(*[1] * 60, 40, *[1] * 9)], [[[5]]]],
    ids=["giant", "many tiny", "one token"],
)
def test_extremes(groups, window, device):
    tree, inputs, upstream = on(device, groups, (4, 2), 16)
    assert_close(
        values_and_gradients(lambda *x: attend(*x, tree, window=window), inputs, upstream),
        values_and_gradients(
            lambda *x: reference(*x, tree, window=window),
            [x.double() for x in inputs],
            upstream.double(),
        ),
    )


def test_window_of_one_copies_the_values(device):
    tree, inputs, upstream = on(device, MIXED, (6, 2), 24)
    out, dq, dk, dv = values_and_gradients(lambda *x: attend(*x, tree, window=1), inputs, upstream)
    assert torch.equal(out, inputs[2].repeat_interleave(3, 1))
    # One key has all the weight, whatever its score: only rounding is left.
    assert max(dq.abs().max(), dk.abs().max()) < 32 * torch.finfo(torch.float32).eps
    assert_close([dv], [upstream.unflatten(1, (2, 3)).sum(2)], factor=4)


def test_large_softcap_is_accurate_and_scores_beyond_it_saturate(device):
    assert_kernels_keep_the_budget(MIXED, (6, 2), 24, torch.float32, device, softcap=50.0)
    tree, (q, k, v), upstream = on(device, MIXED, (6, 2), 24)
    got = values_and_gradients(lambda *x: attend(*x, tree, softcap=3.0), (1e6 * q, k, v), upstream)
    assert all(x.isfinite().all() for x in got)
    assert_close(got[:1], [reference(1e6 * q, k, v, tree, softcap=3.0)])


def test_huge_and_tiny_scores_make_no_nan(device):
    tree, (q, k, v), upstream = on(device, MIXED, (6, 2), 24)
    for factor in (-1e4, 0.0):
        got = values_and_gradients(lambda *x: attend(*x, tree), (factor * q, k, v), upstream)
        assert all(x.isfinite().all() for x in got)
        assert_close(got[:1], [reference(factor * q, k, v, tree)], factor=1000)


@pytest.mark.parametrize("window", [None, 7])
def test_split_key_tiles_add_up(window, device, monkeypatch):
    """Long query ranges in pieces: the same result, the same bits each time."""
    groups = [branching(40, (30, 1, 13)), branching(7, (4, 3))]
    whole, inputs, upstream = on(device, groups, (3, 1), 24, torch.float16)
    expected = values_and_gradients(lambda *x: attend(*x, whole, window=window), inputs, upstream)
    monkeypatch.setattr(launcher, "_MIN_PIECE", 6)
    monkeypatch.setattr(launcher, "_PIECES_PER_PROCESSOR", 40)
    cut = PrefixTree.pack(groups).to(device)
    got = values_and_gradients(lambda *x: attend(*x, cut, window=window), inputs, upstream)
    (tiles,) = cut.cache.values()
    (unsplit,) = whole.cache.values()
    assert tiles.num_slots > len(tiles.split_tiles) > 0
    assert unsplit.num_slots == 0
    for x, y in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(x, y)
    assert_close(got[2:], expected[2:], factor=2)
    again = values_and_gradients(lambda *x: attend(*x, cut, window=window), inputs, upstream)
    for x, y in zip(got, again, strict=True):
        assert torch.equal(x, y)
    assert_kernels_keep_the_budget(groups, (3, 1), 24, torch.float16, device, window=window)


def test_bits_repeat(device):
    tree, inputs, upstream = on(device, RAGGED, (8, 2), 16, torch.float16)
    runs = [
        values_and_gradients(lambda *x: attend(*x, tree, window=9), inputs, upstream)
        for _ in range(2)
    ]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_every_output_element_is_written(device, monkeypatch):
    """Whatever the memory held before: all uninitialised buffers come as NaN."""
    monkeypatch.setattr(launcher, "_MIN_PIECE", 6)
    monkeypatch.setattr(launcher, "_PIECES_PER_PROCESSOR", 40)
    tree, inputs, upstream = on(device, MIXED, (6, 2), 24)
    expected = values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream)
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan"))
        )
    got = values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("needed", "kernels"),
    [
        ("q", {"query_gradient"}),
        ("k", {"key_gradient"}),
        ("v", {"key_gradient"}),
        ("qkv", {"query_gradient", "key_gradient"}),
        ("", set()),
    ],
)
def test_gradients_only_for_what_needs_them(needed, kernels, device, monkeypatch):
    tree, inputs, upstream = on(device, MIXED, (6, 2), 24, torch.float16)
    everything = values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream)
    launched = set()
    for name in ("query_gradient", "key_gradient"):
        launch = getattr(launcher, f"_launch_{name}")

        def recorded(*args, name=name, launch=launch):
            launched.add(name)
            launch(*args)

        monkeypatch.setattr(launcher, f"_launch_{name}", recorded)
    leaves = [x.clone().requires_grad_(n in needed) for n, x in zip("qkv", inputs, strict=True)]
    out = attend(*leaves, tree)
    assert torch.equal(out, everything[0])
    assert out.requires_grad == bool(needed)
    if needed:
        out.backward(upstream)
    assert launched == kernels
    for name, leaf, expected in zip("qkv", leaves, everything[1:], strict=True):
        assert (leaf.grad is not None) == (name in needed)
        if name in needed:
            assert torch.equal(leaf.grad, expected)


def test_any_strides(device):
    """Views as models make them, and as nobody should: the same bits."""
    tree, inputs, upstream = on(device, MIXED, (6, 2), 16)
    expected = values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream)

    def rows_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def columns_first(x):
        return x.mT.contiguous().mT

    def odd_offset(x):
        return torch.cat((x[..., :1], x), -1)[..., 1:]

    def fused(x):
        return (
            torch.cat((x, x, x), 1)
            .transpose(1, 2)
            .contiguous()
            .transpose(1, 2)[:, x.shape[1] :][:, : x.shape[1]]
        )

    for layout in (rows_first, columns_first, odd_offset, fused):
        views = [layout(x) for x in inputs]
        leaves = [x.detach().requires_grad_() for x in views]
        out = attend(*leaves, tree)
        got = [out, *torch.autograd.grad(out, leaves, layout(upstream))]
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)
    # The gradient of a sum has strides of 0.
    leaves = [x.clone().requires_grad_() for x in inputs]
    attend(*leaves, tree).sum().backward()
    ones = values_and_gradients(lambda *x: attend(*x, tree), inputs, torch.ones_like(upstream))
    for leaf, y in zip(leaves, ones[1:], strict=True):
        assert torch.equal(leaf.grad, y)


def test_output_is_laid_out_for_the_next_product(device):
    tree, (q, k, v), _ = on(device, MIXED, (6, 2), 16)
    assert attend(q, k, v, tree).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("far", range(3), ids="qkv".__getitem__)
def test_rows_that_lie_further_apart_than_32_bits_reach(far, window, device):
    """The last tiles begin more than 2^31 elements after the first; few pages are touched.

    Within a tile (128 keys at most) 32 bits must do, so there must be several tiles.
    """
    groups = [[row] for row in ids(*[11] * 20)]
    tree, inputs, upstream = on(device, groups, (2, 1), 16, torch.float16)
    expected = values_and_gradients(lambda *x: attend(*x, tree, window=window), inputs, upstream)
    step = (2**31 // (tree.num_tokens - 17) // 16 + 1) * 16
    x = inputs[far]
    memory = torch.empty(step * tree.num_tokens, dtype=x.dtype, device=device)
    inputs[far] = memory.as_strided(x.shape, (0, 16, step, 1)).copy_(x)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, tree, window=window)
    got = [out, *torch.autograd.grad(out, leaves, upstream)]
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_no_grad_checkpointing_autocast_and_a_second_backward(device):
    tree, inputs, upstream = on(device, MIXED, (6, 2), 16)
    expected = values_and_gradients(lambda *x: attend(*x, tree), inputs, upstream)
    with torch.no_grad():
        assert torch.equal(attend(*inputs, tree), expected[0])
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast(device.type, torch.bfloat16):
        out = checkpoint(lambda *x: attend(*x, tree), *leaves, use_reentrant=False)
    assert out.dtype == torch.float32
    for x, y in zip(torch.autograd.grad(out, leaves, upstream), expected[1:], strict=True):
        assert torch.equal(x, y)

    out = attend(*leaves, tree)
    for _ in range(2):  # the same graph twice
        again = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        for x, y in zip(again, expected[1:], strict=True):
            assert torch.equal(x, y)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_mistakes_are_named(device, monkeypatch):
    tree, inputs, _ = on(device, MIXED, (2, 1), 16, torch.float64)
    with pytest.raises(ValueError, match=r"expected bf16, fp16 or fp32, got torch\.float64"):
        attend(*inputs, tree)
    tree, inputs, _ = on(device, MIXED, (2, 1), 257)
    with pytest.raises(ValueError, match="head size of at most 256, got 257"):
        attend(*inputs, tree)
    tree, inputs, _ = on("cpu", MIXED, (2, 1), 16)
    monkeypatch.setattr(launcher, "_INTERPRETED", False)
    with pytest.raises(ValueError, match="expected CUDA tensors, got cpu"):
        attend(*inputs, tree)


def specialisation(kernel, args, constants):
    """What the just-in-time compiler tells apart: alignment of pointers, and of most integers."""
    names = list(inspect.signature(kernel.fn).parameters)
    key = [tuple(sorted(constants.items()))]
    for name, value in zip(names, args, strict=False):
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.storage_offset() * value.element_size() % 16))
        elif isinstance(value, int) and name not in ("window", "rows"):
            key.append((name, value == 1, value % 16 == 0, value.bit_length() > 31))
    return tuple(key)


@pytest.mark.parametrize("size", [5, 24, 64])
@pytest.mark.parametrize("rows_first", [False, True])
def test_batches_of_other_lengths_recompile_nothing(size, rows_first, device, monkeypatch):
    monkeypatch.setattr(launcher, "_MIN_PIECE", 6)
    monkeypatch.setattr(launcher, "_PIECES_PER_PROCESSOR", 40)
    keys = {}

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                key = specialisation(self.kernel, args, constants)
                keys.setdefault(self.name, set()).add(key)
                self.kernel[grid](*args, **constants)

            return launch

    names = [name for name in vars(launcher.kernels) if name.endswith("_kernel")]
    assert len(names) == 5
    for name in names:
        recorded = Recorded(name, getattr(launcher.kernels, name))
        monkeypatch.setattr(launcher.kernels, name, recorded)
    for groups in ([branching(20, (4, 3))], [branching(33, (5, 12)), [[1, 2]]]):
        tree, inputs, upstream = on(device, groups, (4, 2), size, torch.float16)
        if rows_first:
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        leaves = [x.requires_grad_() for x in inputs]
        attend(*leaves, tree, window=9).backward(upstream)
    assert set(keys) == set(names)
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(names, 1)


def test_every_configuration_is_among_the_variants():
    for capability, dtype, size in itertools.product(
        SHARED_LIMIT, (torch.bfloat16, torch.float32), (64, 96, 128, 256)
    ):
        variants = launcher.variants(capability)
        assert len({variant.name for variant in variants}) == len(variants)
        pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        listed = {
            (v.kernel, v.constants["BLOCK_M"], v.constants["BLOCK_N"], v.num_warps, v.num_stages)
            for v in variants
            if v.signature.get("q") == pointer
        }
        kernels = launcher.kernels
        configuration = launcher.choose_configuration(capability, dtype, size)
        assert launcher.choose_configuration(capability, torch.float16, size) == (
            launcher.choose_configuration(capability, torch.bfloat16, size)
        )
        assert {
            (kernels.forward_kernel, *configuration.forward),
            (kernels.query_gradient_kernel, *configuration.query_gradient),
            (kernels.key_gradient_kernel, *configuration.key_gradient),
        } <= listed
