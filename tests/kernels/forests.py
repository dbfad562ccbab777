"""Forests to test with: a pure-Python twin of the packer and hypothesis strategies."""

from dataclasses import dataclass, field

import hypothesis.strategies as st


@dataclass
class Twin:
    """What `PrefixTree.pack` must produce, as plain lists."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    subtree_end: list[int] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    sequence_edges: list[list[tuple[int, int]]] = field(default_factory=list)
    group_of_sequence: list[int] = field(default_factory=list)
    root_starts: list[int] = field(default_factory=list)
    unbranched: list[bool] = field(default_factory=list)


@dataclass(eq=False)
class _Node:
    token: int
    children: dict[int, "_Node"] = field(default_factory=dict)
    scored: bool = False
    row: int = -1


def twin(groups: list[list[tuple[list[int], list[bool]]]]) -> Twin:
    """Pack groups of (ids, scored mask) one token at a time, one node per token."""
    result = Twin()
    for number, group in enumerate(groups):
        top = _Node(-1)
        paths = []
        for ids, scored in group:
            node, path = top, []
            for token, is_scored in zip(ids, scored, strict=True):
                node = node.children.setdefault(token, _Node(token))
                node.scored |= is_scored
                path.append(node)
            paths.append(path)
        for root in top.children.values():
            result.root_starts.append(len(result.input_ids))
            result.unbranched.append(_emit(root, -1, 0, result))
        for path, (_, scored) in zip(paths, group, strict=True):
            result.sequence_edges.append(
                [(path[i - 1].row, path[i].token) for i in range(len(path)) if scored[i]]
            )
            result.group_of_sequence.append(number)
    result.root_starts.append(len(result.input_ids))
    return result


def _emit(node: _Node, parent_row: int, depth: int, result: Twin) -> bool:
    """Append a subtree depth first; whether it is one run."""
    node.row = len(result.input_ids)
    result.input_ids.append(node.token)
    result.position_ids.append(depth)
    result.subtree_end.append(-1)
    if node.scored:
        result.edges.append((parent_row, node.token))
    runs = [_emit(child, node.row, depth + 1, result) for child in node.children.values()]
    result.subtree_end[node.row] = len(result.input_ids)
    return len(runs) <= 1 and all(runs)


# Three letters only: prefixes, repeats and shared beginnings come by themselves.
_ids = st.lists(st.integers(0, 2), max_size=9)
_pair = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), _ids)


@st.composite
def _shared_prompt_group(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    return [(prompt, ids) for ids in draw(st.lists(_ids, min_size=1, max_size=5))]


def pair_forests() -> st.SearchStrategy[list[list[tuple[list[int], list[int]]]]]:
    """Lists of groups of (prompt, response): empty, one-token, equal and nested ones included."""
    group = st.one_of(_shared_prompt_group(), st.lists(_pair, min_size=1, max_size=5))
    return st.lists(group, min_size=1, max_size=4)
