"""Engines that answer prompts, all from the same folders: model, tokenizer, LoRA adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from cases import Shape
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from peers import models, vllm_loop
from peers.implementations import Setup
from peers.names import BARE, BARE_TEXTS, GENERATE, OURS_VLLM
from scmini.models.answering import Plan, write_answers
from scmini.models.engines import build_sampler
from scmini.models.loading import load_for_generation, load_tokenizer, save_adapter
from scmini.models.sampler import Answered, Prompt, Sampler
from scmini.models.vllm_process import environment
from scmini.records import read_table
from scmini.sections import DecodingConfig, ModelConfig, SampleConfig

AT_ONCE = 256
"""Sequences decoded at once, by every engine."""

Prompts = list[list[int]]
Drawn = dict[str, int]
"""`answers` and `tokens` of a draw."""


@dataclass(frozen=True)
class Served:
    """A model in folders of its own, and what an engine for it has to hold."""

    model: Path
    adapter: Path
    scratch: Path
    """For what an engine writes."""
    device: str
    rank: int
    longest_prompt: int
    new_tokens: int
    """Of each answer."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def max_length(self) -> int:
        return self.longest_prompt + self.new_tokens


class Engine(Protocol):
    """Started when made."""

    facts: dict[str, Any]

    def draw(self, prompts: Prompts, n: int) -> Drawn: ...

    def close(self) -> None: ...


def write_model(served: Served, shape: Shape) -> None:
    """A Llama with random weights, a tokenizer and a random adapter, in the formats of real ones.

    No answer ends before its limit: there is no end token.
    """
    setup = Setup(shape, "cpu", quantised=False, checkpointing=False)
    model = models.base_model(setup).to(getattr(torch, served.dtype))
    for config in (model.config, model.generation_config):
        config.use_cache, config.eos_token_id = True, None
    model.save_pretrained(served.model)
    _tokenizer(shape.vocab).save_pretrained(served.model)
    policy = get_peft_model(model, models.lora_config(shape))
    models.fill_adapter(policy, seed=0)
    save_adapter(policy, served.adapter, _tokenizer(shape.vocab))


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word per id, so that texts can be made of ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, vocab)}
    whole = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>")


class BareLoop:
    """`LLM.generate` of all prompts at once, in a process of its own.

    The same engine settings as ours; ids alone, or also their texts, as `LLM` does by default.
    """

    def __init__(self, served: Served, python: str, *, texts: bool) -> None:
        self._served, self._texts = served, texts
        engine: dict[str, Any] = {
            "model": str(served.model),
            "dtype": served.dtype,
            "max_model_len": served.max_length,
            "max_num_seqs": AT_ONCE,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": served.rank,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        variables = {**environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if served.device == "cpu":
            engine |= {"enforce_eager": True, "gpu_memory_utilization": 0.3}
            variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self._process = subprocess.Popen(
            [python, vllm_loop.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables,
            text=True,
        )
        self.facts = self._ask({"engine": engine, "adapter": str(served.adapter)})

    def draw(self, prompts: Prompts, n: int) -> Drawn:
        sampling = {"n": n, "max_tokens": self._served.new_tokens, "texts": self._texts}
        return self._ask({"prompts": prompts, **sampling})

    def close(self) -> None:
        self._process.kill()  # an orderly end takes vLLM seconds, and there is nothing to keep
        self._process.communicate()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # why it has ended is known below
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(f"{BARE}: its process ended with {code}, for the reason above")
        return dict(json.loads(line))


class Ours:
    """All that the stage `sample` does with tokenised prompts: answers end up in Parquet shards."""

    def __init__(self, served: Served, decoding: DecodingConfig) -> None:
        self._served, self._draws = served, 0
        self._sampler = build_sampler(
            _model_config(served),
            decoding,
            str(served.model),
            served.adapter,
            load_tokenizer(str(served.adapter)),
            longest_prompt=served.longest_prompt,
            seed=0,
            scratch=served.scratch,
        )
        self.facts = self._sampler.facts

    def draw(self, prompts: Prompts, n: int) -> Drawn:
        self._draws += 1
        plan = Plan(
            prompts=[(str(number), ids) for number, ids in enumerate(prompts)],
            n=n,
            seed=self._draws,
            max_length=self._served.max_length,
            shard_size=SampleConfig().shard_size,
            max_failed_share=0.0,
        )
        folder = self._served.scratch
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_answers(plan, folder, folder / "scratch", lambda _: _KeptOpen(self._sampler))
        tables = [read_table(path, ["responses"]) for path in sorted(folder.glob("*.parquet"))]
        responses = [table.column(0).combine_chunks().flatten() for table in tables]
        ids = [each.field("token_ids") for each in responses]
        tokens = sum(len(each.flatten()) for each in ids)
        return {"answers": sum(map(len, ids)), "tokens": tokens}

    def close(self) -> None:
        self._sampler.close()


class _KeptOpen:
    """A sampler that another draw will need."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.facts, self.resumes_at = sampler.facts, sampler.resumes_at

    def stream(self, shards: Iterable[list[Prompt]], n: int, seed: int) -> Iterator[Answered]:
        return self._sampler.stream(shards, n, seed)

    def close(self) -> None:
        """Not yet."""


class Generate:
    """`generate` of transformers, n answers to each of some prompts of like length at a time."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._model = load_for_generation(_model_config(served), str(served.model), served.adapter)
        self._tokenizer = load_tokenizer(str(served.adapter))
        self.facts = {"engine": "transformers", "device": str(self._model.device)}

    @torch.inference_mode()
    def draw(self, prompts: Prompts, n: int) -> Drawn:
        answers = tokens = 0
        ordered, together = sorted(prompts, key=len), max(1, AT_ONCE // n)
        for start in range(0, len(ordered), together):
            batch = ordered[start : start + together]
            longest = len(batch[-1])
            padded = [[0] * (longest - len(ids)) + ids for ids in batch]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
            drawn = self._model.generate(
                input_ids=torch.tensor(padded, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=n,
                max_new_tokens=self._served.new_tokens,
                pad_token_id=0,
            )[:, longest:]
            texts = self._tokenizer.batch_decode(drawn, skip_special_tokens=True)
            answers, tokens = answers + len(texts), tokens + drawn.numel()
        return {"answers": answers, "tokens": tokens}

    def close(self) -> None:
        """Nothing is held that does not go with the object."""


def _model_config(served: Served) -> ModelConfig:
    return ModelConfig(
        model_name_or_path=str(served.model),
        load_in_4bit=False,
        dtype=served.dtype,  # type: ignore[arg-type]
        max_length=served.max_length,
    )


def start(name: str, served: Served, python: str) -> Engine:
    """The engine of that name, ready for its first draw."""
    if name in (BARE, BARE_TEXTS):
        return BareLoop(served, python, texts=name == BARE_TEXTS)
    if name == GENERATE:
        return Generate(served)
    settings: dict[str, Any] = {"max_new_tokens": served.new_tokens}
    if name == OURS_VLLM:
        settings |= {"engine": "vllm", "python": python, "max_num_seqs": AT_ONCE}
    else:
        settings |= {"engine": "transformers", "batch_size": AT_ONCE}
    return Ours(served, DecodingConfig(**settings))
