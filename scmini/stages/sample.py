"""Stage `sample`: n answers of the SFT model to every training prompt, shard by shard."""

import time
from pathlib import Path

from scmini.chat import check_tokenizer, prompt_ids
from scmini.config import Config
from scmini.console import progress
from scmini.errors import DataError
from scmini.models.loading import load_for_generation, load_tokenizer, model_source
from scmini.models.sampler import TransformersSampler
from scmini.records import Example, Samples, read_examples, read_samples, read_table, write_samples
from scmini.sections import DecodingConfig
from scmini.seeding import derived_seed
from scmini.store import Work
from scmini.training.checkpoints import peak_gib


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write part-*.parquet; shards that are there already are kept.

    A prompt that leaves no room for an answer gets a row without responses and is counted.
    """
    examples = read_examples(inputs["data"] / "train.jsonl")[: config.sample.num_prompts]
    write_shards(
        config=config,
        inputs=inputs,
        adapter=inputs["sft"] / "adapter",
        decoding=config.sample,
        examples=examples,
        n=config.sample.n,
        stream="sample",
        shard_size=config.sample.shard_size,
        folder=work.path,
    )
    _count_answers(work)
    work.note("peak_gib", round(peak_gib(), 3))


def write_shards(
    *,
    config: Config,
    inputs: dict[str, Path],
    adapter: Path,
    decoding: DecodingConfig,
    examples: list[Example],
    n: int,
    stream: str,
    shard_size: int,
    folder: Path,
) -> None:
    """Draw n answers to each example's prompt into folder/part-*.parquet, going on where it was.

    The model is only loaded if a shard is missing. The random numbers come from
    config.seed, the name `stream` and the examples' ids, never from the method.
    """
    if not examples:
        raise DataError("there is no prompt to answer")
    shards = [examples[start : start + shard_size] for start in range(0, len(examples), shard_size)]
    paths = [folder / f"part-{number:05d}.parquet" for number in range(len(shards))]
    for stale in set(folder.glob("part-*.parquet")) - set(paths):
        stale.unlink()
    missing = [number for number, path in enumerate(paths) if not _holds(path, shards[number])]
    if not missing:
        return
    source = model_source(config, inputs)
    tokenizer = load_tokenizer(str(adapter))
    check_tokenizer(tokenizer)
    model = load_for_generation(config.model, source, adapter)
    sampler = TransformersSampler(model, tokenizer, decoding, config.model.max_length)
    meter = _Meter((len(shards) - len(missing)) * shard_size * n, len(examples) * n)
    seed = derived_seed(config.seed, stream)
    for number in missing:
        prompts = [(e.id, prompt_ids(tokenizer, e.prompt)) for e in shards[number]]
        answers = sampler.sample(prompts, n, seed, meter.add)
        rows = zip(prompts, answers, strict=True)
        write_samples(paths[number], [Samples(id, ids, drawn) for (id, ids), drawn in rows])


def _count_answers(work: Work) -> None:
    """Counts and notes of the finished shards."""
    answers = tokens = 0
    for row in read_samples(work.path):
        if not row.responses:
            work.count("prompt leaves no room for an answer")
        cut = sum(response.finish_reason != "stop" for response in row.responses)
        if cut:
            work.count("answers cut at their length limit", cut)
        answers += len(row.responses)
        tokens += sum(len(response.token_ids) for response in row.responses)
    work.note("answers", answers)
    work.note("tokens", tokens)


def _holds(path: Path, examples: list[Example]) -> bool:
    """Whether a shard is there and has these prompts; shards of another size are made anew."""
    if not path.exists():
        return False
    return read_table(path).column("id").to_pylist() == [example.id for example in examples]


class _Meter:
    """Progress with tokens per second, of this process's own work."""

    def __init__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._answers = self._tokens = 0
        self._start = time.perf_counter()
        progress(done, total, "answers")

    def add(self, answers: int, tokens: int) -> None:
        self._answers += answers
        self._tokens += tokens
        seconds = max(time.perf_counter() - self._start, 1e-9)
        progress(
            min(self._done + self._answers, self._total),
            self._total,
            "answers",
            tokens_per_second=round(self._tokens / seconds),
        )
