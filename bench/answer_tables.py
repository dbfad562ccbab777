"""What the documents say of the benchmarks filter and sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cells import seconds, table
from peers.names import OURS, OURS_VLLM, PLAIN, STAGE
from rows import Row

_MODES = {
    "memory": "from float16 vectors in memory",
    "memory, float32": "products alone, of float32 unit vectors in memory",
    "shards": "from shards on disk",
}


def filter_section(rows: Sequence[Row]) -> list[str]:
    """A table per mode and size."""
    parts = []
    einsum = fastest_einsum(rows)
    for mode, words in _MODES.items():
        for case in _cases([row for row in rows if row["mode"] == mode]):
            mine = [row for row in rows if row["mode"] == mode and row["case"] == case]
            title = f"**{_filter_case(case)}: {words}**"
            parts += [title, _filter_table(mine, einsum)]
    return parts


def fastest_einsum(rows: Sequence[Row]) -> Row:
    """The in-memory einsum that all rates are compared with: the fastest one from float16."""
    found = [row for row in rows if row["mode"] == "memory" and "einsum" in row["peer"]]
    return max(found, key=lambda row: row["dots_per_second"])


def filter_summary(rows: Sequence[Row]) -> Iterator[str]:
    """One paragraph, if the largest case from shards is there."""
    rows = [row for row in rows if row["what"] == "filter"]
    whole = {r["peer"]: r["dots_per_second"] for r in rows if r["mode"] == "memory"}
    shards = [row for row in rows if row["mode"] == "shards"]
    if not whole or not shards:
        return
    einsum = fastest_einsum(rows)["peer"]
    case = max((row["case"] for row in shards), key=lambda case: case["prompts"])
    by_peer = {row["peer"]: row for row in shards if row["case"] == case}
    ours, stage = by_peer[OURS], by_peer[STAGE]
    plain, fastest = (ours["dots_per_second"] / rate for rate in (whole[PLAIN], whole[einsum]))
    yield (
        f"**Filter**, {_filter_case(case)}, one thread: the cosines in "
        f"{ours['seconds']['median']:.3g} s from shards on disk, "
        f"{plain:.2f} times the rate of a {PLAIN} over the part that fits into memory and "
        f"{fastest:.2f} times that of the fastest one ({einsum}), both from float16; the whole "
        f"stage in "
        f"{stage['seconds']['median']:.3g} s, {stage['total_peak_bytes'] / 2**30:.2f} GiB resident."
    )


def sample_section(rows: Sequence[Row]) -> list[str]:
    """A table per case."""
    heads = [
        "Engine",
        "Tokens/s",
        "of the bare loop",
        "Processor seconds (p20 to p80)",
        "Wall seconds (p20 to p80)",
        "Start, s",
        "Resident, MiB",
    ]
    parts = []
    for case in _cases(rows):
        mine = [row for row in rows if row["case"] == case]
        first = mine[0]
        title = f"**{_sample_case(case)}: {case['model']}, {first['dtype']}, LoRA {first['rank']}**"
        parts += [title, table(heads, [_sample_line(row) for row in mine])]
    return parts


def sample_summary(rows: Sequence[Row]) -> Iterator[str]:
    """One paragraph, if our vLLM path was compared with the bare loop."""
    mine = [row for row in rows if row["what"] == "sample" and row["peer"] == OURS_VLLM]
    mine = [row for row in mine if "of_bare" in row]
    if not mine:
        return
    shares = " and ".join(f"{row['of_bare']:.2f}" for row in mine)
    cases = " and ".join(_sample_case(row["case"]) for row in mine)
    clock = "processor seconds" if mine[0]["device"] == "cpu" else "seconds"
    yield (
        f"**Sampling** with vLLM ({mine[0]['case']['model']} with LoRA; {cases}): {shares} of the "
        f"tokens per second ({clock}) of a bare vLLM loop, with answers written to shards."
    )


def _cases(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["case"] not in found:
            found.append(row["case"])
    return found


def _filter_case(case: dict[str, Any]) -> str:
    return (
        f"{case['prompts']:,} prompts x {case['answers']} answers x {case['dimensions']:,} "
        "dimensions"
    )


def _sample_case(case: dict[str, Any]) -> str:
    return f"{case['prompts']} prompts x {case['answers']} answers x {case['new_tokens']} tokens"


def _filter_table(rows: Sequence[Row], einsum: Row) -> str:
    heads = [
        "Implementation",
        "Processor seconds (p20 to p80)",
        "Wall seconds",
        "Million cosines/s",
        "of the fastest einsum",
        "GB/s of vectors",
        "Peak above start, MiB",
        "Peak, MiB",
        "GB from disk, at most",
        "Error",
    ]
    lines = []
    for row in rows:
        share = row["dots_per_second"] / einsum["dots_per_second"]
        cosines = row["error"] is not None
        lines.append(
            [
                row["peer"],
                seconds(row),
                f"{row['wall_seconds']['median']:.3g}",
                f"{row['dots_per_second'] / 1e6:.3g}" if cosines else "",
                f"{share:.2f}" if cosines else "",
                f"{row['gbps']:.3g}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['total_peak_bytes'] / 2**20:,.0f}" if row["mode"] == "shards" else "",
                f"{row['disk_bytes'] / 1e9:.1f}" if row["mode"] == "shards" else "",
                f"{row['error']['value']:.0e}" if cosines else "",
            ]
        )
    return table(heads, lines)


def _sample_line(row: Row) -> list[str]:
    return [
        row["peer"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['of_bare']:.2f}" if "of_bare" in row else "",
        seconds(row),
        seconds(row, "wall_seconds"),
        f"{row['start_seconds']:.0f}",
        f"{row['total_peak_bytes'] / 2**20:,.0f}" if "total_peak_bytes" in row else "",
    ]
