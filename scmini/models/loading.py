"""Models, tokenizers and adapters: read from disk or the hub, quantised, checked, saved.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scmini.chat_templates import set_chat_template
from scmini.config import Config
from scmini.errors import ConfigError, DataError, EnvironmentProblem, ScminiError
from scmini.models.attention import check_attention, choose_attention, output_head, plain_model
from scmini.models.checkpoint_files import weight_files
from scmini.models.elementwise import apply_liger, check_liger
from scmini.models.memory import is_out_of_memory
from scmini.models.nf4 import decode_once, has_other_shapes, keep_linear4bit_layout
from scmini.models.qlora import fuse_lora
from scmini.quoting import plain
from scmini.sections import ModelConfig, SFTConfig

Policy: TypeAlias = PreTrainedModel | PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
KEY = "model.model_name_or_path"
OTHER_SHAPES = (
    KEY + ": the weights of {source} have other shapes than its config.json says; fetch the model "
    "again"
)
QUIET = (
    r".*kernels-community.*",
    r".*_check_is_size will be removed.*",
    r".*torch_dtype.*deprecated.*",
    r"MatMul8bitLt: inputs will be cast.*",
)


def device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK under torchrun), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def model_source(config: Config, inputs: dict[str, Path]) -> str:
    """Where the base model is: the folder that stage `base` made, else the configured name."""
    if "base" in inputs:
        return str(inputs["base"] / "model")
    assert config.model.model_name_or_path is not None
    return config.model.model_name_or_path


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder; see `load_base` for errors."""
    with reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    return tokenizer


def load_base_tokenizer(config: ModelConfig, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model with the configured chat template.

    Raises:
        DataError: it lacks a token that the template writes; and see `load_base`.
    """
    revision = config.revision if source == config.model_name_or_path else None
    tokenizer = load_tokenizer(source, revision)
    set_chat_template(tokenizer, config)
    return tokenizer


def load_base(config: ModelConfig, source: str) -> PreTrainedModel:
    """The frozen base model on this process's device, in NF4 if so configured.

    Raises:
        DataError: a local folder that is missing, or holds no model in safetensors.
        EnvironmentProblem: a hub name that cannot be fetched. Both name the key and the remedy.
        Also DataError: weights that are missing or of other shapes, and models that need code of
        their own, which is never run.
    """
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {}
    if config.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    where = device()
    if where.type != "cpu":
        options["device_map"] = {"": where}
    revision = config.revision if source == config.model_name_or_path else None
    with reading(source):
        _check_weights(Path(source))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # else they would be drawn at random
        raise DataError(
            f"{KEY}: {source} has no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; fetch the model again"
        )
    if config.load_in_4bit and has_other_shapes(model):
        raise DataError(OTHER_SHAPES.format(source=source))
    keep_linear4bit_layout(model)
    model.requires_grad_(False)
    return model.eval()


def _check_weights(folder: Path) -> None:
    """Of a local folder: transformers would read what an index names outside it, and take an
    adapter for the model that it names."""
    if folder.is_dir():
        try:
            weight_files(folder)
        except DataError as error:
            raise DataError(f"{KEY}: {error}") from None


def fresh_adapter(config: ModelConfig, source: str, sft: SFTConfig, seed: int) -> PeftModel:
    """A new trainable LoRA adapter (float32) on the frozen base model. B is 0: it changes nothing.

    A depends on the seed alone. Raises ConfigError where `sft.lora_target_modules` fits no layer,
    or names lm_head; EnvironmentProblem where a chosen kernel library or its device is missing.
    """
    base = _load_for_scoring(config, source)
    lora = LoraConfig(
        r=sft.lora_r,
        lora_alpha=sft.lora_alpha,
        lora_dropout=sft.lora_dropout,
        target_modules=sft.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base, lora)
        except ValueError as error:
            raise ConfigError(f"sft.lora_target_modules: {error}") from None
    output_head(plain_model(model))
    fuse_lora(model)
    return model


def load_policy(
    config: ModelConfig, source: str, adapter: Path | None, *, trainable: bool
) -> Policy:
    """The base model with a copy of an adapter, in float32 whatever the base is in.

    Args:
        source: folder or hub name of the base model.
        adapter: PEFT folder; None gives the frozen base model alone.
        trainable: whether the adapter's weights get gradients.

    Raises:
        DataError: the folder is no safetensors adapter, or does not fit this base model.
        EnvironmentProblem: a chosen kernel library, or the CUDA device that it needs, is missing.
    """
    base = _load_for_scoring(config, source)
    if adapter is None:
        return base
    model = _attach(base, source, adapter, trainable=trainable)
    fuse_lora(model)
    return model


def load_for_generation(config: ModelConfig, source: str, adapter: Path | None) -> PreTrainedModel:
    """The policy ready for `generate`, with the same weight values, made as fast as they allow.

    In float32 the adapter is merged (it changes rounding only). In 16 bits merging would round the
    adapter away, so it stays beside the weights, with PEFT's own forward: on CUDA it multiplies
    single tokens without decoding all weights. On the CPU, where every NF4 product would decode its
    weights anew for each token, they are decoded once.
    """
    model = load_base(config, source)
    quantised = config.load_in_4bit
    if quantised and model.device.type == "cpu":
        decode_once(model)
        quantised = False
    if adapter is not None:
        policy = _attach(model, source, adapter, trainable=False)
        merge = config.dtype == "float32" and not quantised
        model = plain_model(cast(Any, policy).merge_and_unload() if merge else policy)
    model.config.use_cache = True
    return model.eval()


def checkpoint_folder(config: ModelConfig, source: str) -> Path:
    """Where the files of a base model are: its folder, or what the hub's cache has or fetches.

    Raises:
        DataError: a local folder that is missing.
        EnvironmentProblem: a hub name that cannot be fetched. Both name the key and the remedy.
    """
    with reading(source):
        if Path(source).is_dir():
            return Path(source)
        revision = config.revision if source == config.model_name_or_path else None
        wanted = ["model*.safetensors", "model.safetensors.index.json", "*config.json"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))


def save_adapter(model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a PEFT folder, with tokenizer and chat template if given; same weights, same bytes."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT keeps module names in a set, whose order differs from process to process.
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if isinstance(value, list):
            settings[key] = sorted(value, key=str)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # an empty form for the hub
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Put the weights of a saved adapter into a model that has one of the same shape."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def enable_checkpointing(model: Policy) -> None:
    """Keep only layer inputs for backward and compute the rest again.

    Non-reentrant, so that frozen embeddings need no artificial gradient.
    """
    inner = plain_model(model)
    with quietly():
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _load_for_scoring(config: ModelConfig, source: str) -> PreTrainedModel:
    """The base model with the kernels that the configuration chooses, checked before reading."""
    check_attention(config.attn_implementation)
    if config.use_liger_kernel:
        check_liger()
    base = load_base(config, source)
    choose_attention(base, config.attn_implementation)
    if config.use_liger_kernel:
        apply_liger(base)
    return base


def _attach(base: PreTrainedModel, source: str, adapter: Path, *, trainable: bool) -> PeftModel:
    """The base model with an adapter on it, checked to be its own."""
    rank = check_adapter_folder(adapter)
    try:
        with quietly():
            model = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
    except SafetensorError as error:
        raise DataError(
            f"{adapter / ADAPTER_WEIGHTS}: damaged ({plain(error)}); fetch it again"
        ) from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # PEFT raises whatever comes of a configuration that it believes
        if is_out_of_memory(error) or "allocate memory" in str(error):
            raise
        raise DataError(misfit(adapter, source, f"rank {rank}: {error}")) from None
    _check_all_loaded(model, adapter, source)
    output_head(plain_model(model))
    return model if trainable else model.eval()


def check_adapter_folder(adapter: Path) -> int:
    """The adapter's rank; DataError if the folder is not a PEFT folder in safetensors."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise DataError(f"{adapter}: not an adapter folder, {name} is missing")
    path = adapter / ADAPTER_CONFIG
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get("r", 0))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path}: not a PEFT configuration; fetch the adapter again") from None


