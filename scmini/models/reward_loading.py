"""Finding and loading reward models: from a folder or the hub, in 16 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scmini.errors import ConfigError, DataError, EnvironmentProblem
from scmini.models import starling
from scmini.models.loading import device, quietly
from scmini.models.nf4 import keep_linear4bit_layout
from scmini.quoting import plain

KEY = "reward.model_name_or_path"
BODY_KEY = "reward.body_name_or_path"
SMALL_FILES = ["*.json", "tokenizer*", "*.model", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HEAD = "score"
"""Module of the reward head in transformers' sequence classification."""


def load_model(
    source: str,
    *,
    revision: str | None,
    body: str | None,
    dtype: str,
    load_in_4bit: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with one label, and its tokenizer, on this process's device.

    Args:
        source: folder or hub name of a sequence classification in safetensors, or of weights in
            Starling's layout (see `starling`).
        revision: branch, tag or commit on the hub.
        body: folder or hub name whose configuration and tokenizer are used where the source has
            none that fit.
        dtype: "float32", "bfloat16" or "float16".
        load_in_4bit: everything but embeddings and head in NF4.

    Raises:
        ConfigError: not a reward model, or a body is needed and none is named.
        DataError: a folder that is missing or cannot be read; weights that fit no configuration.
        EnvironmentProblem: a hub name that cannot be fetched.
    """
    folder = find(source, revision, KEY, with_weights=True)
    own = [(KEY, folder)]
    others = [(BODY_KEY, find(body, None, BODY_KEY, with_weights=False))] if body else []
    files = starling.weight_files(folder)
    options = _options(dtype, load_in_4bit)
    weights = starling.read(files)
    if weights is None:
        model = _load_classification(source, folder, files, options)
    else:
        at = files[0] if len(files) == 1 else folder
        named = starling.sequence_classification_weights(weights, at)
        model = _load_with_value_head(source, named, own + others, options)
    keep_linear4bit_layout(model)
    model.requires_grad_(False)
    return model.eval(), _load_tokenizer(source, own + others, as_published=weights is not None)


def find(name: str, revision: str | None, key: str, *, with_weights: bool) -> Path:
    """A folder as it is; of a hub name the folder in the cache, fetched if need be.

    Pickled weights are fetched only where there are no others.

    Raises:
        DataError: a folder that does not exist.
        EnvironmentProblem: the hub does not give it.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise DataError(f"{key}: the folder {name} does not exist")
    patterns = [*SMALL_FILES, "*.safetensors"] if with_weights else SMALL_FILES
    folder = _snapshot(name, revision, key, patterns)
    if with_weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, revision, key, [*SMALL_FILES, "*.bin", "*.pt"])
    return folder


def _snapshot(name: str, revision: str | None, key: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unwanted = ["*/*", *(f"{start}*" for start in starling.NOT_WEIGHTS)]
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=unwanted
        )
        return Path(folder)
    except MemoryError:
        raise
    except GatedRepoError:
        why = f"its licence must be accepted first at https://huggingface.co/{name}, and this "
        why += "machine signed in with `hf auth login`"
    except RevisionNotFoundError:
        why = f"it has no revision {revision}; see {key.replace('model_name_or_path', 'revision')}"
    except RepositoryNotFoundError:
        why = "there is no such model, or it is private (`hf auth login`)"
    except Exception as error:  # of whichever library carries the connection
        reason = " ".join(str(error).split())[:300]
        why = f"({reason}); check the name and the connection"
    raise EnvironmentProblem(
        f"{key}: {name} could not be fetched from the Hugging Face hub: {why}; or download it "
        "elsewhere and give the folder"
    )


def _options(dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    precision = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": precision, "attn_implementation": "sdpa"}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision,
            llm_int8_skip_modules=[HEAD],  # read for 4 bits too
        )
    where = device()
    if where.type != "cpu":
        options["device_map"] = {"": where}
    return options


