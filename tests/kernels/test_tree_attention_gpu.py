"""Tree attention at the sizes of real models: accuracy, memory, determinism, no recompilation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from scmini_kernels import PrefixTree, tree_attention
from scmini_kernels.reference import at_least_fp32, tree_attention_reference
from tests.budget import assert_within_budget, values_and_gradients
from tests.kernels.test_tree_attention import FORESTS, branching, qkv

GIB = 2**30
# heads, head size and options of Mistral-7B and Llama-3-8B, and of both kinds of Gemma-2-9B layers
MODELS = {
    "mistral": ((32, 8), 128, {}),
    "mistral windowed": ((32, 8), 128, {"window": 1500}),
    "gemma-2 local": ((16, 8), 256, {"window": 1024, "softcap": 50.0, "scale": 256**-0.5}),
    "gemma-2 global": ((16, 8), 256, {"softcap": 50.0, "scale": 256**-0.5}),
    "qwen2-0.5b": ((14, 2), 64, {}),
    "phi-3-mini": ((32, 32), 96, {}),
}


def ragged(total, seed=0):
    """Prompts with 17 responses of uneven length, single documents and tiny ones: ~total rows."""
    generator = torch.Generator().manual_seed(seed)

    def length(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    groups, rows = [], 0
    while rows < total:
        prompt = length(1, total // 8)
        responses = [length(1, total // 40) for _ in range(17)]
        document = length(1, total // 20)
        rows += prompt + sum(responses) + document + 1
        groups += [branching(prompt, responses), [torch.arange(document)], [[0]]]
    return groups


def run_by_run(q, k, v, tree, scale=None, window=None, softcap=None, queries=512):
    """Plain attention, each result rounded to q's dtype, for up to `queries` rows of a run at once.

    Recomputed in backward; the gradients of keys are summed over the parts in fp32 at least.
    """
    dtype, wide = q.dtype, at_least_fp32(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(wide) for x in (q, k, v))

    def attend(q, k, v, rows, keys, mask):
        q, k, v = (x[:, :, i].to(dtype) for x, i in ((q, rows), (k, keys), (v, keys)))
        scores = q @ k.repeat_interleave(group, 1).mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return weights @ v.repeat_interleave(group, 1)

    runs, positions = tree.runs, tree.position_ids
    paths, parts = [], []
    for start, end, parent in zip(runs.starts, runs.ends, runs.parents, strict=True):
        own = torch.arange(start, end, device=q.device)
        paths.append(own if parent < 0 else torch.cat((paths[parent], own)))
        above = len(paths[-1]) - len(own)
        for first in range(0, len(own), queries):
            last = min(first + queries, len(own))
            keys, rows = paths[-1][: above + last], own[first:last]
            mask = keys[None, :] <= rows[:, None]
            if window is not None:
                mask &= positions[rows][:, None] - positions[keys][None, :] < window
            parts.append(checkpoint(attend, q, k, v, rows, keys, mask, use_reentrant=False))
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("groups", FORESTS.values(), ids=FORESTS)
def test_run_by_run_is_the_reference(groups, options):
    """What the tests below believe in."""
    tree = PrefixTree.pack(groups)
    inputs, upstream = qkv(tree, (4, 2), 6, torch.float64)
    got = values_and_gradients(
        lambda *x: run_by_run(*x, tree, queries=5, **options), inputs, upstream
    )
    expected = values_and_gradients(
        lambda *x: tree_attention_reference(*x, tree, **options), inputs, upstream
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def on_gpu(groups, heads, size, dtype):
    tree = PrefixTree.pack(groups).to("cuda")
    inputs, upstream = qkv(tree, heads, size, dtype)
    return tree, [x.cuda() for x in inputs], upstream.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_the_budget(name, dtype):
    heads, size, options = MODELS[name]
    tree, inputs, upstream = on_gpu(ragged(6000), heads, size, dtype)
    assert_within_budget(
        lambda *x: tree_attention(*x, tree, impl="triton", **options),
        lambda *x: run_by_run(*x, tree, **options),
        inputs,
        upstream,
    )


@pytest.mark.gpu
def test_32k_rows_keep_the_budget():
    tree, inputs, upstream = on_gpu(ragged(30_000), (8, 2), 128, torch.bfloat16)
    assert_within_budget(
        lambda *x: tree_attention(*x, tree, impl="triton"),
        lambda *x: run_by_run(*x, tree),
        inputs,
        upstream,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_fp32_keeps_the_budget(size):
    tree, inputs, upstream = on_gpu(ragged(1500), (8, 2), size, torch.float32)
    assert_within_budget(
        lambda *x: tree_attention(*x, tree, impl="triton"),
        lambda *x: run_by_run(*x, tree),
        inputs,
        upstream,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_bits_repeat_and_memory_is_linear(name):
    heads, size, options = MODELS[name]
    tree, inputs, upstream = on_gpu(ragged(30_000), heads, size, torch.bfloat16)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = tree_attention(*leaves, tree, impl="triton", **options)
        gradients = torch.autograd.grad(out, leaves, upstream)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        # Copies of the inputs (their layout is heads first), of the upstream gradient, outputs,
        # fp32 numbers per row and head, partial sums; the T x T mask alone would be 0.9 GiB.
        operands = sum(x.numel() * x.element_size() for x in (*leaves, upstream))
        assert peak < 3 * operands + GIB // 8
        results.append([out.detach(), *gradients])
        del out, gradients
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_other_lengths_compile_nothing():
    from scmini_kernels.triton import tree_attention_kernels as kernels

    def compiled():
        device = torch.cuda.current_device()
        return [
            len(getattr(kernels, name).device_caches[device][0])
            for name in dir(kernels)
            if name.endswith("_kernel")
        ]

    def step(total, seed):
        tree, inputs, upstream = on_gpu(ragged(total, seed), (32, 8), 128, torch.bfloat16)
        leaves = [x.requires_grad_() for x in inputs]
        tree_attention(*leaves, tree, impl="triton").backward(upstream)

    step(5000, 0)
    before = compiled()
    for seed, total in enumerate((900, 1777, 4096, 9001), start=1):
        step(total, seed)
    assert compiled() == before
