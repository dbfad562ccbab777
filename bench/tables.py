"""What docs/benchmarks.md says in numbers: Markdown from rows, and a sentence where none exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from answer_tables import filter_section, filter_summary, sample_section, sample_summary
from cells import absent, seconds, table
from pictures import best_of, case_name
from rows import KINDS, Row

STEP_NAMES = {
    "trees": "scmini, prefix trees",
    "trees_split": "scmini, trees split to the budget of one pair",
    "grouped": "scmini, sharing off, k+1 sequences",
    "pairs": "scmini, sharing off, 2k sequences, k pairs at once",
    "pairs_one_pair": "scmini, sharing off, 2k sequences, one pair at once",
    "trl": "TRL, k pairs at once",
    "trl_one_pair": "TRL, one pair at once",
    "trees_precomputed": "scmini, prefix trees, reference made beforehand",
    "trl_precomputed": "TRL, k pairs at once, reference made beforehand",
    "trl_one_pair_precomputed": "TRL, one pair at once, reference made beforehand",
}
TITLES = {
    "step": "One optimizer step of DPO",
    "head": "Log-probabilities without logits",
    "attention": "Attention over a prefix tree",
    "packing": "What the host does per batch",
    "filter": "Cosines of answers with their targets",
    "sample": "Drawing answers",
}
_MEANINGS = {
    "pack": "token ids to index arrays (`PrefixTree.pack`)",
    "move": "index arrays to the device",
    "plan": "rectangles for attention on the CPU, once per tree",
    "tiles": "tables of the Triton attention, once per tree",
}


def device_section(device: str, rows: Sequence[Row], pictures: Sequence[tuple[str, str]]) -> str:
    """Everything about one device.

    Args:
        rows: the newest of each case and peer.
        pictures: (description, path as the document sees it).
    """
    parts = [f"### {device}", _where(rows)]
    parts += [f"![{text}]({path})" for text, path in pictures]
    for what in KINDS:
        mine = [row for row in rows if row["what"] == what]
        parts.append(f"#### {TITLES[what]}")
        if not mine:
            parts.append(f"Not measured on this device: `python bench/run.py {what}`.")
            continue
        parts += _SECTIONS[what](mine, rows)
    return "\n\n".join(parts)


def summary(devices: dict[str, Sequence[Row]]) -> str:
    """What the README says: of each device, what one step is worth."""
    parts = []
    for name, found in devices.items():
        steps = [row for row in found if row["what"] == "step"]
        if steps:
            parts += [_summary_intro(name, steps), _headline_table(steps)]
        parts += [*filter_summary(found), *sample_summary(found)]
    if not any(name != "cpu" for name in devices):
        parts.append("No GPU has been measured yet.")
    return "\n\n".join(parts)


def _summary_intro(device: str, steps: Sequence[Row]) -> str:
    shown = steps[0]
    where = "CPU seconds of one thread" if device == "cpu" else "seconds"
    models = ", ".join(dict.fromkeys(row["case"]["model"] for row in steps))
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in steps))
    return (
        f"**{shown['processor']}**, {models}, {dtypes}: how many times as long as a step on prefix "
        f"trees ({where}; in brackets the ratio of FLOP), and how many times the memory above the "
        "model. P prompt tokens, R tokens per response, k rejected responses."
    )


def not_measured(kind: str) -> str:
    return (
        f"### {kind}\n\nNot measured: no rows from such a device are here yet. "
        "`python bench/run.py step` on one writes them."
    )


def _where(rows: Sequence[Row]) -> str:
    last = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    ceilings = last["ceilings"]
    threads = "1 thread" if last["threads"] == 1 else f"{last['threads']} threads"
    return (
        f"{last['processor']}, {threads}; {last['date'][:10]}, commit {commits}. {versions}. "
        f"Measured ceiling: {ceilings['gemm_tflops']:.3g} TFLOP/s in a large matrix product, "
        f"{ceilings['copy_gbps']:.3g} GB/s in a large copy."
    )


def _step(rows: Sequence[Row], _: Sequence[Row]) -> list[str]:
    parts = [_headline_table(rows)]
    for case in dict.fromkeys(case_name(row) for row in rows):
        mine = [row for row in rows if case_name(row) == case]
        checkpointing = ", activation checkpointing" if mine[0]["checkpointing"] else ""
        note = f"P,R,k = {case}: {mine[0]['case']['model']}, {mine[0]['dtype']}{checkpointing}"
        parts += [f"**{note}**", _step_table(mine)]
    return [*parts, *absent(rows)]


def _headline_table(rows: Sequence[Row]) -> str:
    heads = [
        "P,R,k",
        "pairs / trees, k at once or one (predicted)",
        "k+1 / trees (predicted)",
        "TRL / trees",
        "memory, TRL / trees, k pairs in flight",
        "memory, TRL / trees, budget of one pair",
    ]
    lines = []
    for case in dict.fromkeys(case_name(row) for row in rows):
        by_peer = {row["peer"]: row for row in rows if case_name(row) == case}
        best = best_of(list(by_peer.values()), ("trl", "trl_one_pair"))
        lines.append(
            [
                case,
                _ratio(*(by_peer.get(name) for name in ("pairs", "pairs_one_pair"))),
                _ratio(by_peer.get("grouped")),
                f"{best[0]['measured_ratio']:.2f}" if best and "measured_ratio" in best[0] else "",
                _memory_ratio(by_peer, "trl", "trees"),
                _memory_ratio(by_peer, "trl_one_pair", "trees_split"),
            ]
        )
    return table(heads, lines)


def _ratio(*rows: Row | None) -> str:
    able = [row for row in rows if row is not None and "measured_ratio" in row]
    if not able:
        return ""
    measured = " or ".join(f"{row['measured_ratio']:.2f}" for row in able)
    return f"{measured} ({able[0]['predicted_ratio']:.2f})"


def _memory_ratio(by_peer: dict[str, Row], theirs: str, ours: str) -> str:
    sizes = [by_peer.get(name, {}).get("peak_bytes") for name in (theirs, ours)]
    return f"{sizes[0] / sizes[1]:.2f}" if all(sizes) else ""


def _step_table(rows: Sequence[Row]) -> str:
    heads = [
        "Implementation",
        "Tokens",
        "Seconds (p20 to p80)",
        "x trees",
        "predicted",
        "TFLOP/s",
        "of ceiling",
        "Peak above model, MiB",
        "Loss error",
        "1 - cosine",
    ]
    lines = []
    for row in rows:
        name = STEP_NAMES[row["peer"]]
        if "seconds" not in row:
            lines.append([name, f"{row['tokens']:,}", row["failed"], *[""] * 7])
            continue
        error = row["error"]
        lines.append(
            [
                name,
                f"{row['tokens']:,}",
                seconds(row),
                f"{row['measured_ratio']:.2f}" if "measured_ratio" in row else "",
                f"{row['predicted_ratio']:.2f}",
                f"{row['tflops']:.3g}",
                f"{row['ceiling_share']:.0%}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{error['loss_error']:.0e}",
                f"{max(0.0, 1 - error['cosine']):.0e}",
            ]
        )
    return table(heads, lines)


def _operation(rows: Sequence[Row], _: Sequence[Row]) -> list[str]:
    heads = [
        "Implementation",
        "Milliseconds (p20 to p80)",
        "TFLOP/s",
        "of ceiling",
        "Peak MiB",
        "Error",
        "Gradient error",
    ]
    modes = {"forward": "forward", "train": "forward and backward", "dpo": "DPO loss of one pair"}
    parts = []
    for case in dict.fromkeys(case_name(row) for row in rows):
        for mode, words in modes.items():
            mine = [row for row in rows if case_name(row) == case and row["mode"] == mode]
            if mine:
                title = (
                    f"**P,R,k = {case}, {mine[0]['case']['model']}, {mine[0]['dtype']}: {words}**"
                )
                parts += [title, table(heads, [_operation_line(row) for row in mine])]
    return [*parts, *absent(rows)]


def _operation_line(row: Row) -> list[str]:
    if "seconds" not in row:
        return [row["peer"], row["failed"], *[""] * 5]
    spread, error = row["seconds"], row["error"] or {}
    times = [f"{1e3 * spread[key]:.3g}" for key in ("median", "p20", "p80")]
    return [
        row["peer"],
        f"{times[0]} ({times[1]} to {times[2]})",
        f"{row['tflops']:.3g}",
        f"{row['ceiling_share']:.0%}",
        f"{row['peak_bytes'] / 2**20:,.1f}",
        *(f"{error[key]:.1e}" if key in error else "" for key in ("value", "gradient")),
    ]


def _packing(rows: Sequence[Row], everything: Sequence[Row]) -> list[str]:
    steps = {
        _sizes(row): row["seconds"]["median"] / row["case"]["prompts"]
        for row in everything
        if row["what"] == "step" and row["peer"] == "trees" and "seconds" in row
    }
    lines = []
    for row in rows:
        seconds = row["seconds"]["median"]
        step = steps.get(_sizes(row))
        share = "" if step is None else f"{seconds / step:.2%}"
        lines.append(
            [
                case_name(row),
                _MEANINGS[row["peer"]],
                f"{row['tokens']:,}",
                f"{1e3 * seconds:.3g}",
                share,
            ]
        )
    heads = ["P,R,k", "What", "Tokens", "Milliseconds per prompt", "of a step"]
    return [table(heads, lines)]


def _sizes(row: Row) -> tuple[Any, ...]:
    """Of one prompt: what packing's and the step's rows have in common."""
    return tuple(row["case"][name] for name in ("P", "R", "k", "vocab", "model"))


_SECTIONS: dict[str, Callable[[Any, Any], list[str]]] = {
    "step": _step,
    "head": _operation,
    "attention": _operation,
    "packing": _packing,
    "filter": lambda rows, _: filter_section(rows),
    "sample": lambda rows, _: sample_section(rows),
}
