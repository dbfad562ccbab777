"""linear_logprob in Triton: against the PyTorch way and the reference, forward and every gradient.

Without a GPU this runs in Triton's interpreter, which truncates where a GPU rounds a store to bf16;
fp32 and fp16 are held to the budget there, bf16 to the two units in the last place that this costs.
"""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint

from scmini_kernels import linear_logprob
from scmini_kernels.reference import linear_logprob_reference
from tests.budget import assert_within_budget, values_and_gradients

MODULE = importlib.import_module("scmini_kernels.linear_logprob")
KERNELS = importlib.import_module("scmini_kernels.triton.linear_logprob")
T, D, V, M = 13, 7, 131, 41
# The interpreter computes the padding of the rows aloud, and what it holds has no meaning.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.6},
    "softcap": {"softcap": 2.0},
    "scale and softcap": {"logit_scale": 1.7, "softcap": 30.0},
}


def problem(device, dtype=torch.float32, *, size=D, vocabulary=V, count=M):
    """hidden, head, bias, rows (with repeats, and rows that predict nothing), targets, upstream."""
    generator = torch.Generator().manual_seed(vocabulary + count)

    def normal(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype)

    rows = torch.randint(0, T - 2, (count,), generator=generator).to(device)
    targets = torch.randint(0, vocabulary, (count,), generator=generator).to(device)
    upstream = normal(count).float()
    return normal(T, size), normal(vocabulary, size), normal(vocabulary), rows, targets, upstream


def run(rows, targets, impl="triton", **options):
    """linear_logprob as a function of hidden, head and bias."""

    def function(hidden, head, bias=None):
        return linear_logprob(hidden, head, rows, targets, bias=bias, impl=impl, **options)

    return function


