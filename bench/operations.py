"""The benchmarks of single operations: head, attention, packing.

Peers take turns, round after round; each round's order is rotated. On CUDA time is between two
events, with the second-level cache overwritten before; on the CPU it is the process's own seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import rows
import torch
from cases import (
    Case,
    Shape,
    as_row,
    attention_bytes,
    attention_flop,
    head_bytes,
    head_flop,
)
from memory import Peak
from peers import attentions, heads

from scmini_kernels import PrefixTree
from scmini_kernels._attention_plan import plan

WARM_UP = 3
CACHE_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU."""

Work = Callable[[], Any]


def measure(
    what: str, cases: Sequence[tuple[Shape, Case]], device: str, rounds: int
) -> Iterator[list[rows.Row]]:
    """The rows of one case after another, in bfloat16 on CUDA and float32 on the CPU."""
    head = rows.header(device, rows.new_run())
    head["ceilings"] = rows.ceilings(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    one = {"head": _head, "attention": _attention, "packing": _packing}[what]
    for shape, case in cases:
        common = {
            "what": what,
            **head,
            "case": {**as_row(shape, case), "prompts": 1},
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": rounds,
        }
        rows.say(f"{what}: P,R,k = {case}, {shape.name}, V = {shape.vocab}")
        yield one(common, shape, case, device, dtype)


def _head(
    common: rows.Row, shape: Shape, case: Case, device: str, dtype: torch.dtype
) -> list[rows.Row]:
    inputs = heads.problem(shape, case, device, dtype)
    targets = len(inputs.rows)
    found = []
    for mode in ("forward", "train", "dpo"):
        functions, absent = heads.peers(mode, device, dtype, case.k)
        works = {
            name: partial(_run_head, inputs, function, mode) for name, function in functions.items()
        }
        if mode != "dpo":
            works["bare products"] = partial(heads.floor, inputs, mode)
        # the whole loss of a pair: the policy's two products and the reference's one
        passes = ("train", "forward") if mode == "dpo" else (mode,)
        sizes = {
            "tokens": inputs.tree.num_tokens,
            "targets": targets,
            "tflop": sum(head_flop(shape, targets, each) for each in passes) / 1e12,
            "min_bytes": sum(head_bytes(shape, targets, each, dtype.itemsize) for each in passes),
        }
        errors = {
            name: partial(heads.errors, inputs, function, mode)
            for name, function in functions.items()
        }
        found += _measured(
            {**common, "mode": mode, "absent": absent, **sizes}, works, errors, device
        )
    return found


def _run_head(inputs: heads.Problem, function: heads.Function, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            function(inputs, inputs.hidden)
        return
    out = function(inputs, inputs.hidden.detach().requires_grad_())
    out.backward(inputs.upstream.to(out.dtype) if mode == "train" else None)


def _attention(
    common: rows.Row, shape: Shape, case: Case, device: str, dtype: torch.dtype
) -> list[rows.Row]:
    inputs = attentions.problem(shape, case, device, dtype)
    peers, absent = attentions.peers(inputs, device)
    found = []
    for mode in ("forward", "train"):
        sizes = {
            "tokens": inputs.tree.num_tokens,
            "responses": inputs.responses,
            "tflop": attention_flop(shape, inputs.pairs, mode) / 1e12,
            "min_bytes": attention_bytes(shape, inputs.tree.num_tokens, mode, dtype.itemsize),
        }
        works = {name: partial(_run_attention, peer, mode) for name, peer in peers.items()}
        errors = {
            name: partial(attentions.errors, inputs, peer, mode) for name, peer in peers.items()
        }
        found += _measured(
            {**common, "mode": mode, "absent": absent, **sizes}, works, errors, device
        )
    return found


def _run_attention(peer: attentions.Peer, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            peer.attend(*peer.inputs)
        return
    peer.attend(*(x.detach().requires_grad_() for x in peer.inputs)).backward(peer.upstream)


def _measured(
    common: rows.Row, works: dict[str, Work], errors: dict[str, Callable[[], Any]], device: str
) -> list[rows.Row]:
    """Rows of peers that take turns. One that fails is a row that says why, unless it is ours."""
    results: dict[str, rows.Row] = {}
    for name, work in works.items():
        try:
            error = errors[name]() if name in errors else None
            peak = Peak(device)
            for _ in range(WARM_UP):
                work()
            results[name] = {"error": error, **peak.read()}
        except torch.cuda.OutOfMemoryError:
            results[name] = {"failed": "out of memory"}
        except Exception as problem:
            if name.startswith("scmini"):
                raise
            first = str(problem).partition("\n")[0]
            results[name] = {"failed": f"{type(problem).__name__}: {first}"}
        if "failed" in results[name]:
            rows.say(f"  {common['mode']:8} {name:28} {results[name]['failed']}")
    samples = _interleaved(
        {n: w for n, w in works.items() if "failed" not in results[n]}, common["rounds"], device
    )
    found = []
    for name, result in results.items():
        row = {**common, "peer": name, **result}
        if name in samples:
            row["seconds"] = rows.spread(samples[name])
            row |= rows.shares(row, row["seconds"]["median"])
            rows.say(
                f"  {row['mode']:8} {name:28} {row['seconds']['median'] * 1e3:9.3f} ms "
                f"{row['tflops']:8.3f} TFLOP/s {row['peak_bytes'] / 2**20:8.1f} MiB {row['error']}"
            )
        found.append(row)
    return found


def _interleaved(works: dict[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    for number in range(rounds):
        turn = number % max(1, len(order))
        for name in [*order[turn:], *order[:turn]]:
            if cache is not None:
                cache.zero_()
            samples[name].append(rows.seconds(works[name], device))
    return samples


def _packing(
    common: rows.Row, shape: Shape, case: Case, device: str, dtype: torch.dtype
) -> list[rows.Row]:
    """What the host does for a batch before and beside the model, in seconds.

    "pack": sequences to index arrays. "move": to the device. What attention makes once for all
    layers: "plan", the rectangles for the CPU; "tiles", the tables of the Triton kernels.
    """
    inputs = heads.problem(shape, case, "cpu", torch.float32)
    group = _sequences(inputs.tree)
    calls: dict[str, list[float]] = {"pack": [], "move": [], "plan": []}
    flop_per_score = 14 * shape.heads * shape.head_dim
    for _ in range(common["rounds"]):
        start = _now(device)
        tree = PrefixTree.pack([group])
        packed = _now(device)
        tree = tree.to(device)
        moved = _now(device)
        plan(tree, None, flop_per_score)
        planned = _now(device)
        calls["pack"].append(packed - start)
        calls["move"].append(moved - packed)
        calls["plan"].append(planned - moved)
    if find_spec("triton"):
        calls["tiles"] = _tile_seconds(shape, group, device, common["rounds"])
    names = {"tokens": inputs.tree.num_tokens, "mode": "host"}
    found = []
    for name, samples in calls.items():
        found.append({**common, **names, "peer": name, "seconds": rows.spread(samples)})
        rows.say(f"  {name:8} {found[-1]['seconds']['median'] * 1e3:9.3f} ms")
    return found


def _tile_seconds(shape: Shape, group: list[Any], device: str, rounds: int) -> list[float]:
    """Of the tables for bf16 on a Hopper card of 132 multiprocessors, made on the host."""
    from scmini_kernels.triton.tiles import TileShape, attention_tiles
    from scmini_kernels.triton.tree_attention import choose_configuration

    chosen = choose_configuration(90, torch.bfloat16, shape.head_dim)
    heads_per_key = shape.heads // shape.kv_heads
    tiles = TileShape(
        queries=chosen.forward.queries // heads_per_key,
        gradient_queries=chosen.query_gradient.queries // heads_per_key,
        keys=chosen.key_gradient.keys,
        step=chosen.key_gradient.queries // heads_per_key,
        pieces=4 * 132 // shape.kv_heads,
        min_piece=2048 // heads_per_key,
    )
    found = []
    for _ in range(rounds + 1):  # the first warms up
        tree = PrefixTree.pack([group]).to(device)
        start = _now(device)
        attention_tiles(tree, tiles, None)
        found.append(_now(device) - start)
    return found[1:]


def _sequences(tree: PrefixTree) -> list[Any]:
    """(prompt, response) of each sequence of a tree with one prompt."""
    offsets = tree.sequence_edges.offsets.tolist()
    prompt = tree.input_ids[: int(tree.edge_rows.mode().values) + 1].numpy()
    responses = [
        tree.edge_targets[tree.sequence_edges.indices[start:stop]].numpy()
        for start, stop in pairwise(offsets)
    ]
    return [(prompt, response) for response in responses]


def _now(device: str) -> float:
    """Wall seconds with the GPU idle; on the CPU the seconds of this process."""
    if device != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
