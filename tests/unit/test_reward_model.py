"""Reward models: scored on trees as the library scores one by one; trained, resumed, graded."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from starling_helpers import FORMAT, Twin, llama_tokenizer, save_body, save_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from scmini import console
from scmini.config import Config
from scmini.errors import ConfigError, DataError, DoesNotFit, RecordError
from scmini.models.reward import RewardModel, reward_ids
from scmini.records import Generation, read_generations, read_rewards, write_jsonl
from scmini.stages import reward as stage
from scmini.store import Work
from scmini.training import reward_model as training
from scmini_kernels import PrefixTree

WORDS = [
    "the",
    "goose",
    "says",
    "honk",
    "moo",
    "baa",
    "well",
    "sure",
    "please",
    "tell",
    "me",
    "about",
    "it",
    "is",
    "white",
    ".",
    "!",
    "?",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} "
    "{% endfor %}"
)


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    special = ["<unk>", "<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def small(**changes: Any) -> LlamaConfig:
    shape = {
        **{"vocab_size": 6 + len(WORDS), "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
    }
    return LlamaConfig(**{**shape, **changes})


def text(rng: random.Random, most: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def judge(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> RewardModel:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(small(num_labels=1, **changes))
    return RewardModel(model, tokenizer, max_length=64, tokens_per_microbatch=60)


def one_by_one(model: Any, tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> float:
    """The library's own forward of one padded conversation."""
    model.set_attn_implementation("eager")
    conversation = [*prompt, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    batch = tokenizer(
        rendered, add_special_tokens=False, padding="max_length", max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        return float(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_tree_equals_the_padded_library_forward(pad: str) -> None:
    """Also where padding is the end token: the library then reads before it, and so do we."""
    tokenizer = make_tokenizer(pad)
    model = judge(tokenizer, pad_token_id=tokenizer.pad_token_id)
    rng = random.Random(5)
    questions = []
    for _ in range(7):
        answers = [text(rng) for _ in range(4)]
        answers += [answers[0], answers[0] + " it is", ""]  # a repeat, a continuation, a blank
        questions.append(([{"role": "user", "content": text(rng)}], answers))
    found = model.score_all(questions)
    alone = [model.score(*question) for question in questions]
    for (prompt, answers), rewards, again in zip(questions, found, alone, strict=True):
        slow = [one_by_one(model.model, tokenizer, prompt, answer) for answer in answers]
        assert rewards == pytest.approx(slow, abs=1e-4)
        assert again == pytest.approx(slow, abs=1e-4)
        assert rewards[0] == rewards[4]
        assert len(set(rewards)) > 3


def test_long_conversations_lose_their_beginning() -> None:
    tokenizer = make_tokenizer()
    prompt = [{"role": "user", "content": "the goose " * 20}]
    options = {"pad_token_id": tokenizer.pad_token_id}
    whole = reward_ids(tokenizer, prompt, "moo", max_length=1000, **options)
    assert reward_ids(tokenizer, prompt, "moo", max_length=12, **options) == whole[-12:]
    assert whole.count(tokenizer.bos_token_id) == 1


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    options = {"dtype": "float32", "max_length": 64, "tokens_per_microbatch": 64}
    with pytest.raises(DataError, match="does not exist"):
        RewardModel.load(str(tmp_path / "none"), **options)
    LlamaForSequenceClassification(small(num_labels=2)).save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="2 labels"):
        RewardModel.load(str(tmp_path / "two"), **options)
    language_model = LlamaForCausalLM(small(num_labels=1))
    language_model.save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        RewardModel.load(str(tmp_path / "lm"), **options)


def settings(**changes: Any) -> Config:
    return Config.model_validate(
        {
            **{"seed": 3, "methods": ["sft"], "data": {"format": "jsonl", "path": "x.jsonl"}},
            "model": {"max_length": 64, "dtype": "float32"},
            "base": {"reward_model": {"num_train_epochs": 2, "learning_rate": 3e-3, **changes}},
        }
    )


def preferences(path: Path, number: int = 240) -> Path:
    """A good answer honks."""
    rng = random.Random(0)
    rows = []
    for _ in range(number):
        prompt = [{"role": "user", "content": text(rng)}]
        chosen, rejected = f"{text(rng, 4)} honk", f"{text(rng, 4)} moo"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(path, rows)
    return path


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = LlamaForCausalLM(small(tie_word_embeddings=True, initializer_range=0.06))
    model.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_training_learns_and_resumes_exactly(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = preferences(tmp_path / "preferences.jsonl")
    whole = tmp_path / "whole" / "reward_model"
    notes = training.train_reward_model(settings(), make_tokenizer(), backbone, rows, whole)
    assert notes["reward_model_accuracy"] > 0.9
    assert notes["reward_model_pairs"] + notes["reward_model_held_out_pairs"] == 240
    assert 10 <= notes["reward_model_held_out_pairs"] <= 40

    class Killed(Exception):
        pass

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 17:
            raise Killed

    torn = tmp_path / "torn" / "reward_model"
    with monkeypatch.context() as patch:
        patch.setattr(training._Progress, "on_step_end", die)
        with pytest.raises(Killed):
            training.train_reward_model(settings(), make_tokenizer(), backbone, rows, torn)
    scratch = torn.parent / "scratch" / "reward_model"
    (scratch / "checkpoint-17").mkdir()  # as a kill in the middle of saving leaves it
    assert not torn.exists()
    assert training.newest_checkpoint(scratch) == str(scratch / "checkpoint-16")
    assert not (scratch / "checkpoint-17").exists()
    again = training.train_reward_model(settings(), make_tokenizer(), backbone, rows, torn)
    assert again == notes
    weights = "model.safetensors"
    assert (torn / weights).read_bytes() == (whole / weights).read_bytes()

    plain = AutoModelForSequenceClassification.from_pretrained(whole)
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == 1
    assert PreTrainedTokenizerFast.from_pretrained(whole).chat_template == TEMPLATE


def test_loss_is_that_of_bradley_and_terry() -> None:
    good, bad = [0.3, -1.2, 2.0], [0.1, 0.5, -3.0]
    slow = [-math.log(1 / (1 + math.exp(-(g - b)))) for g, b in zip(good, bad, strict=True)]
    loss = training.pairwise_loss(torch.tensor(good), torch.tensor(bad))
    assert float(loss) == pytest.approx(sum(slow) / 3, rel=1e-6)


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    rng = random.Random(2)
    pairs = [([{"role": "user", "content": text(rng, 2)}], "a", "b") for _ in range(2000)]
    learned, kept = training.split(pairs)
    assert len(learned) + len(kept) == 2000
    assert not {json.dumps(p[0]) for p in learned} & {json.dumps(p[0]) for p in kept}
    assert 50 < len(kept) < 400


def test_mistakes_in_preferences_are_named(tmp_path: Path, backbone: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "x"}], "chosen": "a"}\n')
    with pytest.raises(RecordError, match=r"line 1: field 'rejected'"):
        training.train_reward_model(settings(), make_tokenizer(), backbone, path, tmp_path / "out")
    path.write_text("")
    with pytest.raises(DataError, match="no preference pair"):
        training.train_reward_model(settings(), make_tokenizer(), backbone, path, tmp_path / "out")
    with pytest.raises(DataError, match="padding token"):
        training.train_reward_model(settings(), make_tokenizer("</s>"), backbone, path, tmp_path)


def generations(folder: Path, number: int) -> Path:
    rng = random.Random(9)
    rows = [
        Generation(f"p{i}", [{"role": "user", "content": text(rng)}], text(rng), text(rng))
        for i in range(number)
    ]
    write_jsonl(folder / "generations.jsonl", rows)
    return folder


def test_stage_grades_with_a_model_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHUNK", 4)
    tokenizer, inputs = make_tokenizer(), {"generate": generations(tmp_path / "g", 10)}
    model = judge(tokenizer)
    inputs["base"] = tmp_path / "base"
    model.model.save_pretrained(inputs["base"] / "reward_model")
    tokenizer.save_pretrained(inputs["base"] / "reward_model")
    work = Work(tmp_path / "work", "sft")
    stage.run(settings(), inputs, work)
    rewards = read_rewards(work.path / "rewards.jsonl")
    first = json.loads((inputs["generate"] / "generations.jsonl").read_text().splitlines()[0])
    slow = one_by_one(model.model, tokenizer, first["prompt"], first["response"])
    assert rewards[0].reward == pytest.approx(slow, abs=1e-4)
    before = (work.path / "rewards.jsonl").read_bytes()
    (work.path / "rewards.jsonl").unlink()
    (work.path / "scratch" / "part-0000004.jsonl").unlink()
    stage.run(settings(), inputs, Work(work.path, "sft"))
    assert (work.path / "rewards.jsonl").read_bytes() == before


def test_stage_loads_the_named_model_once_for_all_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every key of the section, in Starling's layout; a second method finds it loaded."""
    twin = Twin()
    source = save_weights(tmp_path / "starling", "bin", twin.state())
    keys = {
        **{"model_name_or_path": str(source), "body_name_or_path": str(save_body(tmp_path / "b"))},
        **{"dtype": "float32", "max_length": 20, "chat_template": "starling"},
    }
    config = Config.model_validate({**settings().model_dump(exclude_unset=True), "reward": keys})
    monkeypatch.setattr(stage, "CHUNK", 4)
    inputs = {"generate": generations(tmp_path / "g", 6)}
    loads: list[dict[str, Any]] = []
    plain = RewardModel.load.__func__  # type: ignore[attr-defined]

    def load(cls: Any, source: str, **options: Any) -> RewardModel:
        loads.append(options)
        found: RewardModel = plain(cls, source, **options)
        return found

    monkeypatch.setattr(RewardModel, "load", classmethod(load))
    works = [Work(tmp_path / f"work-{method}", method) for method in ("sft", "dpo")]
    for work in works:
        stage.run(config, inputs, work)
        assert work.notes["grader"] == "starling"
    assert len(loads) == 1
    assert loads[0]["max_length"] == 20
    tokenizer = llama_tokenizer()
    for row, generation in zip(
        read_rewards(works[1].path / "rewards.jsonl"),
        read_generations(inputs["generate"] / "generations.jsonl"),
        strict=True,
    ):
        for found, answer in (
            (row.reward, generation.response),
            (row.target_reward, generation.target),
        ):
            written = FORMAT.format(generation.prompt[0]["content"], answer)
            ids = tokenizer(written, add_special_tokens=False)["input_ids"][-20:]
            assert found == pytest.approx(twin.reward(ids), abs=1e-4)
    graded = read_generations(inputs["generate"] / "generations.jsonl")
    texts = [(g.prompt[0]["content"], text) for g in graded for text in (g.response, g.target)]
    written = [FORMAT.format(*pair) for pair in texts]
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]
    assert works[1].counts[stage.FULL] == sum(len(ids) >= 20 for ids in whole)
    other = Config.model_validate(
        {
            **settings().model_dump(exclude_unset=True),
            "reward": {**keys, "parity": "original", "max_length": 2048},
        }
    )
    stage.run(other, inputs, Work(tmp_path / "other", "sft"))
    assert [options["parity"] for options in loads] == ["none", "original"]


