"""The stages, what each of them reads, and so: which run of a stage is which.

    data - base - sft - sample - embed - filter - reference - dpo - generate - reward
    - benchmark - judge - report

A task is a stage, or a stage for one method. What a task reads (sections of the configuration,
files of upstream stages, files from outside) is declared here, once; its recipe is made of exactly
that.

The later iterations of SPIN are rounds of their own: `spin-2` samples from the policy of `spin`,
takes it as its reference, and trains on from it. The tasks of such a round bear the method's name
and belong to the phase `dpo`.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from scmini import outside
from scmini.config import (
    Config,
    is_trained_by_dpo,
    later_rounds,
    methods_with_pairs,
    num_negatives,
    spin_iterations,
)
from scmini.errors import UsageError
from scmini.sections import Section, recipe_section
from scmini.store import Finished, Recipe, digest_of


@dataclass(frozen=True)
class Task:
    """A stage, for one method where the stage has methods."""

    stage: str
    method: str | None = None

    @property
    def key(self) -> str:
        return f"{self.stage}:{self.method}" if self.method else self.stage

    @property
    def phase(self) -> str:
        """The stage by which a person chooses it: `dpo` for all of a later round of SPIN."""
        return "dpo" if self.method and self.stage in _ROUND else self.stage

    @property
    def label(self) -> str:
        """As people read it."""
        return f"{self.stage} {self.method}" if self.method else self.stage


_ROUND = ("sample", "filter", "reference")
"""Stages that a later round of SPIN has for itself, before `dpo`."""


@dataclass(frozen=True)
class Stage:
    """What a stage reads of the configuration, and its version."""

    sections: tuple[str, ...]
    seeded: bool
    """Whether it draws random numbers."""
    version: int = 1
    """Raise it when the meaning of the stage changes: its results are then made anew."""


STAGES = {
    "data": Stage(("data",), seeded=True),
    "base": Stage(("base", "model"), seeded=True),
    "sft": Stage(("model", "sft"), seeded=True, version=3),
    "sample": Stage(("model", "sample"), seeded=True, version=2),
    "embed": Stage(("embed",), seeded=False),
    "filter": Stage(("filter",), seeded=True, version=2),
    "reference": Stage(("model", "reference"), seeded=False, version=3),
    "dpo": Stage(("model", "dpo"), seeded=True, version=3),
    "generate": Stage(("model", "generate"), seeded=True, version=2),
    "reward": Stage(("model", "reward"), seeded=False, version=2),
    "benchmark": Stage(("model", "benchmark"), seeded=True),
    "judge": Stage(("judge",), seeded=False),
    "report": Stage(("report",), seeded=True, version=2),
}

_TRAIN, _TEST, _SHARDS = ("train.jsonl",), ("test.jsonl",), ("part-*.parquet",)
_MODEL, _ADAPTER = ("model/*",), ("adapter/*",)
_ANSWERS = ("mt_bench/*", "alpaca_eval/*")
_READS: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {},
    "base": {"data": ("corpus.jsonl", "preferences.jsonl")},
    "sft": {"data": _TRAIN, "base": _MODEL},
    "sft:sft-continued": {"data": _TRAIN, "base": _MODEL, "sft": _ADAPTER},
    "sample": {"data": _TRAIN, "base": _MODEL, "sft": _ADAPTER},
    "embed": {"data": _TRAIN, "sample": _SHARDS},
    "filter": {"data": _TRAIN, "sample": _SHARDS, "embed": ("part-*",)},
    "reference": {
        **{"data": _TRAIN, "base": _MODEL, "sft": _ADAPTER, "sample": _SHARDS},
        "filter": ("used.jsonl", "pairs/*"),
    },
    "dpo": {
        **{"data": _TRAIN, "base": _MODEL, "sft": _ADAPTER, "sample": _SHARDS},
        "filter": ("pairs/{method}.jsonl",),
        "reference": ("by-method/{method}.parquet",),
    },
    "generate": {"data": _TEST, "base": _MODEL, "policy": _ADAPTER},
    "benchmark": {"base": _MODEL, "policy": _ADAPTER},
    "judge": {"benchmark": _ANSWERS, "baseline": _ANSWERS},
    "reward": {"data": _TEST, "base": ("reward_model/*",), "generate": ("generations.jsonl",)},
}


@dataclass(frozen=True)
class Input:
    """Files of another task that a task reads. Without patterns it may look, but never depends."""

    task: Task
    patterns: tuple[str, ...]


def tasks(config: Config) -> list[Task]:
    """The tasks that this configuration needs, in an order in which they can run."""
    own_answers = any(num_negatives(method) is not None for method in config.methods)
    first = methods_with_pairs(config)
    found = [Task("data")]
    if needs_base(config):
        found.append(Task("base"))
    found.append(Task("sft"))
    if "sft-continued" in config.methods:
        found.append(Task("sft", "sft-continued"))
    if own_answers:
        found += [Task("sample"), Task("embed")]
    if first:
        found += [Task("filter"), Task("reference")]
    found += [Task("dpo", method) for method in first]
    for method in later_rounds(config):
        found += [Task(stage, method) for stage in (*_ROUND, "dpo")]
    found += [Task("generate", method) for method in config.methods]
    if config.grader != "none":
        found += [Task("reward", method) for method in config.methods]
    for stage in ["benchmark"] * bool(config.benchmark.tasks) + ["judge"] * config.judged:
        found += [Task(stage, method) for method in config.methods if _is_benchmarked(method)]
    return [*found, Task("report")]


def _is_benchmarked(method: str) -> bool:
    """Benchmarks have temperatures of their own, under which `sft-temperature-T` is `sft`."""
    return not method.startswith("sft-temperature-")


def needs_base(config: Config) -> bool:
    """Whether there is a stage `base`: it trains a model, or adds tokens to the named one."""
    return trains_base(config) or config.model.adds_tokens


def trains_base(config: Config) -> bool:
    """Whether the stage `base` trains the model, none being named."""
    return config.model.model_name_or_path is None


def trained_by(method: str) -> Task:
    """The task that trains a method's policy."""
    if is_trained_by_dpo(method):
        return Task("dpo", method)
    return Task("sft", method) if method == "sft-continued" else Task("sft")


