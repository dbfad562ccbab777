"""index.html: one self-contained page out of results, pictures and examples.

Nothing on it is fetched from elsewhere: styles are inline, pictures are data URIs, and a content
policy lets run one script alone, by its digest: the browser of prompts. Text that a model wrote is
escaped and its control characters are spelled out.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from scmini.data.selection import REASONS
from scmini.evaluation.report.training_prompts import Answer, TrainingPrompt, of_every_reason
from scmini.evaluation.report.wording import MISSING, Unit, number
from scmini.records import Generation, Message, Reward

Cell = tuple[str, str]
"""What a cell of a table says, and what stands below it in small."""
MAX_CHARS = 1200
"""Longer texts are cut on the page, saying so."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def render(view: Mapping[str, Any]) -> str:
    """The page as HTML text; `view` holds what report_templates/index.html.j2 names."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scmini", "report_templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    style, script = (
        environment.get_template(f"{n}.j2").render() for n in ("style.css", "browser.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{_POLICY}; script-src 'sha256-{digest}'"
    shown = environment.get_template("index.html.j2").render(
        view, style=style, script=script, policy=policy
    )
    return shown + "\n"


def visible(text: str, limit: int = MAX_CHARS) -> str:
    """Model text safe to read: control and direction characters spelled out, long texts cut."""
    shown = text[:limit].replace("\r\n", "\n")
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(_visible_character(c) for c in shown)
    more = len(text) - limit
    return shown if more <= 0 else f"{shown} [... {more:,} more characters]"


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) in {"Cc", "Cs"} or character in _BIDI:
        return f"[U+{ord(character):04X}]"
    return character


def svg_uri(svg: str) -> str:
    """An SVG picture as the address of an <img>."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def method_table(methods: Mapping[str, Mapping[str, Any]], unit: Unit, main: str) -> dict[str, Any]:
    """The table of methods: heads, and rows of cells (text, small text), ready to print.

    A quantity that no method has gets no column.
    """
    columns: dict[str, Callable[[Mapping[str, Any]], Cell]] = {
        f"Mean reward{unit.range}": lambda row: _with_interval(
            row, "mean_reward", unit.scale, unit.digits
        ),
        "Win rate, %": lambda row: _with_interval(row, "win_rate", 1, 1),
        "Win rate at equal length, %": lambda row: _with_interval(
            row, "length_controlled_win_rate", 1, 1
        ),
        "Perfect answers": lambda row: (percent(row.get("perfect_share")), ""),
        "Mean length, characters": _length,
        "Training prompts": lambda row: (_count(row["training"].get("prompts")), _iterations(row)),
        "Negatives per prompt": lambda row: (_decimal(row["training"].get("effective_k")), ""),
        "Perfect among negatives": lambda row: (
            percent(row["training"].get("perfect_share_of_negatives")),
            "",
        ),
    }
    cells = {head: [cell(row) for row in methods.values()] for head, cell in columns.items()}
    shown = [head for head, of_head in cells.items() if any(c[0] != MISSING for c in of_head)]
    return {
        "heads": shown,
        "rows": [
            {
                "name": name,
                "is_main": name == main,
                "cells": [cells[head][number] for head in shown],
            }
            for number, name in enumerate(methods)
        ],
    }


def _length(row: Mapping[str, Any]) -> Cell:
    ratio = row.get("length_ratio")
    beside = "" if ratio is None else f"{number(ratio, 2)} of the targets"
    return number(row["mean_length"], 0), beside


def _iterations(row: Mapping[str, Any]) -> str:
    iterations = row["training"].get("iterations", 1)
    return f"{iterations} iterations" if iterations > 1 else ""


def answer_cards(
    generations: Mapping[str, Sequence[Generation]],
    rewards: Mapping[str, Sequence[Reward]],
    positions: Sequence[int],
    unit: Unit,
) -> list[dict[str, Any]]:
    """Test prompts with the target and each method's answer; ungraded where `rewards` is empty."""
    first = next(iter(generations))
    return [
        {
            "prompt": conversation(generations[first][i].prompt),
            "target": generations[first][i].target,
            "target_grade": unit.number(rewards[first][i].target_reward) if rewards else "",
            "answers": [
                {
                    "method": method,
                    "text": generations[method][i].response,
                    **(_grade(rewards[method][i], unit) if rewards else _UNGRADED),
                }
                for method in generations
            ],
        }
        for i in positions
    ]


_UNGRADED = {"grade": "", "outcome": ""}


def _grade(reward: Reward, unit: Unit) -> dict[str, str]:
    outcome = _outcome(reward)
    return {"grade": f"{unit.number(reward.reward)} · {outcome}", "outcome": outcome}


