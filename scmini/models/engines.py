"""Which engine draws answers, and how it is started."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from scmini.console import say, warn
from scmini.errors import DoesNotFit, EnvironmentProblem
from scmini.models.loading import load_for_generation
from scmini.models.merging import merge_adapter
from scmini.models.sampler import (
    NO_CHANCES,
    Chance,
    Sampler,
    TransformersSampler,
    end_tokens,
)
from scmini.models.vllm_sampler import Served, VllmSampler
from scmini.sections import DecodingConfig, ModelConfig


def build_sampler(
    model: ModelConfig,
    decoding: DecodingConfig,
    source: str,
    adapter: Path,
    tokenizer: Any,
    *,
    longest_prompt: int,
    seed: int,
    scratch: Path,
    chances: Mapping[str, Chance] = NO_CHANCES,
) -> Sampler:
    """The engine that `decoding.engine` names, with the adapter's policy.

    `auto` takes vLLM where there are a CUDA device and vLLM, and transformers where there is none
    or vLLM does not start; an engine that is named is never replaced.

    Args:
        source: folder or hub name of the base model.
        tokenizer: of the adapter.
        longest_prompt: in tokens.
        seed: of the vLLM engine.
        scratch: folder for merged weights.
        chances: by id, of the prompts that are answered otherwise than `decoding` says.

    Raises:
        EnvironmentProblem, DoesNotFit: vLLM is named, and is not there or does not start.
        DataError: the adapter does not fit the base model.
    """
    if decoding.engine == "vllm" or (decoding.engine == "auto" and _has_vllm(decoding)):
        served = Served(source, _revision(model, source), model.dtype, adapter)
        if decoding.weights == "merged":
            merged = merge_adapter(model, source, adapter, scratch / "merged")
            served = Served(str(merged), None, model.dtype, None)
        try:
            return VllmSampler(
                served,
                tokenizer,
                decoding,
                model.max_length,
                longest_prompt=longest_prompt,
                ends=end_tokens(tokenizer, _generation_config(model, source)),
                seed=seed,
                chances=chances,
            )
        except (EnvironmentProblem, DoesNotFit) as error:
            if decoding.engine == "vllm":
                raise
            warn(f"{error}. Going on with transformers, which is slower")
    elif decoding.engine == "auto" and torch.cuda.is_available():
        warn("no vLLM here: drawing answers with transformers, which is many times slower")
    elif decoding.engine == "auto" and decoding.python is not None:
        say(f"no CUDA device: drawing answers with transformers, not with {decoding.python}")
    policy = load_for_generation(model, source, adapter)
    return TransformersSampler(policy, tokenizer, decoding, model.max_length, chances)


def _has_vllm(decoding: DecodingConfig) -> bool:
    if not torch.cuda.is_available():
        return False
    return decoding.python is not None or importlib.util.find_spec("vllm") is not None


def _revision(model: ModelConfig, source: str) -> str | None:
    return model.revision if source == model.model_name_or_path else None


def _generation_config(model: ModelConfig, source: str) -> Any:
    """As the model itself would have it: from its file, else from the model's configuration."""
    options: dict[str, Any] = {"revision": _revision(model, source) or "main"}
    try:
        return GenerationConfig.from_pretrained(source, **options)
    except OSError:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        return GenerationConfig.from_model_config(settings)