def inputs(config: Config, task: Task) -> dict[str, Input]:
    """What a task reads of others, by the key under which its `run` finds the folder."""
    existing = tasks(config)
    if task.stage == "report":
        return _report_inputs(config, existing)
    found = {}
    for key, patterns in _READS.get(task.key, _READS[task.stage]).items():
        source = _producer(config, key, task)
        if key == "embed" and task.method:
            continue  # SPIN looks at no similarity
        if source in existing:
            named = tuple(pattern.replace("{method}", task.method or "") for pattern in patterns)
            if (task.stage, key) == ("sample", "data") and takes_answers(config):
                named += ("responses.jsonl",)
            found[key] = Input(source, named if _is_read(config, task, key) else ())
    return found


def _producer(config: Config, key: str, task: Task) -> Task:
    method = task.method or "sft"
    if key == "policy":
        return trained_by(method)
    if key == "baseline":
        return Task("benchmark", config.judge.baseline)
    if key in ("generate", "benchmark"):
        return Task(key, method)
    iterations = spin_iterations(method)
    if iterations > 1 and key in _ROUND:
        return Task(key, method)
    if iterations > 1 and key == "sft":  # the policy of the round before is start and reference
        return trained_by("spin" if iterations == 2 else f"spin-{iterations - 1}")
    return Task(key)


def _is_read(config: Config, task: Task, key: str) -> bool:
    """Whether a declared input is read at all in this configuration."""
    if task.stage == "base":
        return trains_base(config)
    if task.stage == "reward" and key == "base":
        return trains_reward_model(config)
    if task.stage == "dpo" and key == "sample":
        return num_negatives(task.method or "") is not None  # `dpo` has the data set's negatives
    if key == "baseline":
        return config.judge_compares
    return True


def trains_reward_model(config: Config) -> bool:
    """Whether the stage `base` also trains the reward model."""
    return config.grader == "model" and config.reward.model_name_or_path is None


def takes_answers(config: Config) -> bool:
    """Whether the answers to the training prompts come with the data."""
    return config.sample.engine == "data"


