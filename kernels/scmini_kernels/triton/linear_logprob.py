# mypy: disable-error-code="no-untyped-def"
"""Row kernels of `linear_logprob`: from raw logits to log-probabilities and their gradients.

The two matrix products stay with the GEMM library; what stands between them, one pass over a row
of logits for its log-sum-exp and one for its gradient, is here, and the sum over repeated rows in
backward. The one-pass log-sum-exp is that of Milakov and Gimelshein, "Online normalizer calculation
for softmax" (arXiv 1805.02867), in base 2, which is what the hardware has.

Nothing here multiplies matrices, uses atomics or depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from scmini_kernels.triton.variants import Variant

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Below every logit, and yet finite: lowest - lowest is 0 where inf - inf would be NaN.
_LOWEST = tl.constexpr(-1e38)

_SCORE = {"BLOCK": 4096, "num_warps": 8, "num_stages": 1}
_SUM = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}


@triton.jit
def _logit(product, bias, columns, mask, logit_scale, HAS_BIAS: tl.constexpr):
    """logit_scale * (product + bias) at `columns`; 0 where masked out."""
    value = tl.load(product + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=mask, other=0.0)
    return value * logit_scale


@triton.jit
def _tanh(x):
    """tanh(x) and its derivative, to fp32 accuracy: a series near 0, where 1 - t would cancel."""
    size = tl.abs(x)
    t = tl.exp2(size * (-2.0 * 1.4426950408889634))
    square = x * x
    series = square * 0.021869488536155203 - 0.05396825396825397
    series = (series * square + 0.13333333333333333) * square - 0.3333333333333333
    near = (series * square + 1.0) * size
    value = tl.where(size < 0.25, near, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0, -value, value), t * 4.0 / ((1.0 + t) * (1.0 + t))


@triton.jit
def _cap(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x."""
    if HAS_SOFTCAP:
        bounded, _ = _tanh(x / softcap)
        x = bounded * softcap
    return x


