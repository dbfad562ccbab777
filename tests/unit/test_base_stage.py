"""The stage that makes tokenizer and model on the spot."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tight_memory import room_for
from training_helpers import dialogues, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from scmini import chat
from scmini.config import Config
from scmini.errors import DataError
from scmini.records import write_jsonl
from scmini.stages import base
from scmini.store import Work

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "dialogues_per_step": 8,
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "save_steps": 5,
    "logging_steps": 1,
}
TOKENIZER = tiny_tokenizer()


def _config(**changes: object) -> Config:
    return Config(base={**SMALL, **changes}, model={"max_length": 64})


def _inputs(folder: Path, number: int = 64) -> dict[str, Path]:
    write_jsonl(folder / "data" / "corpus.jsonl", dialogues(number))
    return {"data": folder / "data"}


def test_makes_a_model_that_has_learned(tmp_path: Path) -> None:
    work = Work(tmp_path / "base")
    base.run(_config(), _inputs(tmp_path), work)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base" / "model")
    chat.check_tokenizer(tokenizer)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    rows = (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()
    losses = [float(row.split('"loss": ')[1].split(",")[0]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert work.notes["steps"] == 16


def test_memory_that_ran_out_is_noted(tmp_path: Path) -> None:
    """Also by a session that finds the model made, but not what comes after it."""
    inputs = _inputs(tmp_path)
    with room_for(100):
        base.run(_config(), inputs, Work(tmp_path / "base"))
    work = Work(tmp_path / "base")
    base.run(_config(), inputs, work)
    assert 1 <= work.notes["tokens_per_microbatch"] < 200
    assert work.notes["steps"] == 16
    base.run(_config(), inputs, quiet := Work(tmp_path / "roomy"))
    assert "tokens_per_microbatch" not in quiet.notes


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path)
    for name in "ab":
        base.run(_config(), inputs, Work(tmp_path / name))
    for path in (tmp_path / "a" / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "model" / path.name).read_bytes(), path.name


def test_initial_weights_come_from_the_seed() -> None:
    one, two = base.new_llama(_config(), TOKENIZER), base.new_llama(_config(), TOKENIZER)
    other = base.new_llama(_config().model_copy(update={"seed": 1}), TOKENIZER)
    weight = one.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, two.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)


TEXT = st.text(max_size=20) | st.sampled_from(["<|im_end|> x", "\n\nhello ", "Ünïcödé 🦉"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
def test_batched_encoding_equals_chat(turns: list[tuple[str, str]], system: bool) -> None:
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    ((ids, scored),) = base.conversations(TOKENIZER, [messages])
    expected = chat.conversation_ids(TOKENIZER, messages[:-1], messages[-1]["content"], "all")
    assert (ids, scored) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_tokenizer_writes_any_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_roles_are_single_tokens() -> None:
    ids = chat.prompt_ids(TOKENIZER, [{"role": "user", "content": ""}])
    assert len(ids) == 7


def test_loss_on_all_scores_the_question_too(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path)
    for name, loss_on in (("a", "answers"), ("b", "all")):
        base.run(_config(loss_on=loss_on), inputs, Work(tmp_path / name))
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in "ab")
    assert a.read_bytes() != b.read_bytes()


def test_long_dialogues_are_counted(tmp_path: Path) -> None:
    rows = dialogues(9)
    rows[3]["messages"][0]["content"] = "word " * 200
    write_jsonl(tmp_path / "data" / "corpus.jsonl", rows)
    work = Work(tmp_path / "base")
    base.run(_config(), {"data": tmp_path / "data"}, work)
    assert dict(work.counts) == {"dialogue longer than model.max_length": 1}


def test_empty_corpus(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "corpus.jsonl", [])
    with pytest.raises(DataError, match="num_pretraining"):
        base.run(_config(), {"data": tmp_path / "data"}, Work(tmp_path / "base"))


def test_a_resumed_stage_tells_the_same(tmp_path: Path) -> None:
    """Killed between the model and what comes after it: counts and notes are those of one go."""
    config, inputs = _config(), {"data": tmp_path / "data"}
    rows = dialogues(9)
    rows[3]["messages"][0]["content"] = "word " * 200
    write_jsonl(tmp_path / "data" / "corpus.jsonl", rows)
    whole = Work(tmp_path / "whole")
    base.run(config, inputs, whole)
    assert whole.counts
    (tmp_path / "whole" / "scratch" / "model.json").unlink()
    before = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    again = Work(tmp_path / "whole")
    base.run(config, inputs, again)
    assert again.counts == whole.counts
    assert again.notes["steps"] == whole.notes["steps"]
    assert (tmp_path / "whole" / "model" / "model.safetensors").read_bytes() == before


def test_no_preferences_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path)
    write_jsonl(inputs["data"] / "preferences.jsonl", [])
    config = Config(
        base=SMALL, data={"format": "jsonl", "path": "x.jsonl"}, reward={"grader": "model"}
    )
    with pytest.raises(DataError, match=r"name one in reward\.model_name_or_path"):
        base.run(config, inputs, Work(tmp_path / "base"))
    assert not (tmp_path / "base" / "model").exists()