def _report_inputs(config: Config, existing: list[Task]) -> dict[str, Input]:
    """Results of every method, and a look at every other stage for its times and counts."""
    found = {
        task.key: Input(task, ("*",) if task.stage in ("data", "filter") else ())
        for task in existing
        if task.phase != task.stage or (task.method is None and task.stage != "report")
    }
    for task in existing:  # a policy on which only a later round of SPIN builds
        if task.stage == "dpo" and task.method not in config.methods:
            found[task.key] = Input(task, ())
    results = {
        "reward": ("rewards.jsonl",),
        "benchmark": ("scores.json", *_ANSWERS),
        "judge": ("scores.json", *_ANSWERS),
    }
    for method in config.methods:
        found[f"train:{method}"] = Input(trained_by(method), _ADAPTER)
        found[f"generate:{method}"] = Input(Task("generate", method), ("generations.jsonl",))
        for stage, patterns in results.items():
            if Task(stage, method) in existing:
                found[f"{stage}:{method}"] = Input(Task(stage, method), patterns)
    return found


def recipe(config: Config, task: Task, finished: Mapping[Task, Finished]) -> Recipe:
    """The recipe of a task whose inputs are finished.

    Raises:
        DataError: a file that it reads from outside is missing.
    """
    return Recipe(
        stage=task.stage,
        method=task.method,
        version=STAGES[task.stage].version,
        config=_settings(config, task),
        sources=outside.sources(config, task.stage),
        inputs={
            key: digest_of(finished[source.task].manifest, source.patterns)
            for key, source in inputs(config, task).items()
            if source.patterns
        },
    )


def sections(task: Task) -> tuple[str, ...]:
    """Names of the sections that a task reads."""
    if task.method == "sft-continued" and task.stage == "sft":
        return ("model", "sft_continued")
    return STAGES[task.stage].sections


def _settings(config: Config, task: Task) -> dict[str, Any]:
    names = sections(task)
    if task.stage == "report":  # it shows the whole configuration
        names = tuple(
            k for k in type(config).model_fields if isinstance(getattr(config, k), Section)
        )
    found: dict[str, Any] = {name: recipe_section(getattr(config, name)) for name in names}
    if STAGES[task.stage].seeded:
        found["seed"] = config.seed
    if task.stage == "data":
        found["for_base"] = trains_base(config)
        if takes_answers(config):
            found["for_sample"] = True  # else not there: recipes of other runs stay as they were
    if task.stage == "base" and trains_base(config):
        found["model"] = {"max_length": config.model.max_length}  # all it reads of this section
        found["reward_model"] = trains_reward_model(config)
    elif task.stage == "base":
        found = {"model": {"chat_template": config.model.chat_template}}
    if task.stage == "filter":
        found["methods"] = sorted(methods_with_pairs(config, task.method))
    if task.stage == "reward":
        found["grader"] = config.grader
    if task.stage == "report":
        found |= {"methods": config.methods, "name": config.name}
    return found


def check_sources(config: Config, finished: Collection[str] = ()) -> None:
    """Look for all that the configuration names on this machine, before anything runs.

    Args:
        finished: stages that were finished here before; they may not be run again.

    Raises:
        DataError: a file or folder is missing; names the key.
        EnvironmentProblem: vLLM is named as engine and is not there.
    """
    outside.check(config, list(dict.fromkeys(task.stage for task in tasks(config))), finished)


def check_stage(config: Config, name: str) -> str:
    """`name` if it is a stage of this run; `UsageError` with the nearest name otherwise."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, ["all", *STAGES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"stages are: all, {', '.join(STAGES)}"
        raise UsageError(f"no stage {name!r}; {hint}")
    if not any(task.stage == name for task in tasks(config)):
        raise UsageError(f"this configuration has no stage {name}: " + _why_without(config, name))
    return name


def _why_without(config: Config, stage: str) -> str:
    if stage == "base":
        return "a model is named, and no token is added to it"
    if stage == "reward" and config.grader == "none":
        return "reward.grader is none"
    if stage in ("benchmark", "judge"):
        return f"no {'task' if stage == 'benchmark' else 'judge'} is named in the section {stage}"
    return f"no method of {config.methods} needs it"
