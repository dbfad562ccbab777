"""Stage `reward`: grade a method's answers to the test prompts, and the targets beside them.

The demo is graded by its own program, everything else by a reward model. rewards.jsonl has one row
{"id", "reward", "target_reward"} for each answer, in the order of the test set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmini import console
from scmini.config import Config
from scmini.data import zoo
from scmini.errors import DataError
from scmini.records import Generation, Reward, read_generations, read_rewards, write_jsonl
from scmini.store import Work, sealing, write_atomic

if TYPE_CHECKING:
    from scmini.models.reward import RewardModel

FULL = "conversations that fill reward.max_length: what is longer lost its beginning"
CHUNK = 256
"""Prompts that a reward model scores between two saves."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write rewards.jsonl; a killed run goes on at the chunk it was at."""
    generations = read_generations(inputs["generate"] / "generations.jsonl")
    if not generations:
        raise DataError(f"{inputs['generate'] / 'generations.jsonl'}: no answer to grade")
    if config.grader == "program":
        rewards = [_by_program(generation) for generation in generations]
    else:
        rewards = _by_model(config, inputs, work, generations)
    write_jsonl(work.path / "rewards.jsonl", rewards)
    work.note("mean_reward", sum(r.reward for r in rewards) / len(rewards))
    work.note("mean_target_reward", sum(r.target_reward for r in rewards) / len(rewards))


def _by_program(generation: Generation) -> Reward:
    users = [m["content"] for m in generation.prompt if m["role"] == "user"]
    if not users:
        raise DataError(f"prompt {generation.id!r} has no user message to grade an answer by")
    grades = (zoo.grade(users[-1], text) for text in (generation.response, generation.target))
    return Reward(generation.id, *grades)


def _by_model(
    config: Config, inputs: dict[str, Path], work: Work, generations: Sequence[Generation]
) -> list[Reward]:
    from scmini.training.checkpoints import peak_gib  # brings torch; the program grader needs none

    source = config.reward.model_name_or_path or str(inputs["base"] / "reward_model")
    found: list[Reward] = []
    for start in range(0, len(generations), CHUNK):
        part = work.path / "scratch" / f"part-{start:07d}.jsonl"
        full = part.with_suffix(".full")
        chunk = generations[start : start + CHUNK]
        if not (part.exists() and full.exists()):
            judge = _loaded(source, json.dumps(_options(config), sort_keys=True))
            answers = [(g.prompt, [g.response, g.target]) for g in chunk]
            before = judge.full
            scores = zip(chunk, judge.score_all(answers), strict=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            with sealing(full):
                write_atomic(full, str(judge.full - before).encode())
            with sealing(part):
                write_jsonl(part, [Reward(g.id, *pair) for g, pair in scores])
        found += read_rewards(part)
        if number := int(full.read_text()):
            work.count(FULL, number)
        console.progress(len(found), len(generations), "prompts")
    work.note("grader", _name(source))
    work.note("peak_gib", round(peak_gib(), 3))
    return found


def _options(config: Config) -> dict[str, Any]:
    """Keywords of `RewardModel.load`."""
    reward = config.reward
    return {
        "dtype": reward.dtype or config.model.dtype,
        "max_length": reward.max_length or config.model.max_length,
        "tokens_per_microbatch": reward.tokens_per_microbatch,
        "revision": reward.revision,
        "body": reward.body_name_or_path,
        "load_in_4bit": reward.load_in_4bit,
        "chat_template": reward.chat_template,
        "parity": reward.parity,
    }


@lru_cache(maxsize=1)
def _loaded(source: str, options: str) -> RewardModel:
    """The reward model, kept for the methods that this process grades after the first.

    Args:
        options: keywords of `RewardModel.load` as JSON.
    """
    from scmini.models.reward import RewardModel

    console.say(f"loading the reward model {_name(source)}")
    return RewardModel.load(source, **json.loads(options))


def _name(source: str) -> str:
    """The reward model's name as its own configuration gives it, for the manifest."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return Path(source).resolve().name if Path(source).is_dir() else source
    architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["?"]
    return str(architectures[0])
