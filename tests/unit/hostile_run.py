"""A run whose prompts, answers and ids try everything against the page of the report."""

import random
from pathlib import Path

import fake_run

from scmini.config import Config
from scmini.records import (
    Generation,
    read_generations,
    read_jsonl,
    read_pairs,
    read_samples_shard,
    write_jsonl,
    write_samples,
)

METHODS = ("sft", "dpo", "self-contrast-4", "self-contrast-16", "self-contrast-16-unfiltered")
RUN = "window.canary=1"
TEXTS = [
    f"</script><script>{RUN}</script>",
    f"<!-- <script> {RUN} //",
    f"]]> <![CDATA[ <svg onload={RUN}>",
    "one\u2028two\u2029three\u0085four\r\nfive\rsix </style><style>*{display:none}",
    "\x1b[31mred\x1b[0m\x07 \x00null \x9b1m",
    "\u202egnp.exe\u2066 \u200fright",
    f'<img src="http://127.0.0.1:9/x" onerror="{RUN}"><base href="http://127.0.0.1:9/">',
    f'" onmouseover="{RUN}" \' &lt;b&gt; &#60;i&#62; &amp;',
    "👩‍👩‍👧‍👦 🏳️‍🌈 مرحبا بالعالم שלום 日本語 \U000f0000",
    "x" * 1_000_000,
    "z" + "\u0334\u0322\u031b" * 300,
    f"{{{{ 7*7 }}}} {{% raw %}} ${{{RUN}}} `{RUN}`",
    f"javascript:{RUN} http://127.0.0.1:9/a",
    "words\n" * 400,
    "   \n\t ",
]
IDS = [f'"><script>{RUN}</script>', "a b/ü#%41?&", "\x1b[2J\u202eid", "</script>", "日本語"]


def config(**sections: object) -> Config:
    return fake_run.config(METHODS, **sections)


def stage_folders(root: Path, config: Config, prompts: int = 60) -> dict[str, Path]:
    """Inputs of the stage `report`; every prompt has a word of its own, every fifth "needle"."""
    inputs = fake_run.stage_folders(root, config, prompts=prompts)
    for method in config.methods:
        path = inputs[f"generate:{method}"] / "generations.jsonl"
        rows = [_test_row(i, row, method) for i, row in enumerate(read_generations(path))]
        write_jsonl(path, rows)
        for folder, name in (("generate", "generations"), ("reward", "rewards")):
            _rename(inputs[f"{folder}:{method}"] / f"{name}.jsonl")
    for path in sorted((inputs["filter"] / "pairs").glob("*.jsonl")):
        write_jsonl(path, [_train_row(row) for row in read_pairs(path)])
    shard = inputs["sample"] / "part-00000.parquet"
    samples = read_samples_shard(shard)
    for number, row in enumerate(samples):
        kept = TEXTS[number % len(TEXTS)].encode("utf-8", "replace").decode()
        row.responses[31] = type(row.responses[31])(kept[:5000], [1], "length")
    write_samples(shard, samples)
    return inputs


def _test_row(number: int, row: Generation, method: str) -> Generation:
    text = TEXTS[(number + len(method)) % len(TEXTS)] if number % 2 else f"Plain {number}."
    words = f"{text} {random.Random(f'{method} {number}').choice(['honk', 'moo', 'Baa.'])}"
    if number % 5 == 0 and method == "self-contrast-4":
        words += " Needle in (hay*"
    prompt = f"word{number}x: {TEXTS[number % len(TEXTS)][:3000] if number % 3 == 0 else 'why?'}"
    target = TEXTS[-number % len(TEXTS)] if number % 4 == 0 else f"Because {number}."
    return Generation(row.id, [{"role": "user", "content": prompt}], words, target)


def _train_row(row: object) -> dict[str, object]:
    fields = dict(vars(row))
    number = int(str(fields["id"]).removeprefix("t"))
    text = f"train{number}x {TEXTS[number % len(TEXTS)][:3000]}"
    return {**fields, "prompt": [{"role": "user", "content": text}]}


def _rename(path: Path) -> None:
    """Hostile ids for the first prompts, alike in every file."""
    rows = [row for _, row in read_jsonl(path)]
    for row, id in zip(rows, IDS, strict=False):
        row["id"] = id
    write_jsonl(path, rows)