def assert_close(got, expected, tolerance=2e-5):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def poison(monkeypatch):
    """Fresh memory holds NaN: what is not overwritten shows."""

    def poisoned(make):
        def function(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return function

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


# Of 17 rows of 192 fp32 logits, padding included: all, at most 7 (6, then) or one at a time.
@pytest.mark.parametrize("workspace_bytes", [None, 7 * 192 * 4, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_combination_of_gradients(device, monkeypatch, has_bias, options, workspace_bytes):
    hidden, head, bias, rows, targets, upstream = problem(device, count=17)
    tensors = [hidden, head, bias] if has_bias else [hidden, head]
    truth = values_and_gradients(
        run(rows, targets, "reference", **options), [x.double() for x in tensors], upstream
    )
    truth = [x.float() for x in truth]
    poison(monkeypatch)
    for needs in itertools.product((True, False), repeat=len(tensors)):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        logps = run(rows, targets, workspace_bytes=workspace_bytes, **options)(*leaves)
        assert logps.dtype == torch.float32
        assert logps.requires_grad == any(needs)
        assert_close([logps], truth[:1])
        if any(needs):
            logps.backward(upstream)
        for leaf, need, gradient in zip(leaves, needs, truth[1:], strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert_close([leaf.grad], [gradient])


# 5003 takes two blocks of the row kernel, 1100 (as D) two of the sum over rows.
@pytest.mark.parametrize("count", [0, 1, 41])
@pytest.mark.parametrize(("vocabulary", "size"), [(1, 7), (7, 1), (131, 1100), (5003, 64)])
def test_sizes(device, vocabulary, size, count):
    hidden, head, bias, rows, targets, upstream = problem(
        device, size=size, vocabulary=vocabulary, count=count
    )
    inputs = (hidden, head / size**0.5, bias)
    truth = values_and_gradients(run(rows, targets, "reference"), inputs, upstream)
    for impl in ("triton", "torch"):
        assert_close(values_and_gradients(run(rows, targets, impl), inputs, upstream), truth)
    frozen = run(rows, targets)
    got = values_and_gradients(lambda h: frozen(h, *inputs[1:]), inputs[:1], upstream)
    assert_close(got, truth[:2])


def plain(rows, targets, logit_scale=1.0, softcap=None):
    """The formula as one writes it: logits in the inputs' dtype."""

    def function(hidden, head, bias):
        logits = (hidden[rows] @ head.T + bias) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_budget(device, frozen, options, dtype):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates to bf16: see test_bf16_in_the_interpreter")
    hidden, head, bias, rows, targets, upstream = problem(device, dtype, size=65, vocabulary=257)
    head = head * 0.25
    ours, theirs = run(rows, targets, **options), plain(rows, targets, **options)
    if frozen:
        wide = {x: (head.to(x), bias.to(x)) for x in (dtype, torch.float64)}
        assert_within_budget(
            lambda h: ours(h, head, bias),
            lambda h: theirs(h, *wide[h.dtype]),
            [hidden],
            upstream,
        )
    else:
        assert_within_budget(ours, theirs, [hidden, head, bias], upstream)
    # The logits are fp32: the forward is as good as fp32 on the same rounded inputs.
    exact = linear_logprob_reference(
        hidden.double(), head.double(), rows, targets, bias.double(), **options
    )
    assert (ours(hidden, head, bias).double() - exact).abs().max() < 2e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_in_the_interpreter(device, frozen, options):
    """Two roundings on the way to each gradient, each by at most a unit in the last place, not
    half of one as on a GPU: of the largest gradient, or of the bf16 twin's largest factor."""
    hidden, head, bias, rows, targets, upstream = problem(
        device, torch.bfloat16, size=65, vocabulary=257
    )
    head = head * 0.25
    inputs = [hidden, head, bias][: 1 if frozen else 3]

    def of(impl):
        function = run(rows, targets, impl, **options)
        return lambda h, w=head, b=bias: function(h, w.to(h.dtype), b.to(h.dtype))

    got = values_and_gradients(of("triton"), inputs, upstream)
    exact = values_and_gradients(of("reference"), [x.double() for x in inputs], upstream)
    assert (got[0].double() - exact[0]).abs().max() < 2e-5
    unit = torch.finfo(torch.bfloat16).eps
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).abs().max() <= 2 * unit * y.abs().max()


def test_strided_inputs(device):
    hidden, head, bias, rows, targets, upstream = problem(device)

    def strided(x):
        """The same values, every other element of a larger tensor; matrices transposed as well."""
        wider = torch.full((*reversed(x.shape), 2), float("nan") if x.is_floating_point() else -1)
        wider = wider.to(device=device, dtype=x.dtype)
        view = wider[..., 0].T if x.dim() == 2 else wider[:, 0]
        view.copy_(x)
        assert not view.is_contiguous()
        return view

    expected = values_and_gradients(run(rows, targets), (hidden, head, bias), upstream)
    leaves = [strided(x).requires_grad_() for x in (hidden, head, bias)]
    logps = run(strided(rows), strided(targets))(*leaves)
    gradients = torch.autograd.grad(logps, leaves, strided(upstream))
    assert_close([logps, *gradients], expected, 1e-6)
    # The sum of all has an upstream gradient of stride 0.
    logps = run(strided(rows), strided(targets))(*leaves)
    got = torch.autograd.grad(logps.sum(), leaves)
    expected = values_and_gradients(
        run(rows, targets), (hidden, head, bias), torch.ones_like(upstream)
    )
    assert_close(got, expected[1:], 1e-6)
    with torch.no_grad():
        silent = run(strided(rows), strided(targets))(*leaves)
    assert_close([silent], expected[:1], 1e-6)


def test_autocast_does_not_lower_the_logits(device):
    hidden, head, bias, rows, targets, upstream = problem(device)
    expected = values_and_gradients(run(rows, targets), (hidden, head, bias), upstream)
    with torch.autocast(device.type, torch.bfloat16):
        got = values_and_gradients(run(rows, targets), (hidden, head, bias), upstream)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_repetition_checkpointing_and_a_second_backward_change_no_bit(device, frozen):
    hidden, head, bias, rows, targets, upstream = problem(device)
    inputs = [hidden] if frozen else [hidden, head, bias]
    function = run(rows, targets, workspace_bytes=20_000)

    def direct(h, w=head, b=bias):
        return function(h, w, b)

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(direct, *x, use_reentrant=False)

    first = values_and_gradients(direct, inputs, upstream)
    for again in (direct, checkpointed):
        second = values_and_gradients(again, inputs, upstream)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    leaves = [x.clone().requires_grad_() for x in inputs]
    logps = direct(*leaves)
    for _ in range(2):
        got = torch.autograd.grad(logps, leaves, upstream, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(got, first[1:], strict=True))


def test_differentiating_twice_is_refused(device):
    hidden, head, _, rows, targets, _ = problem(device)
    hidden.requires_grad_()
    weights = torch.ones(M, device=device, requires_grad=True)
    loss = (run(rows, targets)(hidden, head) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_gradient_is_made_where_none_is_asked_for(device, monkeypatch):
    """Neither the unit gradient nor a head's; and the logits' memory is one chunk's."""
    hidden, head, _, rows, targets, _ = problem(device, torch.float16)
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *x, **y: made.append(x[1:]) or new_empty(*x, **y)
    )
    score = KERNELS.score
    seen = []
    monkeypatch.setattr(KERNELS, "score", lambda *x: seen.append(x) or score(*x))
    six_rows = 6 * 192 * (4 + 2)
    run(rows, targets, workspace_bytes=six_rows)(hidden, head)
    assert [x[-1] for x in seen] == [None] * 7
    assert (6, 192) in made
    assert (M, D) not in made
    assert len({x[0].data_ptr() for x in seen}) == 1
    seen.clear()
    hidden.requires_grad_()
    run(rows, targets, workspace_bytes=six_rows)(hidden, head).sum().backward()
    assert {x[-1].dtype for x in seen} == {torch.float16}
    assert {x[0].shape for x in seen} == {(6, V), (5, V)}
    assert head.grad is None


def test_scores_have_the_same_bits_with_and_without_gradient(device):
    hidden, head, bias, _, targets, _ = problem(device, torch.float16)
    function = run(torch.arange(T, device=device), targets[:T], softcap=2.0, workspace_bytes=20_000)
    silent = function(hidden, head, bias)
    hidden.requires_grad_()
    assert torch.equal(silent, function(hidden, head, bias))


def test_the_automatic_choice(device):
    """Triton on CUDA, PyTorch elsewhere; fp64 never in Triton."""
    hidden, head, bias, rows, targets, _ = problem(device, torch.float16)
    named = "triton" if device.type == "cuda" else "torch"
    chosen, expected = (
        run(rows, targets, impl, workspace_bytes=2**20)(hidden, head, bias)
        for impl in ("auto", named)
    )
    assert torch.equal(chosen, expected)
    on_cuda = torch.empty(0, device="meta")
    wide = hidden.double(), head.double(), bias.double()
    assert torch.equal(run(rows, targets, "auto")(*wide), run(rows, targets, "torch")(*wide))
    with pytest.raises(ValueError, match="expected bf16, fp16 or fp32 hidden_states, got fp64"):
        run(rows, targets)(*wide)
    with pytest.raises(ValueError, match="expected CUDA tensors, got meta"):
        run(*[torch.empty(0, device="meta", dtype=torch.int64)] * 2)(
            on_cuda.view(0, 1), torch.empty(3, 1, device="meta")
        )


def test_cpu_tensors_need_the_interpreter():
    """And the kernels are not imported before they are used."""
    code = """
import sys, torch
from scmini_kernels import linear_logprob
one, none = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
linear_logprob(one, one, none, none)
assert "scmini_kernels.triton" not in sys.modules
linear_logprob(one, one, none, none, impl="triton")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "ValueError: impl='triton': expected CUDA tensors, got cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
