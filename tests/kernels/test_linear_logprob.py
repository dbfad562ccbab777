"""linear_logprob: the chunked way against the reference, forward and every gradient."""

import importlib
import itertools

import pytest
import torch
import torch.utils.checkpoint

from scmini_kernels import PrefixTree, linear_logprob
from scmini_kernels.reference import linear_logprob_reference
from tests.budget import assert_within_budget, values_and_gradients

# `scmini_kernels.linear_logprob` names the function; the module hides behind it.
MODULE = importlib.import_module("scmini_kernels.linear_logprob")
T, D, V, M = 13, 7, 131, 41
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.6},
    "softcap": {"softcap": 2.0},
    "scale and softcap": {"logit_scale": 1.7, "softcap": 3.0},
}


def problem(dtype=torch.float64, seed=0, size=D, vocabulary=V):
    """hidden, head, bias, rows (with repeats, and rows that predict nothing), targets, upstream."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = torch.randint(0, T - 2, (M,), generator=generator)
    targets = torch.randint(0, vocabulary, (M,), generator=generator)
    upstream = normal(M).to(torch.promote_types(dtype, torch.float32))
    return normal(T, size), normal(vocabulary, size), normal(vocabulary), rows, targets, upstream


@pytest.fixture(params=[None, 9000, 1], ids=["one chunk", "some chunks", "single rows"])
def workspace(request, monkeypatch):
    """Keywords that set the size of the chunks; small ones come with small blocks of the head."""
    if request.param is None:
        return {}
    monkeypatch.setattr(MODULE, "_SCRATCH_BYTES", request.param)
    return {"workspace_bytes": request.param}


def assert_same(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_every_combination_of_gradients(dtype, tolerance, has_bias, options, workspace):
    hidden, head, bias, rows, targets, upstream = problem(dtype)
    tensors = [hidden, head, bias] if has_bias else [hidden, head]
    truth = values_and_gradients(
        lambda h, w, b=None: linear_logprob_reference(h, w, rows, targets, b, **options),
        tensors,
        upstream,
    )
    for needs in itertools.product((True, False), repeat=len(tensors)):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        bias = leaves[2] if has_bias else None
        logps = linear_logprob(*leaves[:2], rows, targets, bias=bias, **options, **workspace)
        assert logps.dtype == dtype
        assert logps.requires_grad == any(needs)
        assert_same([logps], truth[:1], tolerance)
        if any(needs):
            logps.backward(upstream)
        for leaf, need, gradient in zip(leaves, needs, truth[1:], strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert leaf.grad.dtype == dtype
                assert_same([leaf.grad], [gradient], tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen, options):
    hidden, head, bias, rows, targets, _ = problem()
    inputs = [x.requires_grad_() for x in ((hidden,) if frozen else (hidden, head, bias))]

    def function(h, w=head, b=bias):
        return linear_logprob(h, w, rows, targets, bias=b, **options)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_half_precision_keeps_the_budget(frozen, options, dtype, workspace):
    hidden, head, bias, rows, targets, upstream = problem(dtype, size=65, vocabulary=257)
    head = head * 0.25

    def plain(h, w=head, b=bias):
        logits = (h[rows] @ w.to(h.dtype).T + b.to(h.dtype)) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        wide = torch.promote_types(h.dtype, torch.float32)
        return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def ours(h, w=head, b=bias):
        return linear_logprob(h, w, rows, targets, bias=b, **options, **workspace)

    inputs = [hidden] if frozen else [hidden, head, bias]
    assert_within_budget(ours, plain, inputs, upstream)
    # The logits are fp32: the forward is as good as fp32 on the same rounded inputs.
    exact = linear_logprob_reference(
        hidden.double(), head.double(), rows, targets, bias.double(), **options
    )
    error = (ours(hidden).double() - exact).abs().max()
    assert error < 2e-5


def test_no_head_gradient_and_no_logits_are_held_for_a_frozen_head():
    hidden, head, _, rows, targets, _ = problem(torch.float32)
    hidden.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.shape) or x, lambda x: x
    ):
        logps = linear_logprob(hidden, head, rows, targets)
    assert sorted(sizes) == sorted([(M,), (M,), (M, D)])
    logps.sum().backward()
    assert head.grad is None


@pytest.mark.parametrize("trainable", [False, True])
def test_the_workspace_bounds_the_logits(monkeypatch, trainable):
    """No logits of more than the allowed rows are ever made, forward or backward."""
    padded = 192  # V in whole multiples of 64
    seen = []
    project = MODULE._project

    def spy(*inputs, out):
        seen.append(out.shape)
        project(*inputs, out=out)

    monkeypatch.setattr(MODULE, "_project", spy)
    hidden, head, _, rows, targets, _ = problem(torch.float32)
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    allowed = 6 * padded * 4
    linear_logprob(hidden, head, rows, targets, workspace_bytes=allowed).sum().backward()
    # 41 rows in chunks of at most 6 make 7 chunks, of equal size.
    sizes = [6] * 6 + [5]
    assert seen == [(n, V) for n in sizes * (2 if trainable else 1)]


@pytest.mark.parametrize(
    ("count", "row_bytes", "workspace_bytes", "free", "expected"),
    [
        # Mistral-7B and Llama-3-8B in bf16 (6 bytes a logit) on a card with much free memory.
        (100_000, 32_000 * 6, None, 20_000, 2048),
        (100_000, 128_256 * 6, None, 20_000, 512),
        (100_000, 128_256 * 6, None, 1100, 320),
        # So little memory that the least number of rows is taken all the same.
        (100_000, 128_256 * 6, None, 0, 192),
        # Equal chunks: 2 of 1088 rather than 2048 and 52.
        (2100, 32_000 * 6, None, 20_000, 1088),
        (41, 32_000 * 6, None, 20_000, 64),
        (0, 32_000 * 6, None, 20_000, 64),
        # The knob is obeyed to the row.
        (100_000, 32_000 * 6, 2**30, 0, 5568),
        (100_000, 32_000 * 6, 100 * 32_000 * 6, 0, 64),
        (100, 32_000 * 6, 7 * 32_000 * 6, 0, 7),
        (100, 32_000 * 6, 1, 0, 1),
    ],
)
def test_rows_per_chunk(monkeypatch, count, row_bytes, workspace_bytes, free, expected):
    """`free` MiB of a GPU's memory are free, a quarter of which PyTorch's allocator holds."""
    mib = 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * mib * 3 // 4, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * mib + free * mib // 4)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 * mib)
    got = MODULE._rows_per_chunk(count, row_bytes, torch.device("cuda"), workspace_bytes)
    assert got == expected


def test_no_grad_builds_no_unit_gradient(monkeypatch):
    hidden, head, _, rows, targets, _ = problem()
    hidden.requires_grad_()
    calls = []
    times_head = MODULE._times_head
    monkeypatch.setattr(
        MODULE, "_times_head", lambda *x, out: calls.append(1) or times_head(*x, out=out)
    )
    with torch.no_grad():
        silent = linear_logprob(hidden, head, rows, targets)
    assert not silent.requires_grad
    assert not calls
    assert linear_logprob(hidden, head, rows, targets).requires_grad
    assert calls


def test_autocast_does_not_lower_the_logits():
    hidden, head, _, rows, targets, upstream = problem(torch.float32)

    def run(h, w):
        return linear_logprob(h, w, rows, targets)

    expected = values_and_gradients(run, (hidden, head), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        got = values_and_gradients(run, (hidden, head), upstream)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_checkpointing_and_repetition_change_no_bit():
    hidden, head, bias, rows, targets, upstream = problem(torch.float32)

    def run(h, w, b):
        return linear_logprob(h, w, rows, targets, bias=b)

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(run, *x, use_reentrant=False)

    first = values_and_gradients(run, (hidden, head, bias), upstream)
    for again in (run, checkpointed):
        second = values_and_gradients(again, (hidden, head, bias), upstream)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_to_score(frozen):
    hidden, head, *_ = problem()
    hidden.requires_grad_()
    head.requires_grad_(not frozen)
    none = torch.empty(0, dtype=torch.int64)
    logps = linear_logprob(hidden, head, none, none)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert torch.equal(hidden.grad, torch.zeros(T, D, dtype=torch.float64))
    assert frozen or torch.equal(head.grad, torch.zeros(V, D, dtype=torch.float64))


def test_differentiating_twice_is_refused():
    hidden, head, _, rows, targets, _ = problem()
    hidden.requires_grad_()
    weights = torch.ones(M, dtype=torch.float64, requires_grad=True)
    loss = (linear_logprob(hidden, head, rows, targets) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_packed_tree_scores_like_separate_sequences():
    """Edges of a tree pick the rows: log p(response) equals the shifted sum over each sequence."""
    prompt, responses = [3, 1, 4], [[1, 5], [1, 5, 9], [2], []]
    tree = PrefixTree.pack([[(prompt, response) for response in responses]])
    _, head, *_ = problem()
    mask = tree.reference_mask().double()
    embedded = torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # A stand-in for a causal model: the hidden state is the sum over the visible prefix.
    hidden = mask @ embedded[tree.input_ids]
    sums = tree.sequence_logps(linear_logprob(hidden, head, tree.edge_rows, tree.edge_targets))
    for response, total in zip(responses, sums, strict=True):
        tokens = torch.tensor(prompt + response)
        logps = (embedded[tokens].cumsum(0) @ head.T).log_softmax(-1)
        steps = torch.arange(len(prompt) - 1, len(tokens) - 1)
        torch.testing.assert_close(total, logps[steps, tokens[steps + 1]].sum())


def test_torch_is_the_automatic_choice():
    hidden, head, bias, rows, targets, _ = problem(torch.bfloat16)
    options = {"bias": bias, "logit_scale": 0.5, "softcap": 4.0}
    chosen = linear_logprob(hidden, head, rows, targets, **options)
    assert torch.equal(chosen, linear_logprob(hidden, head, rows, targets, **options, impl="torch"))
    named = linear_logprob(hidden, head, rows, targets, **options, impl="reference")
    expected = linear_logprob_reference(hidden, head, rows, targets, **options)
    assert torch.equal(named, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, T, D)}, r"\(T, D\), got torch.float32 of shape \(1, 13"),
        ({"hidden_states": torch.zeros(T, D, dtype=torch.int64)}, "floating point .* torch.int64"),
        ({"lm_head": torch.zeros(D, V)}, r"lm_head: expected shape \(V, 7\), got \(7, 131\)"),
        ({"lm_head": torch.zeros(0, D)}, r"lm_head: expected shape \(V, 7\), got \(0, 7\)"),
        ({"lm_head": torch.zeros(V, D).half()}, "lm_head: expected hidden_states' dtype torch.fl"),
        (
            {"lm_head": torch.zeros(V, D, device="meta")},
            "lm_head: expected .* device cpu, got meta",
        ),
        ({"bias": torch.zeros(V + 1)}, r"bias: expected shape \(131,\), got \(132,\)"),
        ({"bias": torch.zeros(V).double()}, "bias: expected .* got torch.float64"),
        ({"rows": torch.zeros(M - 1, dtype=torch.int64)}, r"got \(40,\) and \(41,\)"),
        (
            {"rows": torch.zeros(M, dtype=torch.int32)},
            "rows: expected torch.int64, got torch.int32",
        ),
        ({"rows": torch.arange(M)}, r"rows: expected values in \[0, 13\), got 0 to 40"),
        ({"targets": torch.arange(M) - 1}, r"targets: expected values in \[0, 131\), got -1 to 39"),
        ({"targets": torch.arange(M).to("meta")}, "targets: expected .* device cpu, got meta"),
        ({"softcap": -1.0}, "softcap: expected a positive number, got -1.0"),
        ({"impl": "liger"}, "impl: expected one of auto, triton, torch, reference, got 'liger'"),
        ({"workspace_bytes": 0}, "workspace_bytes: expected a positive int, got 0"),
        ({"workspace_bytes": 1e8}, "workspace_bytes: expected a positive int, got 100000000.0"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "hidden_states": torch.zeros(T, D),
        "lm_head": torch.zeros(V, D),
        "rows": torch.zeros(M, dtype=torch.int64),
        "targets": torch.zeros(M, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))


def test_rows_of_very_different_size_do_not_disturb_one_another():
    """The maximum is taken per row: beside logits near 1000, small ones must not underflow."""
    hidden, head, _, rows, targets, _ = problem(torch.float32)
    hidden[0] *= 300
    logps = linear_logprob(hidden, head, rows, targets)
    torch.testing.assert_close(logps, linear_logprob_reference(hidden, head, rows, targets))


def test_repeated_rows_are_summed_in_fp32():
    """A prompt's last token has as many terms as responses: summed in bf16 they would be lost."""
    hidden, head, *_ = problem(torch.bfloat16)
    repeats = torch.zeros(512, dtype=torch.int64)
    targets = torch.arange(512) % 3

    def gradient(function, h, w):
        leaf = h.clone().requires_grad_()
        function(leaf, w, repeats, targets).sum().backward()
        return leaf.grad.double()

    exact = gradient(linear_logprob_reference, hidden.double(), head.double())
    error = (gradient(linear_logprob, hidden, head) - exact).abs().max()
    # One rounding of each term and one of the sum: 2^-9 each, of values no larger than the largest.
    assert error <= 2**-7 * exact.abs().max()


