"""The compressed trie behind `PrefixTree.pack`: work per sequence and per run, never per token."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]


class Runs(NamedTuple):
    """The unbranched stretches of a forest in row order, as (N,) int64 arrays on the host.

    A run is the tokens between two branchings. Run n covers rows [starts[n], ends[n]), which see
    the runs of its ancestors whole and itself causally; its keys are seen by the queries of rows
    [starts[n], subtree_ends[n]). parents[n] < n is the run it continues, -1 for a root's.
    """

    starts: IntArray
    ends: IntArray
    subtree_ends: IntArray
    parents: IntArray


class Layout(NamedTuple):
    """The forest in depth-first order: per row (T,), per root tree, and per run."""

    input_ids: IntArray
    position_ids: IntArray
    subtree_end: IntArray
    root_starts: tuple[int, ...]
    unbranched: tuple[bool, ...]
    runs: Runs
    run_starts: IntArray  # first row of each run, by the forest's own number

    @property
    def num_tokens(self) -> int:
        """T, the rows of the forest."""
        return len(self.input_ids)


class RadixForest:
    """Tries of token ids in which every unbranched run is one node.

    A run covers depths [begin, end) of `source`, a sequence that passes through it. A dict from
    first token to run holds the children, in the order in which they first appeared.
    """

    def __init__(self) -> None:
        self._source: list[IntArray] = []
        self._begin: list[int] = []
        self._end: list[int] = []
        self._parent: list[int] = []
        self._children: list[dict[int, int]] = []
        self._roots: dict[int, dict[int, int]] = {}  # group -> its root runs
        self._last_run: list[int] = []  # by sequence

    @property
    def num_tokens(self) -> int:
        """Trie nodes so far: the rows of the packed forest."""
        return sum(self._end) - sum(self._begin)

    def insert(self, ids: IntArray, group: int) -> None:
        """Merge a non-empty sequence into the trees of its group."""
        siblings = self._roots.setdefault(group, {})
        parent, depth = -1, 0
        while (run := siblings.get(int(ids[depth]))) is not None:
            stop = min(self._end[run], len(ids))
            differs = np.flatnonzero(self._source[run][depth:stop] != ids[depth:stop])
            if differs.size:
                depth += int(differs[0])
                parent = self._split(run, depth, siblings)
                siblings = self._children[parent]
                break
            if stop == len(ids):
                self._last_run.append(run)
                return
            if not self._children[run]:  # a prefix of ours so far: lengthen it, still one run
                self._source[run], self._end[run] = ids, len(ids)
                self._last_run.append(run)
                return
            siblings, parent, depth = self._children[run], run, stop
        self._last_run.append(self._add(ids, depth, len(ids), parent, siblings))

    def _add(
        self, ids: IntArray, begin: int, end: int, parent: int, siblings: dict[int, int]
    ) -> int:
        run = len(self._source)
        self._source.append(ids)
        self._begin.append(begin)
        self._end.append(end)
        self._parent.append(parent)
        self._children.append({})
        siblings[int(ids[begin])] = run  # an existing key keeps its place among its siblings
        return run

    def _split(self, run: int, at: int, siblings: dict[int, int]) -> int:
        """Cut a run at depth `at`; return the new upper half.

        The lower half keeps its number, so `_last_run` stays right: `sequence_runs` walks up from
        it and ignores what lies deeper than the sequence.
        """
        source = self._source[run]
        upper = self._add(source, self._begin[run], at, self._parent[run], siblings)
        self._children[upper][int(source[at])] = run
        self._begin[run], self._parent[run] = at, upper
        return upper

    def lay_out(self) -> Layout:
        """Rows in depth-first order, children in order of first appearance."""
        roots = [run for group in self._roots.values() for run in group.values()]
        order: list[int] = []
        stack = roots[::-1]
        while stack:
            run = stack.pop()
            order.append(run)
            stack.extend(reversed(self._children[run].values()))

        begin = np.asarray(self._begin, dtype=np.int64)
        counts = (np.asarray(self._end, dtype=np.int64) - begin)[order]
        ends = np.cumsum(counts)
        starts = np.empty(len(order), dtype=np.int64)
        starts[order] = ends - counts
        subtree_end = np.empty(len(order), dtype=np.int64)
        subtree_end[order] = ends
        for run in reversed(order):  # children before parents; the last child ends the subtree
            if self._children[run]:
                subtree_end[run] = subtree_end[next(reversed(self._children[run].values()))]

        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        parents = np.asarray(self._parent, dtype=np.int64)[order]
        runs = Runs(
            starts[order], ends, subtree_end[order], np.where(parents < 0, -1, place[parents])
        )
        return Layout(
            input_ids=np.concatenate(
                [self._source[run][self._begin[run] : self._end[run]] for run in order]
            ),
            position_ids=concatenated_ranges(begin[order], counts),
            subtree_end=np.repeat(subtree_end[order], counts),
            root_starts=(*starts[roots].tolist(), int(ends[-1])),
            unbranched=tuple(not self._children[run] for run in roots),
            runs=runs,
            run_starts=starts,
        )

    def sequence_runs(self, layout: Layout, lengths: NDArray[Any]) -> tuple[IntArray, IntArray]:
        """(first row, number of rows) of each stretch that makes up each sequence, in order."""
        firsts: list[int] = []
        counts: list[int] = []
        starts = layout.run_starts.tolist()
        for last, length in zip(self._last_run, lengths.tolist(), strict=True):
            path: list[int] = []
            run = last
            while run >= 0:
                if self._begin[run] < length:
                    path.append(run)
                run = self._parent[run]
            for run in reversed(path):
                firsts.append(starts[run])
                counts.append(min(self._end[run], length) - self._begin[run])
        return np.asarray(firsts, dtype=np.int64), np.asarray(counts, dtype=np.int64)


def concatenated_ranges(firsts: IntArray, counts: IntArray) -> IntArray:
    """The ranges [first, first + count) one after another."""
    shift = firsts - (np.cumsum(counts) - counts)
    return np.repeat(shift, counts) + np.arange(counts.sum(), dtype=np.int64)
