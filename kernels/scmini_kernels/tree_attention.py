"""Attention over a packed forest of prefix trees: public function, checks, choice of the way."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from scmini_kernels.piecewise_attention import piecewise_attention
from scmini_kernels.reference import tree_attention_reference
from scmini_kernels.tree import PrefixTree

AttentionImpl: TypeAlias = Literal["auto", "triton", "torch", "reference"]
_IMPLS = ("auto", "triton", "torch", "reference")


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """Softmax attention in which each token sees exactly its own prefix of a packed forest.

    Equals, up to rounding,

        scores = scale * q @ k.mT                                  # (Hq, T, T)
        scores = softcap * tanh(scores / softcap)                  # with softcap
        scores[~tree.reference_mask()] = -inf
        out = scores.softmax(-1) @ v

    so every sequence of the forest gets the result of causal attention over it alone, and shared
    prefixes are computed once. T rows of the forest, Hq query heads, Hkv key heads, Dh head size.
    Rotary embeddings are the caller's: apply them with `tree.position_ids` beforehand.

    Args:
        q: (1, Hq, T, Dh) bf16, fp16, fp32 or fp64.
        k: (1, Hkv, T, Dh), q's dtype and device; Hkv divides Hq (grouped queries).
        v: like k.
        tree: the packed forest, on the same device.
        scale: factor on the scores; default Dh ** -0.5.
        window: a query sees itself and the window - 1 tokens before it, counted along the sequence
            (`position_ids`).
        softcap: bound on the scores, > 0; applied before the mask.
        impl: "triton" takes the Triton kernels (CUDA; bf16, fp16, fp32; Dh <= 256); "torch" takes
            PyTorch's fused attention on rectangles of what is visible; "reference" holds the
            (Hq, T, T) scores; "auto" takes "triton" for CUDA tensors it can serve (compute
            capability 8.0 or later, Triton installed), else "torch". A named choice never falls
            back.

    Returns:
        (1, Hq, T, Dh) in q's dtype.

    Gradients: to q, k and v, each only if it requires one. Deterministic. Differentiable once
    (RuntimeError after that).

    Memory: out, and (Hq, T) in fp32 kept for backward; tables of a few numbers per run, shared by
    all layers. "torch" masks small branching parts, and with softcap or off the CPU it holds the
    scores of one rectangle.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message gives expected and received.
    """
    _check(q, k, v, tree, window, softcap)
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLS)}, got {impl!r}")
    if window is not None and window >= tree.depth:
        window = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = "triton" if _triton_serves(q) else "torch"
    if impl == "reference":
        return tree_attention_reference(q, k, v, tree, scale, window, softcap)
    if impl == "triton":
        # Imported late: the package works where Triton is not installed.
        from scmini_kernels.triton.tree_attention import triton_attention

        return triton_attention(q, k, v, tree, scale, window, softcap)
    return piecewise_attention(q, k, v, tree, scale, window, softcap)


def _triton_serves(q: Tensor) -> bool:
    """Whether the kernels can run: they multiply in bf16, which began with Ampere (8.0)."""
    return (
        q.is_cuda
        and q.dtype != torch.float64
        and q.shape[-1] <= 256
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, window: int | None, softcap: float | None
) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != tree.num_tokens:
        raise ValueError(
            f"q: expected shape (1, Hq, {tree.num_tokens}, Dh), T = {tree.num_tokens} being the "
            f"rows of the tree, got {tuple(q.shape)}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point dtype, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        expected = (1, k.shape[1] if k.dim() == 4 else "Hkv", q.shape[2], q.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, expected a multiple of the {k.shape[1]} heads of k and v"
        )
    if tree.device != q.device:
        raise ValueError(f"tree: expected q's device {q.device}, got {tree.device}; use tree.to()")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 (the query itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
