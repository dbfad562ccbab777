"""Real vLLM, in an environment of its own: SCMINI_VLLM_PYTHON names its interpreter.

Tiny random models in fp32, made on the spot and saved in the real formats.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import tokenizer, work
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from scmini.chat import prompt_ids
from scmini.config import Config
from scmini.records import (
    Example,
    Samples,
    read_generations,
    read_samples,
    read_samples_shard,
    write_examples,
)
from scmini.stages import generate, sample

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SCMINI_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SCMINI_VLLM_PYTHON names no Python with vLLM")

TOKENIZER = tokenizer()
END = TOKENIZER.eos_token_id
ODD = [
    "the cat",
    "woof \u202e 👩\u200d👧",
    "\n\n",
    "a" * 60,
    "le chat s\u0301appelle",
    "dog dog dog",
]
EXAMPLES = [
    Example(str(i), [{"role": "user", "content": f"{ODD[i % len(ODD)]} {i}"}], "meow")
    for i in range(18)
] + [Example("long", [{"role": "user", "content": "the cat " * 60}], "meow")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model whose answers end now and then, an adapter that changes them, and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=None, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.generation_config.eos_token_id = [END, 9]  # a second end token, as some models have
    model.save_pretrained(folder / "base" / "model")
    TOKENIZER.save_pretrained(folder / "base" / "model")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    for stage in ("sft", "policy"):
        policy.save_pretrained(folder / stage / "adapter")
        TOKENIZER.save_pretrained(folder / stage / "adapter")
    (folder / "data").mkdir()
    for side in ("train", "test"):
        write_examples(folder / "data" / f"{side}.jsonl", EXAMPLES)
    return {name: folder / name for name in ("base", "sft", "policy", "data")}


def config(**decoding: Any) -> Config:
    settings = {"engine": "vllm", "python": PYTHON} | decoding
    if decoding.get("engine") == "transformers":
        del settings["python"]
    return Config.model_validate(
        {
            "model": {"load_in_4bit": False, "dtype": "float32", "max_length": 128},
            "sample": settings | {"n": 5, "max_new_tokens": 20, "shard_size": 4},
            "generate": settings | {"temperature": 0, "max_new_tokens": 20},
        }
    )


def test_greedy_answers_are_those_of_transformers(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Beside the base or merged into it, the adapter gives what transformers gives."""
    ways = {
        "transformers": config(engine="transformers"),
        "adapter": config(),
        "merged": config(weights="merged"),
    }
    answers = {}
    for name, settings in ways.items():
        made = work(tmp_path / name, "sft")
        generate.run(settings, inputs, made)
        answers[name] = [
            (row.id, row.response) for row in read_generations(made.path / "generations.jsonl")
        ]
        assert made.counts["prompt leaves no room for an answer"] == 1
    assert len({text for _, text in answers["transformers"]}) > 6
    assert answers["adapter"] == answers["transformers"]
    assert answers["merged"] == answers["transformers"]


def test_samples(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = work(tmp_path / "sample")
    sample.run(config(), inputs, made)
    rows = {row.id: row for row in read_samples(made.path)}
    assert list(rows) == [example.id for example in EXAMPLES]
    assert not rows["long"].responses
    ends = {END, 9}
    for example in EXAMPLES[:-1]:
        row = rows[example.id]
        assert row.prompt_token_ids == prompt_ids(TOKENIZER, example.prompt)
        assert len(row.responses) == 5
        assert len({tuple(r.token_ids) for r in row.responses}) == 5
        for r in row.responses:
            room = min(20, 128 - len(row.prompt_token_ids))
            ended = r.token_ids[-1] in ends
            assert not ends & set(r.token_ids[:-1])
            assert r.finish_reason == ("stop" if ended else "length")
            assert ended or len(r.token_ids) == room
            assert r.text == TOKENIZER.decode(r.token_ids, skip_special_tokens=True)
    stopped = [r.finish_reason for row in rows.values() for r in row.responses]
    assert {"stop", "length"} == set(stopped)
    assert made.notes["engine"]["engine"] == "vllm"
    assert made.notes["tokens"] == sum(
        len(r.token_ids) for row in rows.values() for r in row.responses
    )


TOY = {
    "methods": "[self-contrast-1]", "base.vocab_size": 400, "base.hidden_size": 64,
    "base.intermediate_size": 64, "base.num_hidden_layers": 2, "base.num_attention_heads": 2,
    "base.num_key_value_heads": 1, "data.num_pretraining": 320, "data.num_train": 48,
    "data.num_test": 12, "sft.num_train_epochs": 1, "sft.prompts_per_step": 8,
    "sample.engine": "vllm", "sample.python": PYTHON, "sample.n": 16, "sample.num_prompts": 40,
    "sample.max_new_tokens": 100, "sample.shard_size": 8, "sample.max_num_seqs": 32,
}  # fmt: skip


def engines() -> set[int]:
    """Processes that run the engine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"vllm_engine.py" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """SIGKILL to the command: the engine dies with it; the next run asks only what is missing."""
    run = tmp_path / "runs" / "toy"
    sets = [text for key, value in TOY.items() for text in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "scmini", "run", "all", "--until", "sample", "-c", "demo"]
    command += ["-o", str(run), *sets]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    before = engines()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    journal = None
    end = time.monotonic() + 240
    while journal is None or journal.stat().st_size == 0:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < end
        found = list(tmp_path.glob("runs/.store/.sample-*.partial/scratch/answers.jsonl"))
        journal = found[0] if found else None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 20
    while engines() - before:
        assert time.monotonic() < end, "the engine outlived the command"
        time.sleep(0.1)
    known: dict[str, Samples] = {}
    for shard in journal.parent.parent.glob("part-*.parquet"):
        known |= {row.id: row for row in read_samples_shard(shard)}
    from scmini.models.answering import _Journal

    known |= {row.id: row for row in _Journal(journal).rows()}
    assert 0 < len(known) < 40
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(read_samples(run / "samples"))
    assert len({row.id for row in rows}) == len(rows) == 40
    assert all(len(row.responses) == 16 for row in rows)
    assert {row.id: row for row in rows if row.id in known} == known