@triton.jit(do_not_specialize=["vocabulary"], do_not_specialize_on_alignment=["targets", "logps"])
def _score_kernel(
    product,
    bias,
    targets,
    logps,
    gradients,
    vocabulary,
    product_stride,
    gradient_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program scores one row. Loads and stores run to the end of the padded row: whole vectors
    whatever the vocabulary size. `product` and `gradients` may be the same memory."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocabulary)
    chosen = _logit(product, bias, target, inside, logit_scale, HAS_BIAS)
    # A target outside the vocabulary makes everything of its row NaN.
    chosen = tl.where(inside, _cap(chosen, softcap, HAS_SOFTCAP), float("nan"))

    # Each lane sums 2^((x - biggest) log2 e) over its own columns. The target is left out, so that
    # 1 - p(target), its gradient, comes from a sum and not from a difference.
    biggest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        x = _logit(product, bias, columns, columns < product_stride, logit_scale, HAS_BIAS)
        x = _cap(x, softcap, HAS_SOFTCAP)
        x = tl.where((columns < vocabulary) & (columns != target), x, float("-inf"))
        gap = x - biggest
        # Of the two factors, 2^(old - new) and 2^(x - new), one is always 1.
        factor = tl.exp2(-tl.abs(gap) * _LOG2E)
        total = tl.where(gap > 0, total * factor + 1.0, total + factor)
        biggest = tl.maximum(biggest, x)
    top = tl.maximum(tl.max(biggest, axis=0), chosen)
    others = tl.sum(total * tl.exp2((biggest - top) * _LOG2E), axis=0)
    whole = others + tl.exp2((chosen - top) * _LOG2E)
    tl.store(logps + row, (chosen - top) - tl.log2(whole) * _LN2)

    if HAS_GRADIENT:
        gradients += row * gradient_stride
        # Backwards: the end of the row was read last and is the likeliest to be in a cache.
        final = (vocabulary - 1) // BLOCK * BLOCK
        for back in range(0, vocabulary, BLOCK):
            columns = final - back + lanes
            x = _logit(product, bias, columns, columns < product_stride, logit_scale, HAS_BIAS)
            if HAS_SOFTCAP:
                bounded, slope = _tanh(x / softcap)
                x = bounded * softcap
            gradient = -tl.exp2((x - top) * _LOG2E) / whole
            gradient = tl.where(columns == target, others / whole, gradient) * logit_scale
            if HAS_SOFTCAP:
                gradient *= slope
            gradient = tl.where(columns < vocabulary, gradient, 0.0)
            gradient = gradient.to(gradients.dtype.element_ty)
            tl.store(gradients + columns, gradient, mask=columns < gradient_stride)


@triton.jit
def _sum_rows_kernel(unit, grad, offsets, out, size, BLOCK: tl.constexpr):
    """One program sums one block of columns of one row, term after term."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    terms = unit + first * size + columns
    total = tl.zeros([BLOCK], tl.float32)
    for term in range(first, last):
        # Widened at once: the interpreter has no bf16 arithmetic.
        total += tl.load(terms, mask=mask, other=0.0).to(tl.float32) * tl.load(grad + term)
        terms += size
    tl.store(out + row * size + columns, total.to(out.dtype.element_ty), mask=mask)


# Whether the kernels were made for Triton's interpreter, which runs on CPU tensors.
INTERPRETED = not isinstance(_score_kernel, triton.JITFunction)


def score(
    product: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logps: Tensor,
    gradients: Tensor | None,
) -> None:
    """Log-probabilities of the targets and, if asked, their gradients at `product`.

    Args:
        product: (C, V) fp32, hidden @ lm_head.T. Its row stride is a multiple of 16, and memory up
            to the end of the last stride belongs to it; what stands there does not matter.
        targets: (C,) int64. One outside [0, V) gets NaN, in logps and in its row of gradients.
        bias: (V,) or None.
        logit_scale: factor on product + bias.
        softcap: bound on the scaled logits, or None.
        logps: (C,) fp32, overwritten.
        gradients: (C, V) bf16, fp16 or fp32, laid out like product, overwritten (with zeros in the
            padding of the rows). May be product itself.
    """
    count, vocabulary = product.shape
    stride = product.stride(0)
    with torch.cuda.device_of(product):
        if bias is not None:
            bias = F.pad(bias.float(), (0, stride - vocabulary))
        _score_kernel[(count,)](
            product,
            product if bias is None else bias,
            targets.contiguous(),
            logps,
            product if gradients is None else gradients,
            vocabulary,
            stride,
            stride if gradients is None else gradients.stride(0),
            float(logit_scale),
            float(softcap or 1.0),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_GRADIENT=gradients is not None,
            **_SCORE,
        )


def sum_rows(unit: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """out[t] = sum of grad[m] * unit[m] over offsets[t] <= m < offsets[t + 1], in order, in fp32.

    unit (M, D), grad (M,) fp32, offsets (T + 1,) int64, all contiguous; returns (T, D) in unit's
    dtype, zeros where there is nothing to add.
    """
    rows, size = len(offsets) - 1, unit.shape[1]
    out = unit.new_empty(rows, size)
    grid = (rows, triton.cdiv(size, _SUM["BLOCK"]))
    if out.numel():
        with torch.cuda.device_of(unit):
            _sum_rows_kernel[grid](unit, grad, offsets, out, size, **_SUM)
    return out


def variants(capability: int) -> list[Variant]:
    """Everything that the launchers compile for a card; the same for every compute capability.

    fp16 is left out: it differs from bf16 in the last instruction of the store. So are hidden sizes
    that are no multiple of 16, which no model has; they cost nothing but speed.
    """
    score_arguments = {
        "product": "*fp32",
        "bias": "*fp32",
        "targets": "*i64",
        "logps": "*fp32",
        "gradients": "*fp32",
        "vocabulary": "i32",
        "product_stride": "i32",
        "gradient_stride": "i32",
        "logit_scale": "fp32",
        "softcap": "fp32",
    }
    aligned = ("product", "bias", "gradients", "product_stride", "gradient_stride")
    found = []
    for dtype in (None, "bf16", "fp32"):
        for bias in (False, True):
            for softcap in (False, True):
                options = "/bias" * bias + "/softcap" * softcap
                constants = {
                    "HAS_BIAS": bias,
                    "HAS_SOFTCAP": softcap,
                    "HAS_GRADIENT": dtype is not None,
                    "BLOCK": _SCORE["BLOCK"],
                }
                found.append(
                    Variant(
                        f"score/{dtype or 'no gradient'}{options}",
                        _score_kernel,
                        score_arguments | {"gradients": f"*{dtype or 'fp32'}"},
                        constants,
                        aligned,
                        _SCORE["num_warps"],
                        _SCORE["num_stages"],
                    )
                )
    for dtype in ("bf16", "fp32"):
        pointers = {"unit": f"*{dtype}", "grad": "*fp32", "offsets": "*i64", "out": f"*{dtype}"}
        found.append(
            Variant(
                f"sum_rows/{dtype}",
                _sum_rows_kernel,
                {**pointers, "size": "i32"},
                {"BLOCK": _SUM["BLOCK"]},
                (*pointers, "size"),
                _SUM["num_warps"],
                _SUM["num_stages"],
            )
        )
    return found
