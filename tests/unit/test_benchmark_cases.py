"""The benchmarks' arithmetic: how much work a step is, counted and recounted."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scmini.training.batches import Group, cut
from scmini_kernels import PrefixTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import cases
import run
from cases import Case, Shape, counts, step_flop
from peers import models, trainers
from peers.implementations import IMPLEMENTATIONS, Setup

TINY = Shape("tiny", 2, 32, 4, 2, 8, 48, 64, rank=4)
CASE = Case(12, 7, 3, prompts=2)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((128, 128, 16), (464, 246, 132)),
        ((512, 256, 8), (703, 395, 164)),
        ((512, 256, 16), (1406, 747, 283)),
        ((1024, 512, 16), (2866, 1523, 584)),
        ((256, 1024, 16), (2388, 1269, 1039)),
    ],
)
def test_step_of_mistral_7b_in_tflop(
    case: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    shape = replace(cases.MISTRAL_7B, rank=0)
    found = [
        round(step_flop(shape, counts(Case(*case), layout), checkpointing=True) / 1e12)
        for layout in ("pairs", "grouped", "trees")
    ]
    assert tuple(found) == expected


@pytest.mark.parametrize("case", [CASE, Case(1, 1, 1), Case(5, 3, 4), Case(3, 9, 5, prompts=3)])
def test_counts_are_those_of_packed_rows(case: Case) -> None:
    prompts = trainers.random_prompts(case, 1000, seed=3)
    groups = [[(prompt, response) for response in responses] for prompt, responses in prompts]
    layouts: dict[cases.Layout, list[list[Any]]] = {
        "trees": groups,
        "grouped": [[sequence] for group in groups for sequence in group],
        "pairs": [[s] for group in groups for rejected in group[1:] for s in (group[0], rejected)],
        "split": [group[i : i + 2] for group in groups for i in range(0, case.k + 1, 2)],
    }
    for layout, sequences in layouts.items():
        tree = PrefixTree.pack(sequences)
        counted = counts(case, layout)
        assert counted.tokens == tree.num_tokens
        assert counted.targets == len(tree.edge_rows)
        assert counted.attention == int((tree.position_ids + 1).sum())


def test_knobs_cut_a_step_into_prompts_and_pairs() -> None:
    prompts = trainers.random_prompts(CASE, 1000, seed=3)
    groups = [
        Group.of_responses(str(number), prompt, responses)
        for number, (prompt, responses) in enumerate(prompts)
    ]
    pairs = [
        Group(group.id, [group.sequences[0], rejected], [CASE.response] * 2)
        for group in groups
        for rejected in group.sequences[1:]
    ]
    for name in ("trees", "grouped"):
        sizes = [len(batch.groups) for batch in cut(groups, IMPLEMENTATIONS[name].knob(CASE))]
        assert sizes == [1] * CASE.prompts
    batches = cut(pairs, IMPLEMENTATIONS["pairs"].knob(CASE))
    assert [len(batch.groups) for batch in batches] == [CASE.k] * CASE.prompts
    parts = [batch.parts for batch in cut(groups, IMPLEMENTATIONS["trees_split"].knob(CASE))]
    assert parts == [[(0, 2), (2, 4)]] * CASE.prompts


def test_linear_products_are_those_that_torch_counts() -> None:
    model = models.base_model(Setup(TINY, "cpu", quantised=False, checkpointing=False))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(10)[None])
    products = counter.get_flop_counts()["Global"]
    head = 2 * 10 * TINY.hidden * TINY.vocab
    counted = sum(
        products[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm) if op in products
    )
    # the rotary angles are a product, too: batched, so not among these
    assert counted == 2 * TINY.linear_weights * 10 + head


def test_what_a_step_adds_up_to() -> None:
    count = counts(CASE, "trees")
    plain = step_flop(TINY, count, checkpointing=False)
    no_reference = step_flop(TINY, count, checkpointing=False, reference=False)
    again = step_flop(TINY, count, checkpointing=True) - plain
    linear = 2 * TINY.linear_weights * count.tokens
    lora = 2 * TINY.lora_weights * count.tokens
    head = 2 * TINY.hidden * TINY.vocab * count.targets
    attention = 4 * TINY.layers * TINY.heads * TINY.head_dim * count.attention
    assert plain - no_reference == linear + attention + head
    assert again == linear + lora + attention
    rescored = step_flop(TINY, count, checkpointing=False, rescored=True)
    assert rescored - plain == linear + lora + attention + head
    three = step_flop(TINY, count, checkpointing=False, head_gemms=3)
    assert three - plain == head


def test_token_ratio_is_the_limit_of_counts() -> None:
    tokens = [counts(Case(200, 100, 8), layout).tokens for layout in ("pairs", "grouped", "trees")]
    assert cases.token_ratio(2.0, 8, "pairs") == pytest.approx(tokens[0] / tokens[2])
    assert cases.token_ratio(2.0, 8, "grouped") == pytest.approx(tokens[1] / tokens[2])


def test_selection_of_cases() -> None:
    usual = cases.selected("step", "cpu", None, None)
    names = [(str(case), case.prompts, shape.vocab) for shape, case in usual]
    assert names == [
        ("128,128,16", 1, 8192),
        ("512,256,8", 1, 8192),
        ("128,64,4", 2, 8192),
        ("128,64,4", 2, 32000),
    ]
    ((shape, case),) = cases.selected("step", "cpu", Case(128, 64, 4), 500)
    assert (shape.vocab, case.prompts) == (500, 2)
    for what in run.WITH_CASES:
        assert cases.selected(what, "cuda", None, None)
        assert cases.selected(what, "cpu", Case(4, 2, 1), None)[0][1] == Case(4, 2, 1)
    models_7b = [shape.name for shape, _ in cases.selected("attention", "cuda", None, None)]
    assert set(models_7b) == {"mistral-7b"}, "Llama-3-8B's attention is the same"
