"""Exact prefix-shared attention and logit-free token log-probabilities over one packed row."""

from scmini_kernels.linear_logprob import linear_logprob
from scmini_kernels.tree import PrefixTree
from scmini_kernels.tree_attention import tree_attention

__all__ = ["PrefixTree", "linear_logprob", "tree_attention"]