def contrast_cards(
    prompts: Sequence[TrainingPrompt], method: str, most: int, *, filtered: bool
) -> list[dict[str, Any]]:
    """Training prompts with target, negatives, and dropped answers with the reason of each.

    Args:
        method: whose negatives are shown.
        most: negatives, and dropped answers, of each prompt.
        filtered: the method takes none but candidates.
    """
    cards = []
    for prompt in prompts:
        taken = [prompt.answers[index] for index in prompt.taken[method]]
        sampled, candidates = prompt.num_answers, prompt.num_candidates
        kept = f"taken as negatives: {len(taken)}"
        kept += f" of {candidates} candidates" if filtered else ""
        dropped = f"dropped: {sampled - candidates} of {sampled} answers"
        reasons = of_every_reason(prompt.answers[:sampled])[:most]
        cards.append(
            {
                "prompt": conversation(prompt.prompt),
                "target": prompt.target,
                "sides": [
                    (kept, [_answer(answer, "similarity") for answer in taken[:most]]),
                    *([(dropped, [_answer(a, a.reason) for a in reasons])] if reasons else []),
                ],
            }
        )
    return cards


def _answer(answer: Answer, label: str | None) -> dict[str, str | None]:
    text = answer.text if answer.text.strip() else "(nothing)"
    return {"label": label, "text": text, "similarity": _decimal(answer.similarity, 2)}


def rule_table(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What became of the answers: a column for each rule, a row for each reason that occurs."""
    columns = list(rules)
    reasons = [
        reason for reason in REASONS if any(reason in rules[rule]["dropped"] for rule in columns)
    ]
    rows = [("answers", [(f"{rules[rule]['answers']:,}", "") for rule in columns])]
    for reason in reasons:
        numbers = [rules[rule]["dropped"].get(reason, 0) for rule in columns]
        rows.append((reason, [_of(n, rules[r]) for n, r in zip(numbers, columns, strict=True)]))
    rows.append(("candidates", [_of(rules[rule]["kept"], rules[rule]) for rule in columns]))
    return {"columns": columns, "rows": rows}


def _of(count: int, rule: Mapping[str, Any]) -> tuple[str, str]:
    return (f"{count:,}", percent(count / rule["answers"])) if count else (MISSING, "")


def stage_table(
    stages: Mapping[str, Mapping[str, Any]], planned: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Time and memory of every stage, beside what was planned where there is a plan.

    Args:
        stages: by stage or stage:method, {"seconds", "peak_gib"}.
        planned: the same of a plan; what it does not know is None or missing.

    Returns:
        heads; rows of the stages with all their methods (times added, the highest peak); and in
        `every` the rows of the methods, empty where no stage has several. A row is its name, a
        small text and its cells.
    """
    of_stage: dict[str, list[str]] = {}
    for name in stages:
        of_stage.setdefault(name.partition(":")[0], []).append(name)
    rows = []
    for stage, names in of_stage.items():
        small = f"{len(names)} methods" if len(names) > 1 else ""
        rows.append((stage, small, _costs(names, stages, planned)))
    every = [(name, "", _costs([name], stages, planned)) for name in stages]
    heads = ["Time planned", "Time used", "Peak memory planned, GiB", "Peak memory used, GiB"]
    return {
        "heads": heads if planned else ["Time", "Peak memory, GiB"],
        "rows": rows,
        "every": every if len(every) > len(rows) else [],
    }


def _costs(
    names: Sequence[str],
    stages: Mapping[str, Mapping[str, Any]],
    planned: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Cells of some stages together: of what is not known of all of them nothing is said."""
    sources = (planned, stages) if planned else (stages,)

    def values(source: Mapping[str, Mapping[str, Any]], key: str) -> list[float]:
        found = [source.get(name, {}).get(key) for name in names]
        return [] if None in found else [float(value) for value in found if value is not None]

    times = [values(source, "seconds") for source in sources]
    peaks = [values(source, "peak_gib") for source in sources]
    return [
        *(duration(sum(each)) if each else MISSING for each in times),
        *(number(max(each), 2) if each else MISSING for each in peaks),
    ]


def conversation(messages: Sequence[Message]) -> str:
    """A prompt as text: a lone user message as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def cores(number: int) -> str:
    """1 core, 2 cores."""
    return f"{number} core" if number == 1 else f"{number} cores"


def _with_interval(row: Mapping[str, Any], key: str, scale: float, digits: int) -> Cell:
    if row.get(key) is None:
        return MISSING, ""
    low, high = row.get(f"{key}_ci95") or (row[key], row[key])
    interval = f"{number(scale * low, digits)} to {number(scale * high, digits)}"
    return number(scale * row[key], digits), "" if low == high else interval


def percent(share: float | None) -> str:
    """A share with one decimal; a dash where there is none."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _decimal(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else number(value, digits)


def _outcome(reward: Reward) -> str:
    if reward.reward == reward.target_reward:
        return "tie"
    return "win" if reward.reward > reward.target_reward else "loss"
