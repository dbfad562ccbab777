"""index.html: one self-contained page out of results, pictures and examples.

Nothing on it is fetched from elsewhere and nothing runs: styles are inline, pictures are data URIs
and a content policy forbids the rest. Text that a model wrote is escaped and its control characters
are spelled out.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from scmini.data.negatives import FILTERED, SPIN, UNFILTERED
from scmini.data.selection import REASONS
from scmini.evaluation.run_data import Candidate, Contrast
from scmini.evaluation.wording import Unit, number
from scmini.records import Generation, Message, Reward

MAX_CHARS = 1200
"""Longer texts are cut on the page, saying so."""
RULE_NAMES = {
    FILTERED: "self-contrast-k",
    UNFILTERED: "self-contrast-k-unfiltered",
    SPIN: "spin",
}
"""The rules of the filter, by the methods that use them."""
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MISSING = "–"  # noqa: RUF001


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
    return environment.get_template("index.html.j2").render(view) + "\n"


def visible(text: str) -> str:
    """Model text safe to read: control and direction characters spelled out, long texts cut."""
    shown = "".join(_visible_character(c) for c in text[:MAX_CHARS])
    more = len(text) - MAX_CHARS
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


def method_rows(
    methods: Mapping[str, Mapping[str, Any]], unit: Unit, main: str
) -> list[dict[str, Any]]:
    """The table of methods, every cell ready to print."""
    return [
        {
            "name": name,
            "is_main": name == main,
            "reward": _with_interval(row, "mean_reward", unit.scale, unit.digits),
            "win_rate": _with_interval(row, "win_rate", 1, 1),
            "perfect": percent(row.get("perfect_share")),
            "length": number(row["mean_length"], 0),
            "prompts": _count(row["training"].get("prompts")),
            "effective_k": _decimal(row["training"].get("effective_k")),
            "perfect_negatives": percent(row["training"].get("perfect_share_of_negatives")),
        }
        for name, row in methods.items()
    ]


def answer_cards(
    generations: Mapping[str, Sequence[Generation]],
    rewards: Mapping[str, Sequence[Reward]],
    positions: Sequence[int],
    unit: Unit,
) -> list[dict[str, Any]]:
    """Test prompts with the target and each method's answer, side by side."""
    first = next(iter(generations))
    return [
        {
            "prompt": conversation(generations[first][i].prompt),
            "target": generations[first][i].target,
            "target_reward": unit.number(rewards[first][i].target_reward),
            "answers": [
                {
                    "method": method,
                    "text": generations[method][i].response,
                    "reward": unit.number(rewards[method][i].reward),
                    "outcome": _outcome(rewards[method][i]),
                }
                for method in generations
            ],
        }
        for i in positions
    ]


def contrast_cards(contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """Training prompts with target, negatives, and dropped answers with the reason of each."""
    return [
        {
            "prompt": conversation(contrast.prompt),
            "target": contrast.target,
            "sides": [
                (
                    f"taken as negatives: {contrast.num_kept} of {contrast.num_candidates} "
                    "candidates",
                    [_answer(candidate, "similarity") for candidate in contrast.kept],
                ),
                (
                    f"dropped: {contrast.num_dropped} of "
                    f"{contrast.num_dropped + contrast.num_candidates} answers",
                    [_answer(candidate, candidate.reason) for candidate in contrast.dropped],
                ),
            ],
        }
        for contrast in contrasts
    ]


def _answer(candidate: Candidate, label: str | None) -> dict[str, str | None]:
    text = candidate.text if candidate.text.strip() else "(nothing)"
    return {"label": label, "text": text, "similarity": _decimal(candidate.similarity, 2)}


def rule_table(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What became of the answers: a column for each rule, a row for each reason that occurs."""
    columns = [rule for rule in RULE_NAMES if rule in rules]
    reasons = [
        reason for reason in REASONS if any(reason in rules[rule]["dropped"] for rule in columns)
    ]
    rows = [("answers", [(f"{rules[rule]['answers']:,}", "") for rule in columns])]
    for reason in reasons:
        numbers = [rules[rule]["dropped"].get(reason, 0) for rule in columns]
        rows.append((reason, [_of(n, rules[r]) for n, r in zip(numbers, columns, strict=True)]))
    rows.append(("candidates", [_of(rules[rule]["kept"], rules[rule]) for rule in columns]))
    return {"columns": [RULE_NAMES[rule] for rule in columns], "rows": rows}


def _of(count: int, rule: Mapping[str, Any]) -> tuple[str, str]:
    return (f"{count:,}", percent(count / rule["answers"])) if count else (_MISSING, "")


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Time and memory of every stage."""
    return [
        {
            "name": name,
            "time": duration(row["seconds"]),
            "peak": _decimal(row["peak_gib"], 2),
        }
        for name, row in stages.items()
    ]


def conversation(messages: Sequence[Message]) -> str:
    """A prompt as text: a lone user message as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds is None:
        return _MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def cores(number: int) -> str:
    """1 core, 2 cores."""
    return f"{number} core" if number == 1 else f"{number} cores"


def _with_interval(row: Mapping[str, Any], key: str, scale: float, digits: int) -> tuple[str, str]:
    low, high = row[f"{key}_ci95"]
    interval = f"{number(scale * low, digits)} to {number(scale * high, digits)}"
    return number(scale * row[key], digits), "" if low == high else interval


def percent(share: float | None) -> str:
    """A share with one decimal; a dash where there is none."""
    return _MISSING if share is None else f"{100 * share:.1f} %"


def _count(value: int | None) -> str:
    return _MISSING if value is None else f"{value:,}"


def _decimal(value: float | None, digits: int = 1) -> str:
    return _MISSING if value is None else number(value, digits)


def _outcome(reward: Reward) -> str:
    if reward.reward == reward.target_reward:
        return "tie"
    return "win" if reward.reward > reward.target_reward else "loss"
