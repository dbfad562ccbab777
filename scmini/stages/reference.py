"""Log-probabilities of the reference model, once for every response that some method trains on."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from scmini import console
from scmini.config import Config
from scmini.errors import DataError
from scmini.models import loading
from scmini.models.memory import Knob
from scmini.records import read_jsonl, read_pairs, read_table, write_table
from scmini.stages.dpo import TOO_LONG
from scmini.store import Work, sealing
from scmini.training.batches import Group
from scmini.training.checkpoints import peak_gib
from scmini.training.example import show_group
from scmini.training.preferences import TARGET, Responses
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule

PROMPTS_PER_SHARD = 64
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("response_index", pa.int32()),
        ("logp", pa.float32()),
        ("num_tokens", pa.int32()),
    ]
)


class Row(NamedTuple):
    """One response's log-probability, in nats."""

    id: str
    response_index: int
    logp: float
    num_tokens: int


Rows = dict[tuple[str, int], Row]


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Score used.jsonl under the SFT model; writes logps.parquet and by-method/<method>.parquet.

    Rows that a finished folder of this stage already has are taken over, not computed again, so
    adding a method changes no existing row. Finished shards wait in scratch/.
    """
    adapter = inputs["sft"] / "adapter"
    tokenizer = loading.load_tokenizer(str(adapter))
    responses = Responses.read(tokenizer, config.model.max_length, inputs)
    needed = [
        (row["id"], [TARGET, *row["response_index"]])
        for _, row in read_jsonl(inputs["filter"] / "used.jsonl")
    ]
    groups = (responses.group(id, wanted) for id, wanted in needed)
    if (first := next((group for group in groups if group), None)) is not None:
        show_group(work.path, tokenizer, first)
    known: Rows = {}
    for folder in reversed(work.earlier):
        known |= _read(folder / "logps.parquet")
    source = loading.model_source(config, inputs)
    scorer = _Scorer(config, source, adapter, responses)
    rows: Rows = {}
    for number, start in enumerate(range(0, len(needed), PROMPTS_PER_SHARD)):
        console.progress(start, len(needed), "prompts")
        shard = needed[start : start + PROMPTS_PER_SHARD]
        path = work.path / "scratch" / f"part-{number:05d}.parquet"
        if not path.is_file():
            table = _table(scorer.score(shard, known))
            with sealing(path):
                write_table(path, table)
        rows |= _read(path)
    console.progress(len(needed), len(needed), "prompts")
    _write(rows, needed, inputs["filter"] / "pairs", work)
    work.note("peak_gib", round(peak_gib(), 3))
    if scorer.knob.lowered_to is not None:
        work.note("tokens_per_microbatch", scorer.knob.lowered_to)


class _Scorer:
    """Scores shards; loads the model when the first row is not known yet."""

    def __init__(self, config: Config, source: str, adapter: Path, responses: Responses) -> None:
        self.config, self.source, self.adapter = config, source, adapter
        self.responses = responses
        self.knob = Knob(config.reference.tokens_per_microbatch, "reference.tokens_per_microbatch")
        self._module: TreeModule | None = None

    def score(self, shard: list[tuple[str, list[int]]], known: Rows) -> list[Row]:
        """Rows of a shard's prompts, known ones as they are; none for prompts that are too long."""
        rows, groups, indices = [], [], []
        for id, wanted in shard:
            rows += [known[id, index] for index in wanted if (id, index) in known]
            missing = [index for index in wanted if (id, index) not in known]
            group = self.responses.group(id, missing) if missing else None
            if group is not None:
                groups.append(group)
                indices.append(missing)
        if groups:
            logps = score(self.module(), groups, self.knob)
            for group, missing, values in zip(groups, indices, logps, strict=True):
                _check_finite(group, missing, values)
                rows += map(Row, [group.id] * len(missing), missing, values, group.num_scored)
        return rows

    def module(self) -> TreeModule:
        if self._module is None:
            policy = loading.load_policy(
                self.config.model, self.source, self.adapter, trainable=False
            )
            self._module = TreeModule(policy)
        return self._module


def _check_finite(group: Group, indices: Sequence[int], logps: Sequence[float]) -> None:
    for index, logp, length in zip(indices, logps, group.num_scored, strict=True):
        if not math.isfinite(logp):
            raise DataError(
                f"prompt {group.id!r}: response {index} (-1: target) of {length} tokens has the "
                f"log-probability {logp} under the reference. Look at it in the samples; if "
                "nothing is wrong with it, the SFT model is broken or overflows: model.dtype: "
                "bfloat16 has the range that float16 lacks, and a lower sft.learning_rate trains "
                "more gently"
            )


def _write(rows: Rows, needed: list[tuple[str, list[int]]], pairs: Path, work: Work) -> None:
    """The whole table and each method's own, in the order of used.jsonl and of the pairs."""
    ordered = [rows[id, i] for id, wanted in needed for i in wanted if (id, i) in rows]
    write_table(work.path / "logps.parquet", _table(ordered))
    too_long = sum(1 for id, _ in needed if (id, TARGET) not in rows)
    if too_long:
        work.count(TOO_LONG, too_long)
    for path in sorted(pairs.glob("*.jsonl")):
        wanted = [(pair.id, i) for pair in read_pairs(path) for i in (TARGET, *pair.response_index)]
        own = [rows[key] for key in wanted if key in rows]
        write_table(work.path / "by-method" / f"{path.stem}.parquet", _table(own))


def _table(rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)


def _read(path: Path) -> Rows:
    rows = (Row(**row) for row in read_table(path).to_pylist())
    return {(row.id, row.response_index): row for row in rows}
