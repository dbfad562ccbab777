"""The row kernels of linear_logprob by themselves: values that a model seldom or never produces."""

import mmap
import sys

import pytest
import torch

from scmini_kernels.triton.linear_logprob import score, sum_rows

# The interpreter computes the padding of the rows aloud, and what it holds has no meaning.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_near(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)


def scored(product, targets, gradients_dtype=torch.float32, bias=None, softcap=None):
    """logps and gradients of the row kernel, for a product of any V, in padded memory."""
    count, vocabulary = product.shape
    padded = -(-vocabulary // 64) * 64
    room = torch.full((count, padded), float("nan"), device=product.device)
    room[:, :vocabulary] = product
    gradients = torch.full_like(room, float("nan"), dtype=gradients_dtype)
    logps = torch.full_like(room[:, 0], float("nan"))
    score(room[:, :vocabulary], targets, bias, 1.0, softcap, logps, gradients[:, :vocabulary])
    assert not gradients[:, vocabulary:].any()
    return logps, gradients[:, :vocabulary]


def exact_scores(product, targets, softcap=None):
    product = product.double().requires_grad_()
    logits = product if softcap is None else softcap * torch.tanh(product / softcap)
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps.detach(), torch.autograd.grad(logps.sum(), product)[0]


def test_a_target_outside_the_vocabulary_gets_nan(device):
    """On a GPU nothing checks the range beforehand: no value outside the row may be read."""
    product = torch.randn(4, 70, device=device)
    targets = torch.tensor([-1, 69, 70, 2**40], device=device)
    logps, gradients = scored(product, targets)
    expected, expected_gradients = exact_scores(product[1:2], targets[1:2])
    assert logps.isnan().tolist() == [True, False, True, True]
    assert gradients.isnan().all(1).tolist() == [True, False, True, True]
    assert_near((logps[1:2], gradients[1:2]), (expected, expected_gradients))


def test_confident_and_hopeless_targets(device):
    """1 - p(target) keeps its relative accuracy where p is 1 to the last bit, and p where it is 0;
    large logits do not overflow, and of rows far apart none disturbs another."""
    product = torch.randn(6, 300, device=device)
    targets = torch.arange(6, device=device)
    product[0, 0] += 30
    product[1, 1] -= 200
    product[2] += 1e4
    product[3] -= 1e4
    product[4] *= 1e-6
    product[5] *= 50
    logps, gradients = scored(product, targets)
    expected, expected_gradients = exact_scores(product, targets)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=2e-6)
    chosen = gradients.gather(1, targets[:, None]).double()
    expected = expected_gradients.gather(1, targets[:, None])
    # 2^x errs by |x| roundings; below 1e-35 fp32 loses digits.
    torch.testing.assert_close(chosen, expected, rtol=3e-5, atol=1e-35)
    torch.testing.assert_close(gradients.double(), expected_gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_the_cap_keeps_its_accuracy_from_tiny_to_huge_logits(device, softcap):
    size = torch.logspace(-6, 3, 160, device=device)
    product = torch.cat((size, -size)).mul(softcap).expand(3, -1).contiguous()
    targets = torch.tensor([0, 90, 319], device=device)
    got = scored(product, targets, softcap=softcap)
    expected = exact_scores(product, targets, softcap)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=3e-5, atol=1e-12)


def test_logits_without_a_meaning_give_nan_and_never_a_number(device):
    """NaN, +inf and nothing but -inf: as log_softmax. A lone -inf has a probability of 0."""
    infinite = float("inf")
    product = torch.randn(5, 70, device=device)
    product[0, 3] = float("nan")
    product[1, 3] = infinite
    product[2] = -infinite
    product[3, 3] = -infinite
    targets = torch.tensor([0, 0, 0, 0, 1], device=device)
    bias = torch.zeros(70, device=device)
    logps, gradients = scored(product, targets, bias=bias)
    assert logps.isnan().tolist() == [True, True, True, False, False]
    assert gradients[:3].isnan().any(1).all()
    expected, expected_gradients = exact_scores(product[3:], targets[3:])
    assert_near((logps[3:], gradients[3:]), (expected, expected_gradients))
    assert gradients[3, 3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_repeated_rows_are_summed_in_fp32(device, dtype):
    unit = torch.randn(600, 33, device=device).to(dtype)
    grad = torch.randn(600, device=device)
    offsets = torch.tensor([0, 0, 512, 513, 513, 600, 600], device=device)
    out = sum_rows(unit, grad, offsets)
    assert out.dtype == dtype
    exact = (unit.double() * grad.double()[:, None]).split((0, 512, 1, 0, 87, 0))
    exact = torch.stack([x.sum(0) for x in exact])
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert ((out.double() - exact).abs() <= rounding + 600 * 2**-24 * 4).all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until touched")
def test_offsets_beyond_32_bits(device):
    """Rows 2^30 elements apart, of which only the first few exist in fact."""
    if device.type != "cpu":
        pytest.skip("a real matrix of this size is among the GPU tests")
    rows, stride, no_reserve = 3, 2**30, 0x4000
    memory = mmap.mmap(
        -1, 4 * rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    )
    room = torch.frombuffer(memory, dtype=torch.float32).view(rows, stride)
    product = room[:, :70]
    original = torch.randn(rows, 70)
    product.copy_(original)
    targets = torch.tensor([3, 1, 4])
    logps = torch.empty(rows)
    score(product, targets, None, 1.0, None, logps, product)
    assert_near((logps, product), exact_scores(original, targets))


def test_small_logits_lose_nothing_under_a_large_cap(device):
    """Where tanh(x) is nearly x: by 1 - exp(-2x) alone they would err five times as much."""
    product = torch.zeros(400, 2, device=device)
    product[:, 0] = torch.linspace(-1, 1, 400, device=device)
    targets = torch.zeros(400, dtype=torch.int64, device=device)
    logps, _ = scored(product, targets, softcap=50.0)
    expected, _ = exact_scores(product, targets, softcap=50.0)
    plain = (50.0 * torch.tanh(product / 50.0)).log_softmax(1)[:, 0]
    assert (logps - expected).abs().max() <= 2 * (plain - expected).abs().max()
