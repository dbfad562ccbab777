"""Draw the pictures of docs/kernels.md and write its table of work.

    python bench/tree_pictures.py            docs/pictures/*.svg, and the table
    python bench/tree_pictures.py --check    exit 1 when a picture or the table is not what they are

Everything drawn is computed: rows and edges by `PrefixTree`, tiles by the tables that the kernels
read, work by bench/cases.py. Nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import documents
from cases import MISTRAL_7B, Case, Layout, counts, step_flop
from drawing import FAINT, INK, SOFT, Canvas

from scmini_kernels import PrefixTree
from scmini_kernels.triton.tiles import AttentionTiles, TileShape, attention_tiles

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
PICTURES = ROOT / "docs" / "pictures"
MARKERS = ("<!-- work:begin -->", "<!-- work:end -->")

PROMPT = ["Name", "a", "tree", "that", "grows", "fast", "."]
ANSWERS = [
    ["The", "willow", "does", "</s>"],
    ["A", "poplar", "</s>"],
    ["Birch", ",", "I", "think", "</s>"],
]
# Mid tones that are told apart by colour-blind readers too, and pale ones to stand behind text.
DARK = ("#59636e", "#0072b2", "#d55e00", "#007a59")
PALE = ("#e6eaef", "#cfe5f4", "#fbdcc6", "#cdebdf")
KEYS = 4
"""The drawn tiles have 4 positions of queries (16 packed rows, for groups of 4 heads) by 4 keys."""
SHAPE = TileShape(4, 4, KEYS, step=4, pieces=5, min_piece=8)
MARGIN, STEP, WIDTH, HEIGHT = 24.0, 49.0, 45.0, 30.0
"""Of a row of tokens."""
LAYOUTS: dict[Layout, tuple[str, str]] = {
    "pairs": ("2k sequences", DARK[2]),
    "grouped": ("k+1 sequences", DARK[3]),
    "trees": ("one prefix tree", DARK[1]),
}
TABLE = [(128, 128), (512, 256), (1024, 512), (256, 1024)]
KS = (1, 4, 8, 16)


def example() -> tuple[PrefixTree, list[str], list[int]]:
    """The worked example: its tree, each row's word, and the answer it is of (0: the prompt)."""
    words = list(dict.fromkeys(w for part in (PROMPT, *ANSWERS) for w in part))
    ids = {word: number for number, word in enumerate(words)}
    prompt = [ids[word] for word in PROMPT]
    tree = PrefixTree.pack([[(prompt, [ids[word] for word in answer]) for answer in ANSWERS]])
    owner = [0] * len(PROMPT)
    for number, answer in enumerate(ANSWERS, 1):
        owner += [number] * len(answer)
    return tree, [words[i] for i in tree.input_ids.tolist()], owner


def tree_picture() -> str:
    """The prompt with three answers as a tree, and as the packed row."""
    tree, words, owner = example()
    title = "A prompt with three answers as a prefix tree and as one packed row"
    canvas = Canvas(MARGIN * 2 + STEP * len(words), 462, title)
    head = "one node for each token; below it its depth, which is its position"
    _head(canvas, 30, "The prefix tree", head)
    last = MARGIN + STEP * len(PROMPT)
    levels = {0: 124.0, 1: 68.0, 2: 124.0, 3: 180.0}
    for answer in (1, 2, 3):
        middle, y = levels[0] + HEIGHT / 2, levels[answer] + HEIGHT / 2
        curve = f"M{last - 4} {middle}C{last + 20} {middle} {last + 12} {y} {last + 36} {y}"
        canvas.path(curve, DARK[answer], 2)
    for row, word in enumerate(words):
        who, depth = owner[row], int(tree.position_ids[row])
        x = last + 36 + (depth - len(PROMPT)) * STEP if who else MARGIN + depth * STEP
        _token(canvas, x, levels[who], word, who)
        canvas.text(x + WIDTH / 2, levels[who] + HEIGHT + 13, str(depth), 11, SOFT)
    head = (
        f"the tree in depth-first order: {tree.num_tokens} rows, where three sequences have "
        f"{tree.num_flat_tokens} tokens and two pairs {_pair_tokens()}"
    )
    _head(canvas, 262, "The packed row", head)
    rows = list(range(len(words)))
    for row, word in enumerate(words):
        _token(canvas, MARGIN + row * STEP, 298, word, owner[row])
    depth = "position_ids: the depth; it restarts behind the prompt with every answer"
    end = "subtree_end: one past the last row of the subtree"
    tables = (("row", rows), (depth, tree.position_ids), (end, tree.subtree_end))
    for number, (name, values) in enumerate(tables):
        y = 352 + 38 * number
        canvas.text(MARGIN, y, name, 11, SOFT, "start")
        for row in rows:
            canvas.text(MARGIN + row * STEP + WIDTH / 2, y + 17, str(int(values[row])), 12)
    return str(canvas)