def test_ranges_are_checked_where_the_host_may_wait(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    assert MODULE._may_wait(torch.device("cpu"))
    assert not MODULE._may_wait(cuda)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert MODULE._may_wait(cuda)
    assert not MODULE._may_wait(torch.device("meta"))


@pytest.mark.parametrize("workspace_bytes", [None, 9000])
def test_scores_have_the_same_bits_with_and_without_gradient(workspace_bytes):
    hidden, head, _, _, targets, _ = problem(torch.float32)
    rows = torch.arange(T)
    options = {"softcap": 2.0, "workspace_bytes": workspace_bytes}
    silent = linear_logprob(hidden, head, rows, targets[:T], **options)
    hidden.requires_grad_()
    assert torch.equal(silent, linear_logprob(hidden, head, rows, targets[:T], **options))


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 13, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_that_fill_no_vector(dtype, vocabulary):
    hidden, head, bias, rows, targets, upstream = problem(dtype, size=65, vocabulary=vocabulary)
    head = head * 0.25

    def plain(h, w, b):
        logits = h[rows] @ w.T + b
        wide = torch.promote_types(h.dtype, torch.float32)
        return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    assert_within_budget(
        lambda h, w, b: linear_logprob(h, w, rows, targets, bias=b),
        plain,
        (hidden, head, bias),
        upstream,
    )
