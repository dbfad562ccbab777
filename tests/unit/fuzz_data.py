"""Fuzzers of the importers: any bytes, and rows of every format that are nearly right."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from data_helpers import SHARED, shared_rows
from fuzz_helpers import Fuzzer, damaged, lines, mutated, odd_text, survives
from hypothesis import strategies as st

from scmini.data.importers import read_examples
from scmini.records import ROLES, write_examples
from scmini.records import read_examples as read_written
from scmini.sections import DataConfig

_HUMAN = "\n\nHuman: What is a yak?\n\nAssistant: An ox.\n\nHuman: Is it large?\n\nAssistant:"
_TURNS = [
    {"role": "user", "content": "What is a yak?"},
    {"role": "assistant", "content": "An ox of the mountains."},
]
ROWS: dict[str, list[Any]] = {
    "jsonl": [
        {"id": "a", "prompt": _TURNS[:1], "target": "An ox.", "rejected": ["A bird."]},
        {"prompt": "What is a yak?", "target": "An ox."},
    ],
    "auto": [
        {"messages": [{"role": "system", "content": "Be brief."}, *_TURNS]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "q", "chosen": "good", "rejected": ["bad", "worse"], "id": 7},
        {"chosen": _TURNS, "rejected": [_TURNS[0], {"role": "assistant", "content": "A bird."}]},
        {"prompt": "q", "completion": "a", "label": True},
        {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["u", "a"]]},
        {"chosen": "a shared beginning good", "rejected": "a shared beginning bad"},
    ],
    "hh-rlhf": [{"chosen": f"{_HUMAN} Yes.", "rejected": f"{_HUMAN} No."}],
    "nectar": [
        {
            "prompt": _HUMAN,
            "answers": [{"answer": "Yes.", "rank": 1.0}, {"answer": "No.", "rank": 2.0}],
        }
    ],
    "ultrachat": [{"prompt": "q", "prompt_id": "x", "messages": _TURNS}],
    "self-contrast": [
        {"instruction": "q", "history": [["u", "a"]], "output": "good", "system": "s"},
        {"instruction": "q", "output": ["good", "bad"]},
        {"messages": _TURNS, "target": "An ox.", "outputs": ["A bird.", "A yak."]},
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a"}], "outputs": "b"},
    ],
}
if (SHARED / "data").is_dir():
    ROWS["hh-rlhf"] += shared_rows("hh_helpful-base_raw.jsonl.gz")[:20]
ENDINGS = ("jsonl", "json", "jsonl.gz", "json.gz", "parquet")


def check(given: tuple[str, str, bytes], folder: Path) -> None:
    format, ending, content = given
    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    survives(lambda: _import(format, path, folder / "written.jsonl"), "rows")


def _import(format: str, path: Path, written: Path) -> None:
    drops: Counter[str] = Counter()
    data = DataConfig.model_validate({"format": format, "path": str(path)})
    found = list(
        read_examples(
            data, lambda reason, what: drops.update([reason]), answered=lambda id, answers: None
        )
    )
    for example in found:
        assert isinstance(example.id, str)
        assert example.target.strip()
        assert example.prompt
        assert all(turn["role"] in ROLES for turn in example.prompt)
        assert example.prompt[-1]["role"] != "assistant"
        assert all(text.strip() for text in example.rejected)
    assert all(reason.isprintable() and len(reason) < 100 for reason in drops)
    write_examples(written, found)
    assert read_written(written) == found


def _table(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _packed(ending: str, rows: list[Any]) -> bytes:
    content = json.dumps(rows).encode() if ending.startswith("json.") else lines(rows)
    return gzip.compress(content) if ending.endswith("gz") else content


formats = st.sampled_from(sorted(ROWS))
anything = st.tuples(formats, st.sampled_from(ENDINGS), st.binary(max_size=80))
nearly_right = st.tuples(formats, st.sampled_from(ENDINGS[:4])).flatmap(
    lambda chosen: st.tuples(
        st.just(chosen[0]),
        st.just(chosen[1]),
        st.lists(st.sampled_from(ROWS[chosen[0]]).flatmap(mutated), min_size=1, max_size=4).map(
            lambda rows: _packed(chosen[1], rows)
        ),
    )
)
broken = st.tuples(formats, st.sampled_from(ENDINGS)).flatmap(
    lambda chosen: st.tuples(
        st.just(chosen[0]),
        st.just(chosen[1]),
        damaged(
            _table(ROWS[chosen[0]][:1])
            if chosen[1] == "parquet"
            else _packed(chosen[1], ROWS[chosen[0]])
        ),
    )
)
transcripts = st.lists(
    st.one_of(
        odd_text, st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " Human :", "\n", " a", "\r\n"])
    ),
    max_size=8,
).map("".join)
dialogues = st.tuples(
    st.sampled_from(["hh-rlhf", "nectar", "auto", "self-contrast"]), transcripts, transcripts
).map(
    lambda given: (
        given[0],
        "jsonl",
        lines(
            [
                {
                    **{"prompt": given[1], "chosen": given[1], "rejected": given[2]},
                    **{"answers": [{"answer": given[2], "rank": 1}], "target": given[2]},
                }
            ]
        ),
    )
)
FUZZERS = [
    Fuzzer("files of any bytes", anything, check),
    Fuzzer("rows that are nearly right", nearly_right, check, share=3.0),
    Fuzzer("files of rows, damaged", broken, check),
    Fuzzer("odd transcripts", dialogues, check),
]
