"""The stages, what each of them reads, and so: which run of a stage is which.

    data - base - sft - sample - embed - filter - reference - dpo - generate - reward - report

A task is a stage, or a stage for one method. What a task reads (sections of the configuration,
files of upstream stages, files from outside) is declared here, once; its recipe is made of exactly
that.
"""

import difflib
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scmini.config import Config, is_trained_by_dpo, num_negatives
from scmini.data.readers import data_files
from scmini.errors import DataError, EnvironmentProblem, UsageError
from scmini.sections import DecodingConfig, Section, recipe_section
from scmini.store import Finished, Recipe, digest_of, sha256_of

MIB = 1 << 20


@dataclass(frozen=True)
class Task:
    """A stage, for one method where the stage has methods."""

    stage: str
    method: str | None = None

    @property
    def key(self) -> str:
        return f"{self.stage}:{self.method}" if self.method else self.stage

    @property
    def label(self) -> str:
        """As people read it."""
        return f"{self.stage} {self.method}" if self.method else self.stage


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
    "sft": Stage(("model", "sft"), seeded=True),
    "sample": Stage(("model", "sample"), seeded=True),
    "embed": Stage(("embed",), seeded=False),
    "filter": Stage(("filter",), seeded=True, version=2),
    "reference": Stage(("model", "reference"), seeded=False),
    "dpo": Stage(("model", "dpo"), seeded=True),
    "generate": Stage(("model", "generate"), seeded=True),
    "reward": Stage(("model", "reward"), seeded=False),
    "report": Stage(("report",), seeded=True),
}

_TRAIN, _TEST, _SHARDS = ("train.jsonl",), ("test.jsonl",), ("part-*.parquet",)
_MODEL, _ADAPTER = ("model/*",), ("adapter/*",)
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
    by_dpo = [method for method in config.methods if is_trained_by_dpo(method)]
    found = [Task("data")]
    if needs_base(config):
        found.append(Task("base"))
    found.append(Task("sft"))
    if "sft-continued" in config.methods:
        found.append(Task("sft", "sft-continued"))
    if own_answers:
        found += [Task("sample"), Task("embed")]
    if by_dpo:
        found += [Task("filter"), Task("reference")]
    found += [Task("dpo", method) for method in by_dpo]
    found += [Task("generate", method) for method in config.methods]
    found += [Task("reward", method) for method in config.methods]
    return [*found, Task("report")]


def needs_base(config: Config) -> bool:
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
        source = _producer(key, task)
        if source in existing:
            named = tuple(pattern.replace("{method}", task.method or "") for pattern in patterns)
            if (task.stage, key) == ("sample", "data") and takes_answers(config):
                named += ("responses.jsonl",)
            found[key] = Input(source, named if _is_read(config, task, key) else ())
    return found


def _producer(key: str, task: Task) -> Task:
    if key == "policy":
        return trained_by(task.method or "sft")
    return Task(key, task.method if key == "generate" else None)


def _is_read(config: Config, task: Task, key: str) -> bool:
    """Whether a declared input is read at all in this configuration."""
    if task.stage == "reward" and key == "base":
        return trains_reward_model(config)
    if task.stage == "dpo" and key == "sample":
        return num_negatives(task.method or "") is not None  # `dpo` has the data set's negatives
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
        if task.method is None and task.stage != "report"
    }
    for method in config.methods:
        found[f"train:{method}"] = Input(trained_by(method), _ADAPTER)
        found[f"generate:{method}"] = Input(Task("generate", method), ("generations.jsonl",))
        found[f"reward:{method}"] = Input(Task("reward", method), ("rewards.jsonl",))
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
        sources=_sources(config, task),
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
        found["for_base"] = needs_base(config)
        if takes_answers(config):
            found["for_sample"] = True  # else not there: recipes of other runs stay as they were
    if task.stage == "base":
        found["model"] = {"max_length": config.model.max_length}  # all it reads of this section
        found["reward_model"] = trains_reward_model(config)
    if task.stage == "filter":
        found["methods"] = sorted(m for m in config.methods if is_trained_by_dpo(m))
    if task.stage == "reward":
        found["grader"] = config.grader
    if task.stage == "report":
        found |= {"methods": config.methods, "name": config.name}
    return found


