"""The stages sft, reference and dpo, one after another, on a tiny model."""

import json
from pathlib import Path

import pytest
from tight_memory import room_for
from training_helpers import separate_logps, write_model, write_train

from scmini import chat, console
from scmini.config import Config
from scmini.errors import DataError, ScminiError
from scmini.models import loading
from scmini.records import (
    Example,
    Pair,
    Response,
    Samples,
    read_table,
    write_jsonl,
    write_samples,
    write_table,
)
from scmini.stages import dpo, reference, sft
from scmini.store import Work
from scmini.training.batches import Group
from scmini.training.preferences import Responses, sft_group

NUM = 10
SAMPLES_PER_PROMPT = 4
ONE, BOTH = {"self-contrast-2": [2, 0]}, {"self-contrast-2": [2, 0], "dpo": [-2], "spin": [3]}
TRAINING = {
    "learning_rate": 1e-2,
    "prompts_per_step": 4,
    "gradient_checkpointing": False,
    "save_steps": 2,
}


def _config(max_length: int = 200, source: str = "", **dpo_options: object) -> Config:
    return Config(
        methods=["sft", *BOTH],
        model={
            "model_name_or_path": source or None,
            "load_in_4bit": False,
            "dtype": "float32",
            "max_length": max_length,
        },
        sft={**TRAINING, "lora_r": 4},
        sft_continued=TRAINING,
        sample={"n": SAMPLES_PER_PROMPT},
        dpo={**TRAINING, **dpo_options},
    )


