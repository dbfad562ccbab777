"""A packed row of tokens as a forest of prefix trees, and the index arrays that describe it.

Sequences that begin alike are merged token by token into a prefix tree (trie); the row is the tree
in depth-first order, and several trees in one row make a forest. One array says who sees whom:

    query i sees key j   <=>   j <= i < subtree_end[j]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scmini_kernels._radix import RadixForest, Runs, concatenated_ranges

IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
Ids: TypeAlias = Sequence[int] | NDArray[Any] | Tensor


class ScoredSequence(NamedTuple):
    """A sequence with its own choice of scored tokens (SFT on every assistant turn, for example).

    input_ids is 1-D, integer; scored is 1-D, bool, of the same length. Position 0 has no predictor
    and must not be scored.
    """

    input_ids: Ids
    scored: Sequence[bool] | NDArray[Any] | Tensor


SequenceLike: TypeAlias = ScoredSequence | tuple[Ids, Ids] | Ids


class SequenceEdges(NamedTuple):
    """Compressed rows: item i owns `indices[offsets[i]:offsets[i + 1]]`. Both int64."""

    offsets: Tensor
    indices: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PrefixTree:
    """A forest of token tries laid out depth first. Make one with `PrefixTree.pack`.

    T rows (trie nodes), E edges (scored trie nodes), S sequences, R root trees. Tensors are int64.

    Attributes:
        input_ids: (T,) the token of each row.
        position_ids: (T,) its depth in its tree; restarts where a branch leaves a shared prefix.
        subtree_end: (T,) one past the last row of its subtree.
        edge_rows: (E,) the row whose hidden state predicts the edge's token (its parent's row).
        edge_targets: (E,) the predicted token. An edge is listed once, in row order, however many
            sequences use it.
        sequence_edges: CSR over (S,): the edges that make up each sequence, first token first.
        group_of_sequence: (S,) index of the group that each sequence came in.
        num_flat_tokens: tokens in all sequences together, had nothing been shared.
        root_starts: R + 1 Python ints: first row of every root tree, then T. Trees never see each
            other, so attention is block-diagonal over them.
        unbranched: R bools: the root tree is one run, for which plain causal attention is exact.
        runs: the stretches between branchings, as NumPy arrays that stay on the host.
        depth: the largest number of tokens on a path; a sliding window this wide hides nothing.

    Tensors are made on the CPU; `to` moves them. Treat them as read-only: what is derived from
    them (attention masks) is kept on the object for all layers of a model to share.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    edge_rows: Tensor
    edge_targets: Tensor
    sequence_edges: SequenceEdges
    group_of_sequence: Tensor
    num_flat_tokens: int
    root_starts: tuple[int, ...]
    unbranched: tuple[bool, ...]
    runs: Runs
    depth: int
    # Transpose of sequence_edges: the sequences that use each edge. Backward of sequence_logps.
    edge_sequences: SequenceEdges
    cache: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        sequences_by_group: Sequence[Sequence[SequenceLike]],
        *,
        max_tokens: int | None = None,
    ) -> PrefixTree:
        """Merge the sequences of each group by equal token ids and lay the forest out in one row.

        Groups never share a token; within a group, sequences share their longest common prefixes
        (with different first tokens they become several root trees). Children keep the order of
        their first appearance, so a prompt's responses lie in the order given.

        Args:
            sequences_by_group: groups of sequences; a sequence is one of
                - a tuple (prompt_ids, response_ids): the response's tokens are scored, the first
                  of them by the last prompt token. An empty response is legal: it scores 0.
                - 1-D ids: every token after the first is scored;
                - a ScoredSequence: the tokens marked in its mask are scored.
                Ids are lists, NumPy arrays or tensors of non-negative integers.
            max_tokens: refuse a forest of more rows than this.

        Returns:
            The forest, on the CPU. Sequences are numbered in input order, group after group.

        Raises:
            ValueError: no group, an empty group or sequence, ids that are not 1-D non-negative
                integers, an empty prompt with a response, a scored first token, a forest larger
                than max_tokens. The message names group and sequence.
        """
        if len(sequences_by_group) == 0:
            raise ValueError("sequences_by_group is empty; expected at least one group")
        forest = RadixForest()
        lengths: list[int] = []
        scored: list[BoolArray] = []
        groups: list[int] = []
        for number, group in enumerate(sequences_by_group):
            for ids, mask in _parse_group(group, number):
                forest.insert(ids, number)
                lengths.append(len(ids))
                scored.append(mask)
                groups.append(number)
        if max_tokens is not None and forest.num_tokens > max_tokens:
            raise ValueError(
                f"the forest has {forest.num_tokens} tokens, "
                f"{forest.num_tokens - max_tokens} more than max_tokens={max_tokens}"
            )
        return _lay_out(
            forest, np.asarray(lengths), np.concatenate(scored), np.asarray(groups, dtype=np.int64)
        )

    @classmethod
    def count_tokens(cls, group: Sequence[SequenceLike]) -> int:
        """Rows that `pack([group])` would have, without building its arrays.

        Groups share nothing, so the counts of several groups add up. Raises as `pack` does.
        """
        forest = RadixForest()
        for ids, _ in _parse_group(group, 0):
            forest.insert(ids, 0)
        return forest.num_tokens

    @property
    def num_tokens(self) -> int:
        """T, the rows of the packed forest."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """S, the sequences that were packed."""
        return self.group_of_sequence.shape[0]

    @property
    def device(self) -> torch.device:
        """Where all tensors of the forest live."""
        return self.input_ids.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PrefixTree:
        """The same forest on `device`; itself when it is there already."""
        probe = self.input_ids.to(device, non_blocking=non_blocking)
        if probe.device == self.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=probe,
            position_ids=move(self.position_ids),
            subtree_end=move(self.subtree_end),
            edge_rows=move(self.edge_rows),
            edge_targets=move(self.edge_targets),
            sequence_edges=SequenceEdges(*map(move, self.sequence_edges)),
            group_of_sequence=move(self.group_of_sequence),
            edge_sequences=SequenceEdges(*map(move, self.edge_sequences)),
            cache={},
        )

    def sequence_logps(self, token_logps: Tensor) -> Tensor:
        """Log-probability of each sequence: the sum over its edges.

        Args:
            token_logps: (E,) floating point, in nats, one per edge, as `linear_logprob(hidden,
                lm_head, tree.edge_rows, tree.edge_targets)` returns them.

        Returns:
            (S,) fp32 (fp64 for fp64 input), in nats; 0 for a sequence without scored tokens.

        Gradients: to token_logps; an edge shared by several sequences gets the sum of theirs.
        Summed in fp64 and in a fixed order both ways, so rounding does not grow with length and
        results repeat bit for bit. Differentiable any number of times.

        Raises:
            ValueError: wrong shape, dtype or device.
        """
        expected = tuple(self.edge_rows.shape)
        if tuple(token_logps.shape) != expected or not token_logps.is_floating_point():
            raise ValueError(
                f"token_logps: expected floating point of shape {expected}, one per edge, "
                f"got {token_logps.dtype} of shape {tuple(token_logps.shape)}"
            )
        if token_logps.device != self.device:
            raise ValueError(f"token_logps is on {token_logps.device}, the tree on {self.device}")
        if token_logps.dtype != torch.float64:
            token_logps = token_logps.float()
        sums: Tensor = _GatherSum.apply(token_logps, self.sequence_edges, self.edge_sequences)
        return sums

    def reference_mask(self) -> Tensor:
        """(T, T) bool: row i may attend to column j. For tests and small forests: T^2 memory."""
        rows = torch.arange(self.num_tokens, device=self.device)
        return (rows[None, :] <= rows[:, None]) & (rows[:, None] < self.subtree_end[None, :])

    def __repr__(self) -> str:
        return (
            f"PrefixTree(num_sequences={self.num_sequences}, num_tokens={self.num_tokens}, "
            f"num_flat_tokens={self.num_flat_tokens}, trees={len(self.unbranched)}, "
            f"edges={self.edge_rows.shape[0]}, device='{self.device}')"
        )


class _GatherSum(torch.autograd.Function):
    """out[i] = sum of values over row i of a CSR; its gradient is the same with the transpose.

    One segment sum each way, instead of autograd's scatter-add, whose order is not fixed.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: SequenceEdges, transpose: SequenceEdges) -> Tensor:
        ctx.rows, ctx.transpose = rows, transpose
        gathered = values.double()[rows.indices]
        return torch.segment_reduce(gathered, "sum", offsets=rows.offsets, unsafe=True).to(
            values.dtype
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _GatherSum.apply(grads[0], ctx.transpose, ctx.rows), None, None


def _parse_group(group: Sequence[SequenceLike], number: int) -> list[tuple[IntArray, BoolArray]]:
    """(ids, scored mask) of every sequence of a group, checked."""
    if len(group) == 0:
        raise ValueError(f"group {number} is empty; expected at least one sequence")
    pair = isinstance(group, tuple) and len(group) == 2
    if pair and all(len(ids) == 0 or _is_scalar(ids[0]) for ids in group):  # type: ignore[arg-type]
        raise ValueError(
            f"group {number} is one (prompt, response) pair; expected a list of sequences: "
            "pack([[(prompt, response), ...], ...])"
        )
    return [
        _parse_sequence(sequence, f"group {number}, sequence {index}")
        for index, sequence in enumerate(group)
    ]


def _parse_sequence(sequence: SequenceLike, where: str) -> tuple[IntArray, BoolArray]:
    if isinstance(sequence, ScoredSequence):
        ids = _parse_ids(sequence.input_ids, where)
        scored = _to_numpy(sequence.scored, where)
        if scored.dtype != np.bool_ or scored.shape != ids.shape:
            raise ValueError(
                f"{where}: expected a bool mask `scored` of shape {ids.shape}, "
                f"got {scored.dtype} of shape {scored.shape}"
            )
        if len(ids) and scored[0]:
            raise ValueError(f"{where}: the first token has no predictor, so it cannot be scored")
    elif isinstance(sequence, tuple) and len(sequence) == 2 and not _is_scalar(sequence[0]):
        prompt = _parse_ids(sequence[0], f"{where}, prompt")
        response = _parse_ids(sequence[1], f"{where}, response")
        if len(response) and not len(prompt):
            raise ValueError(f"{where}: an empty prompt cannot predict the response's first token")
        ids = np.concatenate((prompt, response))
        scored = np.arange(len(ids)) >= len(prompt)
    else:
        ids = _parse_ids(sequence, where)
        scored = np.arange(len(ids)) >= 1
    if len(ids) == 0:
        raise ValueError(f"{where} is empty; expected at least one token")
    return ids, scored


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int) or getattr(value, "ndim", None) == 0