def _sources(config: Config, task: Task) -> dict[str, str]:
    found: dict[str, str] = {}
    if task.stage == "data":
        for path in data_files(config.data):
            found[f"data.path {path}"] = _file(path)
        if config.data.dataset_name:
            name = _model(config.data.dataset_name, config.data.revision)
            found["data.dataset_name"] = name
    for key, (name, revision) in _models(config, task).items():
        found[key] = _model(name, revision)
    return found


def _file(path: Path) -> str:
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"data.path: {path}: {error.strerror}") from None


@cache
def _sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    """Hashes a file once in the life of a process."""
    return sha256_of(path)


def _model(name: str, revision: str | None = None) -> str:
    """Digest of a local folder; for a name on the hub, the name with its revision."""
    folder = Path(name)
    if folder.is_dir():
        return folder_digest(folder)
    return f"{name}@{revision or 'main'}"


def check_sources(config: Config, finished: Collection[str] = ()) -> None:
    """Look for all that the configuration names on this machine, before anything runs.

    An engine is not looked for where its stage was `finished` before: it may not be needed again.

    Raises:
        DataError: a file or folder is missing; names the key.
        EnvironmentProblem: vLLM is named as engine and is not there.
    """
    drawing = {task.stage for task in tasks(config)} & {"sample", "generate"}
    for stage in sorted(drawing - set(finished)):
        _check_engine(stage, getattr(config, stage))
    for task in tasks(config):
        named = {key: name for key, (name, _) in _models(config, task).items()}
        if task.stage == "data" and config.data.dataset_name:
            named["data.dataset_name"] = config.data.dataset_name
        for key, name in named.items():
            if name.startswith((".", "/", "~")) and not Path(name).is_dir():
                raise DataError(f"{key}: the folder {name} does not exist")


def _check_engine(stage: str, decoding: DecodingConfig) -> None:
    if decoding.python is not None and not os.access(decoding.python, os.X_OK):
        raise EnvironmentProblem(f"{stage}.python: {decoding.python} is no program")
    if decoding.engine == "vllm" and not _has_vllm(decoding.python):
        raise EnvironmentProblem(
            f"{stage}.engine: vllm needs vLLM: pip install 'scmini[vllm]', or name the interpreter "
            f"of an environment that has it in {stage}.python (docs/sampling.md)"
        )


def _has_vllm(python: str | None) -> bool:
    """Whether this environment, or that of an interpreter, has vLLM."""
    if python is None:
        return importlib.util.find_spec("vllm") is not None
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def _models(config: Config, task: Task) -> dict[str, tuple[str, str | None]]:
    """Models from outside that a task loads: key of the configuration -> name and revision."""
    found = {}
    if "model" in sections(task) and task.stage != "reward":
        found["model.model_name_or_path"] = config.model.model_name_or_path
    if task.stage == "reward":
        found["reward.model_name_or_path"] = config.reward.model_name_or_path
    if task.stage == "embed" and config.embed.encoder != "hashed-ngrams":
        found["embed.encoder"] = config.embed.encoder
    revisions = {"model.model_name_or_path": config.model.revision}
    return {key: (name, revisions.get(key)) for key, name in found.items() if name}


def folder_digest(folder: Path) -> str:
    """Digest of a model folder.

    Small files count whole; of a file above 4 MiB its size and its first and last MiB. Reading
    15 GB of weights before every command would take a minute, and two different models of the same
    size differ in the header of a safetensors file or in the weights behind it.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        length = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix()}\0{length}\0".encode())
        with open(path, "rb") as handle:
            if length <= 4 * MIB:
                total.update(handle.read())
            else:
                total.update(handle.read(MIB))
                handle.seek(-MIB, 2)
                total.update(handle.read(MIB))
    return total.hexdigest()


def check_stage(config: Config, name: str) -> str:
    """`name` if it is a stage of this run; `UsageError` with the nearest name otherwise."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, ["all", *STAGES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"stages are: all, {', '.join(STAGES)}"
        raise UsageError(f"no stage {name!r}; {hint}")
    if not any(task.stage == name for task in tasks(config)):
        raise UsageError(
            f"this configuration has no stage {name}: "
            + ("a model is named" if name == "base" else f"no method of {config.methods} needs it")
        )
    return name