class Run:
    """Folders of finished stages, and the pairs of some methods."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.config = root, config
        self.inputs = {
            n: root / n for n in ("data", "base", "sft", "sample", "filter", "reference")
        }
        write_model(self.inputs["base"] / "model")
        self.examples = write_train(self.inputs["data"], NUM, rejected=True)
        self.tokenizer = loading.load_tokenizer(str(self.inputs["base"] / "model"))
        self.samples = [self._samples(number, e) for number, e in enumerate(self.examples)]
        write_samples(self.inputs["sample"] / "part-00000.parquet", self.samples)

    def _samples(self, number: int, example: Example) -> Samples:
        texts = [f"A bee {number} {j}" for j in range(SAMPLES_PER_PROMPT)]
        responses = [Response(t, chat.response_ids(self.tokenizer, t), "stop") for t in texts]
        # Not what the tokenizer would make of the text: the sampled ids are trained.
        responses[2] = Response("bee", [*responses[2].token_ids[:-1], 7, 8, 1], "stop")
        prompt = chat.prompt_ids(self.tokenizer, example.prompt)
        return Samples(example.id, prompt, responses)

    def filter(self, indices: dict[str, list[int]]) -> None:
        for path in (self.inputs["filter"] / "pairs").glob("*"):
            path.unlink()
        for method, chosen in indices.items():
            pairs = [
                Pair(e.id, e.prompt, e.target, ["..."] * len(chosen), [0.0] * len(chosen), chosen)
                for e in self.examples
            ]
            write_jsonl(self.inputs["filter"] / "pairs" / f"{method}.jsonl", pairs)
        union = sorted({index for chosen in indices.values() for index in chosen})
        used = [{"id": e.id, "response_index": union} for e in self.examples]
        write_jsonl(self.inputs["filter"] / "used.jsonl", used)

    def work(self, name: str, method: str | None = None, earlier: list[Path] | None = None) -> Work:
        (self.root / name).mkdir(exist_ok=True)
        return Work(self.root / name, method, earlier or [])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path, _config())
    sft.run(made.config, made.inputs, made.work("sft"))
    made.filter(BOTH)
    return made


def _rows(folder: Path) -> dict[tuple[str, int], float]:
    table = read_table(folder / "logps.parquet").to_pylist()
    return {(row["id"], row["response_index"]): row["logp"] for row in table}


def test_rows_equal_plain_forward_passes(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    rows = _rows(run.inputs["reference"])
    model = loading.load_policy(
        run.config.model,
        str(run.inputs["base"] / "model"),
        run.inputs["sft"] / "adapter",
        trainable=False,
    )
    example, samples = run.examples[3], run.samples[3]
    prompt = chat.prompt_ids(run.tokenizer, example.prompt)
    texts = {
        -1: chat.response_ids(run.tokenizer, example.target),
        -2: chat.response_ids(run.tokenizer, example.rejected[0]),
        **{j: samples.responses[j].token_ids for j in (0, 2, 3)},
    }
    group = Group.of_responses("x", prompt, list(texts.values()))
    expected = separate_logps(model, [group]).tolist()
    assert {key for key in rows if key[0] == example.id} == {(example.id, i) for i in texts}
    for index, logp in zip(texts, expected, strict=True):
        assert rows[example.id, index] == pytest.approx(logp, abs=1e-4), index


def test_by_method_is_a_part_of_the_whole(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    whole = {
        (row["id"], row["response_index"]): row
        for row in read_table(run.inputs["reference"] / "logps.parquet").to_pylist()
    }
    for method, indices in BOTH.items():
        path = run.inputs["reference"] / "by-method" / f"{method}.parquet"
        own = read_table(path).to_pylist()
        keys = [(e.id, i) for e in run.examples for i in (-1, *indices)]
        assert [(row["id"], row["response_index"]) for row in own] == keys
        assert own == [whole[key] for key in keys]


def test_another_method_changes_no_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.filter(ONE)
    reference.run(run.config, run.inputs, run.work("few"))
    before = run.root / "few" / "by-method" / "self-contrast-2.parquet"
    run.filter(BOTH)
    scored: list[Group] = []
    original = reference.score

    def spy(module: object, groups: list[Group], knob: int) -> list[list[float]]:
        scored.extend(groups)
        return original(module, groups, knob)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "score", spy)
    reference.run(run.config, run.inputs, run.work("more", earlier=[run.root / "few"]))
    after = run.root / "more" / "by-method" / "self-contrast-2.parquet"
    assert after.read_bytes() == before.read_bytes()
    assert [len(g.sequences) for g in scored] == [2] * NUM, "only the new rows are computed"
    fresh = _rows_after(run, "fresh")
    assert _rows(run.root / "more") == pytest.approx(fresh, abs=1e-4)


def _rows_after(run: Run, name: str) -> dict[tuple[str, int], float]:
    reference.run(run.config, run.inputs, run.work(name))
    return _rows(run.root / name)


def test_interrupted_reference_ends_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PROMPTS_PER_SHARD", 3)
    reference.run(run.config, run.inputs, run.work("whole"))
    original, calls = reference.score, []

    def stop(*arguments: object) -> list[list[float]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "score", stop)
    work = run.work("torn")
    with pytest.raises(KeyboardInterrupt):
        reference.run(run.config, run.inputs, work)
    assert not (work.path / "logps.parquet").exists()
    reference.run(run.config, run.inputs, work)
    assert len(calls) == 3 + 2, "finished shards were computed again"
    for path in ("logps.parquet", "by-method/dpo.parquet"):
        assert (work.path / path).read_bytes() == (run.root / "whole" / path).read_bytes()


def test_dpo_starts_at_zero_and_learns(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    dpo.run(run.config, run.inputs, run.work("dpo", "self-contrast-2"))
    rows = [json.loads(x) for x in (run.root / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (run.root / "dpo" / "adapter" / "chat_template.jinja").is_file()
    before = (run.inputs["sft"] / "adapter" / "adapter_model.safetensors").read_bytes()
    after = (run.root / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert before != after


def test_dpo_refuses_a_wrong_reference(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    sft.run(run.config, run.inputs, run.work("more", "sft-continued"))
    wrong = {**run.inputs, "sft": run.root / "more"}
    work = run.work("dpo", "spin")
    with pytest.raises(ScminiError, match=r"not the policy's start.*the SFT adapter.*--force"):
        dpo.run(run.config, wrong, work)
    assert [p.name for p in work.path.iterdir()] == ["example.txt"], "it trained all the same"


def test_dpo_refuses_missing_and_different_rows(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    path = run.inputs["reference"] / "by-method" / "spin.parquet"
    table = read_table(path)
    write_table(path, table.slice(2))
    said = r"spin.parquet: no log-probability of response -1.*'e0'.*--from reference --force"
    with pytest.raises(DataError, match=said):
        dpo.run(run.config, run.inputs, run.work("dpo", "spin"))


def test_continued_sft_starts_from_the_adapter(run: Run) -> None:
    sft.run(run.config, run.inputs, run.work("more", "sft-continued"))
    name = "adapter/adapter_model.safetensors"
    assert (run.root / "more" / name).read_bytes() != (run.inputs["sft"] / name).read_bytes()
    first = json.loads((run.root / "more" / "metrics.jsonl").read_text().splitlines()[0])
    start = json.loads((run.inputs["sft"] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < start["loss"] - 0.05


def test_long_prompts_lose_their_beginning(run: Run) -> None:
    """The same for every method: the longest response of the prompt decides, used or not."""
    responses = Responses(run.tokenizer, 24, run.examples, run.samples)
    group = responses.group("e1", [-1, 0])
    assert group is not None
    texts = [run.examples[1].target, *run.examples[1].rejected]
    longest = max(
        *(len(chat.response_ids(run.tokenizer, text)) for text in texts),
        *(len(r.token_ids) for r in run.samples[1].responses),
    )
    prompt = chat.prompt_ids(run.tokenizer, run.examples[1].prompt)
    assert len(prompt) + longest > 24, "nothing to cut"
    for sequence in group.sequences:
        assert sequence[0].tolist() == prompt[-(24 - longest) :]


def test_responses_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, _config())
    sft.run(run.config, run.inputs, run.work("sft"))
    run.filter(BOTH)
    # The prompts' longest responses differ only here: one sampled answer fills max_length exactly.
    run.samples[4].responses[1] = Response("long", [3] * 29 + [1], "stop")
    write_samples(run.inputs["sample"] / "part-00000.parquet", run.samples)
    short = _config(max_length=30)
    lost = 1
    fits = Responses(run.tokenizer, 31, run.examples, run.samples).group("e4", [-1])
    assert fits is not None
    assert len(fits.sequences[0][0]) == 1
    work = run.work("reference")
    reference.run(short, run.inputs, work)
    assert dict(work.counts) == {dpo.TOO_LONG: lost}


def test_unknown_response_is_named(run: Run) -> None:
    responses = Responses(run.tokenizer, 200, run.examples, run.samples)
    with pytest.raises(DataError, match=r"'e0' has no response 9"):
        responses.group("e0", [-1, 9])
    with pytest.raises(DataError, match=r"'nobody'"):
        responses.group("nobody", [-1])


def test_sft_group_cuts_left_and_drops(run: Run) -> None:
    example = run.examples[0]
    answer = chat.response_ids(run.tokenizer, example.target)
    whole = sft_group(run.tokenizer, example, "last", 200)
    assert whole is not None
    assert whole.num_scored == [len(answer)]
    cut = sft_group(run.tokenizer, example, "last", len(answer) + 2)
    assert cut is not None
    assert (
        cut.sequences[0].input_ids.tolist()
        == whole.sequences[0].input_ids.tolist()[-len(answer) - 2 :]
    )
    assert cut.num_scored == [len(answer)]
    assert sft_group(run.tokenizer, example, "last", len(answer)) is None


def test_memory_that_runs_out_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The knob stays lowered from shard to shard, and the manifest says to what."""
    monkeypatch.setattr(reference, "PROMPTS_PER_SHARD", 3)
    reference.run(run.config, run.inputs, run.work("roomy"))
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    work = run.work("tight")
    with room_for(100):
        reference.run(run.config, run.inputs, work)
    assert len(said) == 1
    lowered = work.notes["tokens_per_microbatch"]
    assert f"reference.tokens_per_microbatch 8192 -> {lowered}" in said[0]
    assert _rows(run.root / "tight") == pytest.approx(_rows(run.root / "roomy"), abs=1e-4)


def test_a_reference_that_is_not_finite_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PROMPTS_PER_SHARD", 3)
    original = reference.score

    def broken(*arguments: object) -> list[list[float]]:
        scores = original(*arguments)  # type: ignore[arg-type]
        if arguments[1][0].id == "e3":  # type: ignore[index]
            scores[1][2] = float("nan")
        return scores

    monkeypatch.setattr(reference, "score", broken)
    work = run.work("reference")
    with pytest.raises(DataError, match=r"prompt 'e4': response 0 .* log-probability nan under"):
        reference.run(run.config, run.inputs, work)
    assert [p.name for p in (work.path / "scratch").iterdir()] == ["part-00000.parquet"]


def test_a_lowered_knob_of_dpo_is_noted(run: Run) -> None:
    reference.run(run.config, run.inputs, run.work("reference"))
    work = run.work("dpo", "self-contrast-2")
    with room_for(100):
        dpo.run(run.config, run.inputs, work)
    kept = json.loads((work.path / "log" / "microbatch.json").read_text())
    assert kept["lowered"] == [[0, work.notes["tokens_per_microbatch"]]]
    assert work.notes["steps"] == 3