def _head(canvas: Canvas, y: float, title: str, below: str) -> None:
    canvas.text(MARGIN, y, title, 15, bold=True, anchor="start")
    canvas.text(MARGIN, y + 19, below, 12, SOFT, "start")


def _pair_tokens() -> int:
    return sum(2 * len(PROMPT) + len(ANSWERS[0]) + len(answer) for answer in ANSWERS[1:])


def _token(canvas: Canvas, x: float, y: float, word: str, who: int) -> None:
    canvas.box(x, y, WIDTH, HEIGHT, PALE[who], DARK[who], 1.2, radius=4)
    canvas.text(x + WIDTH / 2, y + HEIGHT / 2 + 4, word, 12)


def mask_picture() -> str:
    """Who sees whom, with the tiles of the two walks drawn on it."""
    tree, _, owner = example()
    tiles = attention_tiles(tree, SHAPE, None)
    size, top, edge = 21.0, 100.0, 56.0
    total = tree.num_tokens * size
    title = "Who sees whom, and the tiles that are computed"
    canvas = Canvas(2 * (total + edge) + MARGIN, top + total + 92, title)
    heads = (
        ("Forward", "a tile of queries walks its keys up to the root"),
        ("Gradients of keys", "a tile of keys takes one range of queries"),
    )
    walks = list(_query_blocks(tiles)), list(_key_blocks(tiles))
    for number, (head, walk) in enumerate(zip(heads, walks, strict=True)):
        left = edge + number * (total + edge)
        canvas.text(left, 30, head[0], 15, bold=True, anchor="start")
        canvas.text(left, 49, head[1], 12, SOFT, "start")
        canvas.text(left + total / 2, top - 22, "keys j", 12, SOFT)
        canvas.text(left - 32, top + total / 2, "queries i", 12, SOFT, turned=True)
        _cells(canvas, tree, owner, left, top, size)
        for rows, columns, masked in walk:
            x, y = left + columns[0] * size + 1.5, top + rows[0] * size + 1.5
            width, height = ((b - a) * size - 3 for a, b in (columns, rows))
            canvas.box(x, y, width, height, "none", INK, 1.7, "4 3" if masked else "", 2)
        if number:
            for first, last, begin, _, _, slot in tiles.key_pieces.tolist():
                if slot >= 0 and begin > first:
                    start = left + first * size - 5
                    cut = f"M{start:g} {top + begin * size:g}h{(last - first) * size + 10:g}"
                    canvas.path(cut, DARK[2], 3)
    _mask_legend(canvas, edge, top + total + 32)
    grid = (-(-tree.num_tokens // KEYS)) ** 2
    text = f"No box: never computed. Of a grid of {grid} tiles the forward computes {len(walks[0])}"
    canvas.text(edge, top + total + 66, f"{text}, the gradient {len(walks[1])}.", 12, SOFT, "start")
    return str(canvas)


def _mask_legend(canvas: Canvas, x: float, y: float) -> None:
    canvas.box(x, y - 12, 22, 16, "none", INK, 1.7, "", 2)
    canvas.text(x + 30, y, "every pair is seen: no mask", 12, SOFT, "start")
    canvas.box(x + 230, y - 12, 22, 16, "none", INK, 1.7, "4 3", 2)
    canvas.text(x + 260, y, "computed with a mask", 12, SOFT, "start")
    canvas.path(f"M{x + 440:g} {y - 4:g}h22", DARK[2], 3)
    canvas.text(x + 470, y, "a long range is cut; its parts are summed in order", 12, SOFT, "start")


def _cells(
    canvas: Canvas, tree: PrefixTree, owner: Sequence[int], left: float, top: float, size: float
) -> None:
    total = tree.num_tokens * size
    for i, row in enumerate(tree.reference_mask().tolist()):
        for j, sees in enumerate(row):
            if sees:
                canvas.box(left + j * size, top + i * size, size, size, PALE[owner[j]])
    for line in range(tree.num_tokens + 1):
        at = line * size
        canvas.path(f"M{left} {top + at:g}h{total:g}M{left + at:g} {top}v{total:g}", FAINT, 0.6)
    for number in range(tree.num_tokens):
        color = DARK[owner[number]]
        canvas.text(left + (number + 0.5) * size, top - 6, str(number), 10, color)
        canvas.text(left - 5, top + (number + 0.5) * size + 4, str(number), 10, color, "end")


Block = tuple[tuple[int, int], tuple[int, int], bool]
"""(rows), (columns), whether a mask is needed."""


def _query_blocks(tiles: AttentionTiles) -> Iterator[Block]:
    """The blocks of the forward kernel, walking as it does: from a tile's own interval upwards."""
    nodes = tiles.nodes.tolist()
    for first, last, lo, bound, node in tiles.query_tiles.tolist():
        hi = last
        while lo < hi:
            steady = lo + (bound - lo) // KEYS * KEYS
            for start in range(lo, hi, KEYS):
                yield (first, last), (start, min(start + KEYS, hi)), start >= steady
            lo, hi, end, following = nodes[node]
            bound, node = (hi if end >= last else lo), following


def _key_blocks(tiles: AttentionTiles) -> Iterator[Block]:
    """The blocks of the key gradient kernel."""
    step = SHAPE.step
    for first, last, begin, steady, stop, _ in tiles.key_pieces.tolist():
        steady = stop - (stop - steady) // step * step
        for start in range(begin, steady, step):
            yield (start, min(start + step, steady)), (first, last), True
        for start in range(steady, stop, step):
            yield (start, start + step), (first, last), False


def edges_picture() -> str:
    """Which row predicts which token."""
    tree, words, owner = example()
    top = 190.0
    title = "Edges: which row's hidden state predicts which token"
    canvas = Canvas(MARGIN * 2 + STEP * len(words), 336, title)
    head = "from the row whose hidden state predicts to the token that it predicts"
    _head(canvas, 30, "Edges", f"{head}; the prompt itself is not scored")
    rows = tree.edge_rows.tolist()
    # The rows of the predicted tokens, ascending: here all but the prompt's.
    for parent, child in reversed(list(zip(rows, range(len(PROMPT), len(words)), strict=True))):
        x, to = (MARGIN + row * STEP + WIDTH / 2 for row in (parent, child))
        rise = 22 + 13.5 * (child - parent)
        curve = f"C{x:g} {top - rise:g} {to:g} {top - rise:g} {to:g} {top - 6:g}"
        canvas.path(f"M{x:g} {top:g}{curve}", DARK[owner[child]], 1.8)
        canvas.arrow(to, top, DARK[owner[child]])
    for row, word in enumerate(words):
        x = MARGIN + row * STEP
        _token(canvas, x, top, word, owner[row])
        canvas.text(x + WIDTH / 2, top + HEIGHT + 15, str(row), 11, SOFT)
    offsets, indices = (part.tolist() for part in tree.sequence_edges)
    for number, (start, stop) in enumerate(pairwise(offsets), 1):
        used = ", ".join(str(rows[edge]) for edge in indices[start:stop])
        y = top + HEIGHT + 28 + 22 * number
        canvas.box(MARGIN, y - 11, 12, 12, PALE[number], DARK[number], radius=2)
        text = f"log-probability of answer {number}: the sum over its edges, from rows {used}"
        canvas.text(MARGIN + 20, y, text, 13, INK, "start")
    return str(canvas)


def work_picture() -> str:
    """TFLOP of a step against k: where sharing gains much, and where little."""
    title = "Work of one DPO step against the number of rejected answers"
    canvas = Canvas(1000, 420, title)
    head = f"{MISTRAL_7B.name}, LoRA of rank {MISTRAL_7B.rank} on all linears, checkpointing"
    _head(canvas, 30, "Work of one DPO step", f"{head}, reference included; counted, not measured")
    for number, lengths in enumerate(((512, 256), (256, 1024))):
        _work_panel(canvas, 84 + number * 480, *lengths)
    return str(canvas)


def _work_panel(canvas: Canvas, left: float, p: int, r: int) -> None:
    top, width, height, ks = 100.0, 220.0, 262.0, range(1, 17)
    tflop = {layout: [work(Case(p, r, k), layout) for k in ks] for layout in LAYOUTS}
    highest = max(map(max, tflop.values()))
    quarter = next(q for q in (100, 200, 400, 500, 800, 1000) if 4 * q >= highest)
    text = f"P = {p} prompt tokens, R = {r} tokens an answer"
    canvas.text(left, top - 16, text, 13, INK, "start")
    for part in range(5):
        y = top + height - height * part / 4
        canvas.path(f"M{left} {y:g}h{width:g}", FAINT if part else SOFT, 1)
        canvas.text(left - 8, y + 4, f"{quarter * part:,}", 11, SOFT, "end")
    canvas.text(left - 50, top + height / 2, "TFLOP a step", 12, SOFT, turned=True)
    for k in KS:
        canvas.text(left + width * (k - 1) / 15, top + height + 18, str(k), 11, SOFT)
    canvas.text(left + width / 2, top + height + 40, "rejected answers k", 12, SOFT)
    for layout, (name, color) in LAYOUTS.items():
        points = [
            (left + width * (k - 1) / 15, top + height * (1 - value / (4 * quarter)))
            for k, value in zip(ks, tflop[layout], strict=True)
        ]
        canvas.path("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points), color, 2.2)
        for k in KS:
            canvas.dot(*points[k - 1], 3.2, color)
        x, y = points[-1]
        canvas.text(x + 10, y + 4, f"{name}: {tflop[layout][-1]:,.0f}", 12, color, "start", True)


def work(case: Case, layout: Layout) -> float:
    """TFLOP of one step of a 7B model."""
    return step_flop(MISTRAL_7B, counts(case, layout), checkpointing=True) / 1e12


def table() -> str:
    """Tokens and work for the usual lengths."""
    lines = [
        "| P, R | k | tokens, 2k : k+1 : tree | TFLOP, 2k : k+1 : tree | 2k / tree | k+1 / tree |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for p, r in TABLE:
        for k in KS:
            case = Case(p, r, k)
            tokens = " : ".join(f"{counts(case, layout).tokens:,}" for layout in LAYOUTS)
            pairs, grouped, trees = (work(case, layout) for layout in LAYOUTS)
            ratios = f"{pairs / trees:.2f} | {grouped / trees:.2f}"
            flop = f"{pairs:,.0f} : {grouped:,.0f} : {trees:,.0f}"
            lines.append(f"| {p}, {r} | {k} | {tokens} | {flop} | {ratios} |")
    return "\n".join(lines)


def texts() -> dict[Path, str]:
    """What the files should hold."""
    drawn = {
        "tree": tree_picture(),
        "mask": mask_picture(),
        "edges": edges_picture(),
        "work": work_picture(),
    }
    found = {PICTURES / f"{name}.svg": text for name, text in drawn.items()}
    document = DOCUMENT.read_text("utf-8")
    return {**found, DOCUMENT: documents.replaced(document, MARKERS, table(), str(DOCUMENT))}


def main(arguments: list[str] | None = None) -> int:
    options = documents.parser(__doc__).parse_args(arguments)
    return documents.finish(texts(), "tree_pictures.py", check=options.check)


if __name__ == "__main__":
    sys.exit(main())