def _parse_ids(ids: Any, where: str) -> IntArray:
    array = _to_numpy(ids, where)
    if array.ndim != 1:
        raise ValueError(f"{where}: expected 1-D token ids, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integer token ids, got {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"{where}: token ids must not be negative, got {array.min()}")
    return array.astype(np.int64)


def _to_numpy(values: Any, where: str) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().numpy())
    try:
        return np.asarray(values)
    except ValueError as error:  # NumPy's answer to a ragged list
        raise ValueError(f"{where}: expected 1-D token ids, got nested lists") from error


def _lay_out(
    forest: RadixForest, lengths: IntArray, scored: BoolArray, groups: IntArray
) -> PrefixTree:
    """Depth-first rows, edges and CSR of a finished forest; all work over tokens is vectorised."""
    layout = forest.lay_out()
    rows = concatenated_ranges(*forest.sequence_runs(layout, lengths))
    # The predictor of a token is the token before it in any sequence that holds it: one parent.
    # (A sequence's first token gets a nonsense parent here; it is never scored.)
    parents = np.zeros(layout.num_tokens, dtype=np.int64)
    parents[rows[1:]] = rows[:-1]
    is_edge = np.zeros(layout.num_tokens, dtype=np.bool_)
    is_edge[rows[scored]] = True
    edge_of_row = np.cumsum(is_edge) - 1
    children = np.flatnonzero(is_edge)

    indices = edge_of_row[rows[scored]]
    owner = np.repeat(np.arange(len(lengths)), lengths)[scored]
    by_edge = np.argsort(indices, kind="stable")
    return PrefixTree(
        input_ids=torch.from_numpy(layout.input_ids),
        position_ids=torch.from_numpy(layout.position_ids),
        subtree_end=torch.from_numpy(layout.subtree_end),
        edge_rows=torch.from_numpy(parents[children]),
        edge_targets=torch.from_numpy(layout.input_ids[children]),
        sequence_edges=_csr(owner, len(lengths), indices),
        group_of_sequence=torch.from_numpy(groups),
        num_flat_tokens=int(lengths.sum()),
        root_starts=layout.root_starts,
        unbranched=layout.unbranched,
        runs=layout.runs,
        depth=int(lengths.max()),
        edge_sequences=_csr(indices[by_edge], len(children), owner[by_edge]),
    )


def _csr(owner: IntArray, size: int, indices: IntArray) -> SequenceEdges:
    """CSR of `indices` whose owners, ascending, are `owner`, out of `size`."""
    offsets = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=size), out=offsets[1:])
    return SequenceEdges(torch.from_numpy(offsets), torch.from_numpy(indices))
