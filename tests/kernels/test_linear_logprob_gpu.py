"""linear_logprob in Triton at real sizes, on a GPU: accuracy, memory, and offsets past 32 bits."""

import pytest
import torch

from scmini_kernels import linear_logprob
from tests.budget import assert_within_budget, values_and_gradients

pytestmark = pytest.mark.gpu

MIB = 2**20
WORKSPACE = 384 * MIB
# What GEMM libraries keep for themselves, gathered hidden states and scratch, generously.
SLACK = 256 * MIB
# Mistral-7B and Llama-3-8B, each also with one token added, which leaves no alignment.
HEADS = {"32000": 32_000, "32001": 32_001, "128256": 128_256, "128257": 128_257}
D = 4096


def problem(dtype, vocabulary, count, size=D):
    """hidden (count, size), head, rows, targets, upstream. Rows repeat, and some predict nothing;
    some targets are likely and some are not."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        x = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
        return x * scale

    hidden = normal(count, size)
    head = normal(vocabulary, size, scale=2 / size**0.5)
    rows = torch.randint(0, count - 2, (count,), generator=generator, device="cuda")
    rows[: min(200, count // 8)] = 5
    targets = torch.randint(0, vocabulary, (count,), generator=generator, device="cuda")
    targets[::7] = vocabulary - 1
    return hidden, head, rows, targets, normal(count).float()


def plain(hidden, head, rows, targets):
    logits = hidden[rows] @ head.T
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("count", [1, 1000, 16_384])
@pytest.mark.parametrize("vocabulary", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_head_keeps_the_budget(dtype, vocabulary, count):
    """Every row is computed; the error is judged on a sample, fp64 being slow and large."""
    count = max(count, 3)
    hidden, head, rows, targets, upstream = problem(dtype, vocabulary, count)
    logps, gradient = values_and_gradients(
        lambda h: linear_logprob(h, head, rows, targets, impl="triton"), [hidden], upstream
    )
    seen = rows.unique()
    sample = seen[:: max(1, len(seen) // 40)].contiguous()
    chosen = torch.isin(rows, sample).nonzero()[:, 0]
    few = torch.searchsorted(sample, rows[chosen])

    def on_sample(x):
        weights = head.to(x)
        return values_and_gradients(
            lambda h: plain(h, weights, few, targets[chosen]), [x], upstream[chosen]
        )

    exact = on_sample(hidden[sample].double())
    theirs = on_sample(hidden[sample])
    for got, truth, peer in zip((logps[chosen], gradient[sample]), exact, theirs, strict=True):
        error = (got.double() - truth).abs().max()
        floor = truth.abs().max() * torch.finfo(got.dtype).eps / 2
        assert error <= torch.maximum(2 * (peer.double() - truth).abs().max(), floor)
    # And as fp32 logits promise.
    assert (logps[chosen].double() - exact[0]).abs().max() < 5e-5
    unseen = torch.ones(count, dtype=torch.bool, device="cuda").index_fill_(0, rows, False)
    assert not gradient[unseen].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32_000, 32_001])
def test_a_trainable_head_keeps_the_budget(dtype, vocabulary):
    hidden, head, rows, targets, upstream = problem(dtype, vocabulary, 1500, size=256)

    def ours(h, w, b):
        return linear_logprob(
            h, w, rows, targets, bias=b, logit_scale=0.7, softcap=30.0, impl="triton"
        )

    def theirs(h, w, b):
        logits = 30.0 * torch.tanh((h[rows] @ w.T + b) * 0.7 / 30.0)
        wide = torch.promote_types(h.dtype, torch.float32)
        return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    assert_within_budget(ours, theirs, [hidden, head, head[:, 0].clone()], upstream)


def peak_of(function):
    """Bytes that a call takes at its peak, above what was in use before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("vocabulary", HEADS.values(), ids=HEADS)
def test_memory(vocabulary):
    """No (M, V) buffer (4 GiB in bf16 here), no (V, D) gradient of a frozen head (1 GiB)."""
    count = 16_384
    hidden, head, rows, targets, _ = problem(torch.bfloat16, vocabulary, count)
    kept = count * D * 2
    with torch.no_grad():
        silent = peak_of(lambda: linear_logprob(hidden, head, rows, targets))
    assert silent <= WORKSPACE + SLACK
    hidden.requires_grad_()
    # The unit gradient, and the gradient of the hidden states.
    frozen = peak_of(lambda: linear_logprob(hidden, head, rows, targets).sum().backward())
    assert frozen <= WORKSPACE + 2 * kept + SLACK
    small = peak_of(
        lambda: linear_logprob(hidden, head, rows, targets, workspace_bytes=MIB).sum().backward()
    )
    assert small <= 2 * kept + SLACK
    hidden.grad = None
    head.requires_grad_()
    # The head's gradient in fp32, and rounded.
    trained = peak_of(lambda: linear_logprob(hidden, head, rows, targets).sum().backward())
    assert trained <= WORKSPACE + 2 * kept + vocabulary * D * (4 + 2) + SLACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_32_bits(dtype):
    """A single chunk of more than 2^31 logits gives what chunks of a few MiB give."""
    vocabulary, count = 128_257, 17_000
    assert vocabulary * count > 2**31
    hidden, head, rows, targets, upstream = problem(dtype, vocabulary, count, size=128)

    def of(workspace_bytes):
        return values_and_gradients(
            lambda h: linear_logprob(h, head, rows, targets, workspace_bytes=workspace_bytes),
            [hidden],
            upstream,
        )

    whole, parts = of(2**40), of(256 * MIB)
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-5, atol=1e-5)
    scale = parts[1].abs().max()
    assert (whole[1] - parts[1]).abs().max() <= 2 * torch.finfo(dtype).eps * scale + 1e-5


def test_equal_calls_give_equal_bits():
    hidden, head, rows, targets, upstream = problem(torch.bfloat16, 32_001, 4000)

    def once():
        return values_and_gradients(
            lambda h: linear_logprob(h, head, rows, targets, workspace_bytes=200 * MIB),
            [hidden],
            upstream,
        )

    first, second = once(), once()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_target_out_of_range_gives_nan_and_under_launch_blocking_an_error(monkeypatch):
    hidden, head, rows, targets, _ = problem(torch.bfloat16, 32_001, 100, size=64)
    targets[3] = 32_001
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    logps = linear_logprob(hidden, head, rows, targets)
    assert logps.isnan().nonzero().tolist() == [[3]]
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 32001\)"):
        linear_logprob(hidden, head, rows, targets)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    inputs = problem(torch.bfloat16, 1000, 50, size=64)

    def on(device):
        hidden, head, rows, targets, upstream = (x.to(device) for x in inputs)
        return values_and_gradients(
            lambda h: linear_logprob(h, head, rows, targets), [hidden], upstream
        )

    for x, y in zip(on("cuda:0"), on("cuda:1"), strict=True):
        assert torch.equal(x, y.to("cuda:0"))
