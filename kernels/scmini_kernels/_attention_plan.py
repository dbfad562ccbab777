"""How to cut the attention of a forest into rectangles: what the mask excludes is left out.

A plan covers every visible (query, key) pair once, by two sorts of pieces. An *own* piece is a
range of rows attending to itself: one run causally, or a few small subtrees under a mask. A *cross*
piece is all that follows a run in its subtree attending to that run, without a mask. Many small
pieces cost more in calls than one masked piece costs in wasted scores, so for every subtree the
cheaper of the two is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from scmini_kernels._radix import Runs
from scmini_kernels.tree import PrefixTree

# In units of one score (a query against a key, all heads, forward and backward), a call costs
# CALL_FLOP / (FLOP per score): 0.08 ms at 100 GFLOP/s, as measured on one core of a server CPU.
# MERGE is what rescaling one row by the log-sum-exp costs.
CALL_FLOP = 8e6
MERGE = 8
# PyTorch's fused CPU attention takes keys in blocks of this many, so causal calls save nothing
# within one.
KEY_BLOCK = 512


class Piece(NamedTuple):
    """Queries of rows [q_start, q_stop) against keys of rows [k_start, k_stop).

    kind "causal": equal ranges, plain causal, `repeats` neighbours of one length after another.
    kind "tree": equal ranges, or keys from before; visible by subtree_end and window.
    kind "full": every key is visible to every query.
    """

    kind: str
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    repeats: int = 1

    def continues(self, start: int, length: int) -> bool:
        """Whether a run of `length` rows from `start` on makes one batch with this piece."""
        same_length = self.q_stop - self.q_start == self.repeats * length
        return self.kind == "causal" and self.q_stop == start and same_length


def plan(tree: PrefixTree, window: int | None, flop_per_score: float) -> list[Piece]:
    """The pieces, own ones first.

    Every row is a query of exactly one own piece, so those write their result and the cross pieces
    merge theirs in.
    """
    planner = _Planner(tree.runs, window, CALL_FLOP / flop_per_score)
    planner.cut()
    return planner.own + planner.cross


class _Planner:
    """Costs from the leaves up, then pieces in row order."""

    def __init__(self, runs: Runs, window: int | None, call: float) -> None:
        self.call, self.window = call, window
        self.own: list[Piece] = []
        self.cross: list[Piece] = []
        self.starts, self.ends, self.stops, self.parents = (x.tolist() for x in runs)
        self.cost = [0.0] * len(self.starts)
        self.split = [False] * len(self.starts)
        self._weigh()

    def _weigh(self) -> None:
        """Per subtree, the cost of the cheaper way and whether that is to split off its run."""
        count = len(self.starts)
        begin, deepest, below = [0] * count, [0] * count, [0.0] * count
        for n, parent in enumerate(self.parents):
            if parent >= 0:
                begin[n] = begin[parent] + self.ends[parent] - self.starts[parent]
        for n in range(count - 1, -1, -1):
            length, rest = self.ends[n] - self.starts[n], self.stops[n] - self.ends[n]
            deepest[n] = max(deepest[n], begin[n] + length)
            own = self.call + self._run_scores(length)
            if rest == 0:
                self.cost[n] = own
            else:
                whole = self.call + (length + rest) ** 2
                apart = own + self.call + rest * (length + MERGE) + below[n]
                # A cross piece has no mask, so the window must not hide its first key.
                hides = self.window is not None and deepest[n] - begin[n] > self.window
                self.split[n] = apart < whole and not hides
                self.cost[n] = apart if self.split[n] else whole
            parent = self.parents[n]
            if parent >= 0:
                deepest[parent] = max(deepest[parent], deepest[n])
                below[parent] += self.cost[n]

    def _run_scores(self, length: int) -> float:
        if self.window is not None and self.window < length:
            return 2.0 * length * self.window
        return length * (length + min(length, KEY_BLOCK)) / 2

    def cut(self) -> None:
        """Own and cross pieces; neighbouring subtrees share a masked piece where it is cheaper.

        Neighbours need no common parent: rows of whole subtrees see nothing outside but ancestors,
        whose keys come by the cross pieces.
        """
        done, joined = 0, list[int]()
        for n, start in enumerate(self.starts):
            if start < done:
                continue  # inside a subtree that is taken whole
            if self.split[n]:
                self._close(joined)
                joined = []
                self._run(n)
                done = self.ends[n]
                self.cross.append(Piece("full", done, self.stops[n], start, done))
                continue
            done = self.stops[n]
            size = done - start
            if joined and size * (2 * (start - self.starts[joined[0]]) + size) < self.cost[n]:
                joined.append(n)
            else:
                self._close(joined)
                joined = [n]
        self._close(joined)

    def _close(self, joined: list[int]) -> None:
        if not joined:
            return
        first, last = joined[0], joined[-1]
        if first == last and self.ends[first] == self.stops[first]:
            self._run(first)
        else:
            start, stop = self.starts[first], self.stops[last]
            self.own.append(Piece("tree", start, stop, start, stop))

    def _run(self, n: int) -> None:
        start, end = self.starts[n], self.ends[n]
        previous = self.own[-1] if self.own else None
        if self.window is not None and self.window < end - start:
            step = max(self.window, 64)
            for first in range(start, end, step):
                last = min(first + step, end)
                keys = max(start, first - self.window + 1)
                self.own.append(Piece("tree", first, last, keys, last))
        elif previous and previous.continues(start, end - start):
            self.own[-1] = previous._replace(q_stop=end, k_stop=end, repeats=previous.repeats + 1)
        else:
            self.own.append(Piece("causal", start, end, start, end))