def test_stage_grades_the_demo_by_its_program(tmp_path: Path) -> None:
    prompt = "Tell me the sound of the goose. Be excited and use bullet points."
    good, bad = "Yay! The goose:\n- says honk\nHooray!", "The cow says moo."
    messages = [{"role": "user", "content": prompt}]
    write_jsonl(tmp_path / "g" / "generations.jsonl", [Generation("a", messages, bad, good)])
    work = Work(tmp_path / "work", "sft")
    stage.run(Config(methods=["sft"]), {"generate": tmp_path / "g"}, work)
    (reward,) = read_rewards(work.path / "rewards.jsonl")
    assert reward.target_reward == 1
    assert reward.reward < 0.5
    assert work.notes["mean_target_reward"] == 1
    write_jsonl(tmp_path / "g" / "generations.jsonl", [])
    with pytest.raises(DataError, match="no answer to grade"):
        stage.run(Config(methods=["sft"]), {"generate": tmp_path / "g"}, work)


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller rows, then single answers; the same rewards, and equal ones for equal answers."""
    tokenizer, rng = make_tokenizer(), random.Random(7)
    questions = [
        ([{"role": "user", "content": text(rng)}], [*answers, answers[0]])
        for answers in ([text(rng), text(rng)] for _ in range(6))
    ]
    expected = judge(tokenizer).score_all(questions)
    original, said = RewardModel._rewards, []
    monkeypatch.setattr(console, "warn", said.append)

    def room(most: int) -> None:
        def tight(self: RewardModel, groups: list[list[list[int]]]) -> list[float]:
            if sum(map(PrefixTree.count_tokens, groups)) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(self, groups)

        monkeypatch.setattr(RewardModel, "_rewards", tight)

    longest = max(
        len(ids)
        for prompt, answers in questions
        for ids in judge(tokenizer)._sequences(prompt, answers)
    )
    for most in (40, longest):
        room(most)
        model = judge(tokenizer)
        found = model.score_all(questions)
        for rewards, twins in zip(found, expected, strict=True):
            assert rewards == pytest.approx(twins, abs=1e-4)
            assert rewards[0] == rewards[2]
        assert longest // 2 <= (model.knob.lowered_to or 99) < 60, "halved for rows it had made"
        before = len(said)
        model.score_all(questions[:1])
        assert len(said) == before or most == longest, "the knob stays lowered"
    assert said[0].startswith("out of GPU memory while grading: reward.tokens_per_microbatch 60")
    room(longest - 1)
    with pytest.raises(DoesNotFit, match=f"while grading: {longest} tokens of one sequence alone"):
        judge(tokenizer).score_all(questions)
