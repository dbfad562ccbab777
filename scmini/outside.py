"""What a configuration names outside the run: files, models, data sets, engines; their digests."""

import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Collection
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from scmini.config import Config
from scmini.data.readers import data_files
from scmini.errors import DataError, EnvironmentProblem
from scmini.sections import DecodingConfig, JudgeConfig
from scmini.store import sha256_of

MIB = 1 << 20
_LOADS_MODEL = ("base", "sft", "sample", "reference", "dpo", "generate", "benchmark")
_QUESTIONS = {
    "mt-bench": ("mt_bench_questions", "mt_bench_references"),
    "alpaca-eval": ("alpaca_eval_questions",),
    "gsm8k": ("gsm8k_questions",),
    "lm-eval": ("lm_eval_include_path",),
}


def sources(config: Config, stage: str) -> dict[str, str]:
    """Digest of everything from outside that a stage reads, by the key that names it.

    Raises:
        DataError: a file is missing.
    """
    found: dict[str, str] = {}
    if stage == "data":
        for path in data_files(config.data):
            found[f"data.path {path}"] = _file("data.path", path)
        if config.data.dataset_name:
            name = _model(config.data.dataset_name, config.data.revision)
            found["data.dataset_name"] = name
    for key, (name, revision) in models(config, stage).items():
        found[key] = _model(name, revision)
    for key, name in _named_files(config, stage).items():
        found[key] = _file(key, Path(name)) if Path(name).is_file() else _model(name)
    return found


def models(config: Config, stage: str) -> dict[str, tuple[str, str | None]]:
    """Models that a stage loads: key of the configuration -> name and revision."""
    reward = config.reward
    found: dict[str, tuple[str | None, str | None]] = {}
    if stage in _LOADS_MODEL:
        found["model.model_name_or_path"] = config.model.model_name_or_path, config.model.revision
    if stage == "reward":
        found["reward.model_name_or_path"] = reward.model_name_or_path, reward.revision
        found["reward.body_name_or_path"] = reward.body_name_or_path, None
    if stage == "embed" and config.embed.encoder != "hashed-ngrams":
        found["embed.encoder"] = config.embed.encoder, None
    return {key: (name, revision) for key, (name, revision) in found.items() if name}


def _named_files(config: Config, stage: str) -> dict[str, str]:
    """Files, folders or data sets of the hub that a stage reads, by key."""
    if stage == "benchmark":
        keys = [key for task in config.benchmark.tasks for key in _QUESTIONS[task]]
        named = {f"benchmark.{key}": getattr(config.benchmark, key) for key in keys}
    elif stage == "judge":
        keys = ["prompts", "alpaca_eval_reference"]
        named = {f"judge.{key}": getattr(config.judge, key) for key in keys}
    else:
        named = {}
    return {key: name for key, name in named.items() if name is not None}


def _file(key: str, path: Path) -> str:
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{key}: {path}: {error.strerror}") from None


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


def check(config: Config, stages: Collection[str], finished: Collection[str]) -> None:
    """Look for all that some stages need on this machine, before anything runs.

    An engine or a tracker is not looked for where its stage was `finished` before: it may not be
    needed again.

    Raises:
        DataError: a file or folder is missing; names the key.
        EnvironmentProblem: a package that a stage needs is not there.
    """
    for stage in ("sample", "generate", "benchmark"):
        if stage in stages and stage not in finished:
            _check_engine(stage, getattr(config, stage))
    if "lm-eval" in config.benchmark.tasks and "benchmark" not in finished:
        _check_package("lm_eval", "benchmark.tasks: lm-eval", "scmini[eval]")
    if config.judge.alpaca_eval_annotator and "judge" not in finished:
        _check_package("alpaca_eval", "judge.alpaca_eval_annotator", "alpaca-eval' 'setuptools<81")
    if config.judge.model and "judge" in stages and "judge" not in finished:
        _check_key(config.judge)
    for section in _trained(config, set(stages) - set(finished)):
        _check_tracker(f"{section}.report_to", getattr(config, section).report_to)
    for stage in stages:
        named = {key: name for key, (name, _) in models(config, stage).items()}
        if stage == "data" and config.data.dataset_name:
            named["data.dataset_name"] = config.data.dataset_name
        for key, name in named.items():
            if _looks_local(name) and not Path(name).is_dir():
                raise DataError(f"{key}: the folder {name} does not exist")
        for key, name in _named_files(config, stage).items():
            if (_looks_local(name) or key.startswith("judge.")) and not Path(name).exists():
                raise DataError(f"{key}: {name} does not exist")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def has_module(name: str) -> bool:
    """Whether a module can be imported; it is not."""
    return importlib.util.find_spec(name) is not None


def _check_package(module: str, key: str, package: str) -> None:
    if not has_module(module):
        raise EnvironmentProblem(f"{key} needs a package: pip install '{package}'")


def _trained(config: Config, stages: Collection[str]) -> list[str]:
    """The sections of the trainings that these stages do."""
    found = [stage for stage in ("sft", "dpo") if stage in stages]
    continued = "sft" in stages and "sft-continued" in config.methods
    return [*found, "sft_continued"] if continued else found


def _check_tracker(key: str, tracker: str) -> None:
    if tracker == "none":
        return
    _check_package(tracker, f"{key}: {tracker}", tracker)
    if tracker == "wandb" and not _knows_wandb():
        raise EnvironmentProblem(
            f"{key}: wandb finds no login on this machine, and a stage cannot ask for one: "
            "wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )


def _knows_wandb() -> bool:
    """Whether Weights & Biases needs no login, or may find one.

    Its servers have changed their names, so a .netrc counts whatever it names, and so does a file
    of settings, which may name a mode; a login that is none is found when training begins.
    """
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path.home()
    settings = Path(os.environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings"
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"
    logins = [Path(os.environ.get("NETRC") or home / ".netrc").expanduser(), home / "_netrc"]
    return any(path.is_file() for path in (settings, here, *logins))


def _check_key(judge: JudgeConfig) -> None:
    """OpenAI's own server answers nobody without a key."""
    if urlsplit(judge.base_url).hostname != "api.openai.com":
        return
    if not os.environ.get(judge.api_key_variable, "").strip():
        raise EnvironmentProblem(
            f"judge.model: {judge.model} at api.openai.com needs a key in the environment variable "
            f"{judge.api_key_variable}; or name another server in judge.base_url"
        )


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
        return has_module("vllm")
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