def _check_all_loaded(model: PeftModel, adapter: Path, source: str) -> None:
    """PEFT passes over weights that fit no layer; here that is an error."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != expected:
        example = sorted(stored ^ expected)[0]
        where = "the base model has no layer" if example in stored else "the adapter has no weights"
        raise DataError(misfit(adapter, source, f"{where} for {example}"))


def misfit(adapter: Path, source: str, problem: str) -> str:
    """What to say of an adapter that does not fit its base model."""
    return (
        f"{adapter}: this adapter was not made for the base model {source} ({plain(problem)}); "
        f"use the {KEY} it was trained on"
    )


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Errors of reading a model or tokenizer, turned into sentences."""
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise DataError(f"{KEY}: the folder {source} does not exist")
    try:
        with quietly():
            yield
    except (ScminiError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # of whichever library reads a file: tokenizers has no class of its own
        raise _as_known(error, source) from error


def _as_known(error: Exception, source: str) -> Exception:
    """What reading a model or tokenizer may fail with, as a sentence; other errors as they are."""
    reason = plain(error)
    if "trust_remote_code" in str(error):
        return DataError(
            f"{KEY}: {source} needs Python code that comes with it (auto_map in config.json or "
            "tokenizer_config.json), which scmini never runs; name a model of a kind that "
            "transformers has itself (a newer transformers may have this one)"
        )
    if isinstance(error, (OSError, SafetensorError)):
        if Path(source).is_dir():
            return DataError(
                f"{KEY}: {source} does not hold a model with config.json, safetensors weights and "
                f"tokenizer ({reason}); other weights can be "
                "converted with transformers' save_pretrained"
            )
        return EnvironmentProblem(
            f"{KEY}: {source} could not be fetched from the Hugging Face hub ({reason}); check the "
            "name and the connection (gated models need `hf auth login`), or download it elsewhere "
            "and give the folder"
        )
    if isinstance(error, RuntimeError) and re.search("mismatched|overflow", str(error)):
        return DataError(OTHER_SHAPES.format(source=source))
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        return error  # of the device, not of the files
    return DataError(
        f"{KEY}: {source} is not readable ({type(error).__name__}: {reason}); fetch it again, "
        "or name another model"
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and warnings that are known to mean nothing here."""
    from transformers.utils import logging as hf_logging

    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