def _load_classification(
    source: str, folder: Path, files: Sequence[Path], options: dict[str, Any]
) -> PreTrainedModel:
    """transformers' own layout: config.json and safetensors."""
    if any(path.suffix != starling.SAFETENSORS for path in files):
        raise DataError(
            f"{KEY}: {source} holds neither safetensors nor a pickle with {starling.HEAD}; "
            "transformers' save_pretrained writes safetensors"
        )
    try:
        labels = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels
        if labels != 1:
            raise ConfigError(f"{KEY}: {source} has {labels} labels; a reward model has one")
        with quietly():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (ConfigError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers believes what a config.json says
        reason = plain(error)
        raise DataError(
            f"{KEY}: {source} does not hold a readable reward model, config.json with weights in "
            f"safetensors ({reason})"
        ) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ConfigError(f"{KEY}: {source} has no weights for {missing}: not a reward model")
    found: PreTrainedModel = model
    return found


def _load_with_value_head(
    source: str,
    weights: dict[str, Tensor],
    folders: Sequence[tuple[str, Path]],
    options: dict[str, Any],
) -> PreTrainedModel:
    """Weights of Starling's layout, renamed, with the first configuration that fits them."""
    problems = []
    for key, folder in folders:
        if not (folder / "config.json").is_file():
            problems.append(f"{key}: {folder} has no config.json")
            continue
        try:
            return _build(_configuration(folder, weights), weights, options)
        except _Misfit as problem:
            problems.append(f"{key}: {folder / 'config.json'}: {problem}")
    if len(folders) == 1:
        raise ConfigError(
            f"{BODY_KEY} is needed: {source} holds weights with a value head and no configuration "
            f"that fits ({problems[0]}); name the model that it was trained from, or a folder with "
            "its config.json and tokenizer (Starling-RM-7B-alpha: meta-llama/Llama-2-7b-chat-hf)"
        )
    raise DataError(
        f"{KEY}: no configuration fits the weights of {source}: {'; '.join(problems)}; name the "
        f"model that it was trained from in {BODY_KEY}"
    )


def _build(
    config: PreTrainedConfig, weights: dict[str, Tensor], options: dict[str, Any]
) -> PreTrainedModel:
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    with quietly():
        model: PreTrainedModel = kind.from_pretrained(
            None, config=config, state_dict=weights, **options
        )
    return model


class _Misfit(Exception):
    """What keeps weights from fitting a configuration."""


def _configuration(folder: Path, weights: Mapping[str, Tensor]) -> PreTrainedConfig:
    """The configuration of a folder, for one label; `_Misfit` if it is not that of the weights."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _Misfit(plain(error, 200)) from None
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise _Misfit(f"no reward model is a {config.model_type}")
    config.num_labels = 1
    # The reward is read at the last token that is there: none stands for padding.
    config.pad_token_id = None
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    with torch.device("meta"), quietly():
        expected = kind(config).state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        raise _Misfit(f"no weights for {missing[0]}" if missing else f"no place for {unknown[0]}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            raise _Misfit(f"{name} has the shape {shapes}")
    return config


def _load_tokenizer(
    source: str, folders: Sequence[tuple[str, Path]], *, as_published: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first folder that has one.

    Args:
        as_published: read tokenizer.json as it is, where it is there. transformers 5 builds a
            Llama's anew, without the space that Llama-2's own writes after a special token: other
            ids than those a reward model of 2023 was trained on.
    """
    for key, folder in folders:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            continue
        there = as_published and (folder / TOKENIZER_FILES[0]).is_file()
        kind: Any = PreTrainedTokenizerFast if there else AutoTokenizer
        try:
            with quietly():
                tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
                    folder, trust_remote_code=False
                )
        except Exception as error:  # tokenizers has no class of its own for a broken file
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{key}: the tokenizer of {folder} is not readable ({reason})"
            ) from None
        return tokenizer
    raise ConfigError(
        f"{KEY}: {source} has no tokenizer; name a model or folder that has it in {BODY_KEY}"
    )
