"""Both operations in plain, obvious PyTorch: the truth that every implementation is held to.

Nothing here is fast or frugal. Gradients come from autograd; fp64 inputs are computed in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scmini_kernels.tree import PrefixTree


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for operands of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention under a bool mask.

    q (B, Hq, T, Dh), k and v (B, Hkv, T, Dh), mask (T, T), True where query row sees key column.
    Computed in fp32 at least; returns (B, Hq, T, Dh) in q's dtype.
    """
    dtype = at_least_fp32(q.dtype)
    heads_per_key = q.shape[1] // k.shape[1]
    k = k.to(dtype).repeat_interleave(heads_per_key, dim=1)
    v = v.to(dtype).repeat_interleave(heads_per_key, dim=1)
    scores = q.to(dtype) @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v).to(q.dtype)


def tree_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over the whole row under one dense (T, T) mask. Arguments: see `tree_attention`."""
    mask = tree.reference_mask()
    if window is not None:
        distance = tree.position_ids[:, None] - tree.position_ids[None, :]
        mask = mask & (distance < window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return masked_attention(q, k, v, mask, scale, softcap)


def linear_logprob_reference(
    hidden_states: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Token log-probabilities from the whole (M, V) logits. Arguments: see `linear_logprob`."""
    dtype = at_least_fp32(hidden_states.dtype)
    logits = hidden_states[rows].to(dtype) @ lm_head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
