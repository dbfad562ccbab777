"""Write the tables of docs/configuration.md from the models of the configuration.

    python bench/configuration.py            rewrite the block
    python bench/configuration.py --check    exit 1 when the document says something else

The meaning of a key is the text below its field; where there is none, `COMMON` has it, and where
that of a section is another one, `OWN`.
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import documents
from pydantic.fields import FieldInfo

from scmini.config import METHODS_HELP, Config
from scmini.sections import DecodingConfig, Section
from scmini.stage_graph import STAGES, Task, sections

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "configuration.md"
MARKERS = "<!-- keys:begin -->", "<!-- keys:end -->"
_CONTROL = Task("sft", "sft-continued")

COMMON = {
    "name": "Of the run: its folder is `runs/<name>` unless `-o` says otherwise.",
    "seed": "All random choices are drawn from it.",
    "methods": f"What is compared: {METHODS_HELP}.",
    # those of transformers, TRL and PEFT, or of a model's config.json
    "learning_rate": "The highest, reached after warm-up.",
    "num_train_epochs": "Passes over the training prompts.",
    "lr_scheduler_type": "How the learning rate goes on after warm-up.",
    "warmup_ratio": "Share of the steps in which the learning rate rises.",
    "weight_decay": "Of AdamW.",
    "max_grad_norm": "Gradients of a larger norm are scaled down to it.",
    "optim": "AdamW: in float32, in 8 bits, or paged (bitsandbytes).",
    "gradient_checkpointing": "Compute layers again in backward instead of keeping what they "
    "computed: slower, less memory.",
    "save_steps": "Steps between two checkpoints, at most; there is one after 15 minutes too.",
    "logging_steps": "Steps between two rows of metrics.jsonl.",
    "report_to": "Where metrics go besides metrics.jsonl.",
    "lora_r": "Rank of the adapter.",
    "lora_alpha": "The adapter counts lora_alpha / lora_r times.",
    "lora_dropout": "Share of an adapter's inputs that is dropped in training.",
    "lora_target_modules": "Linear layers that get an adapter: names, or `all-linear`.",
    "beta": "How much a log-ratio to the reference counts in the loss.",
    "loss_type": "`sigmoid` is DPO; `softmax` has one softmax over all k negatives.",
    "label_smoothing": "Share of preferences taken to be the wrong way round (`sigmoid`).",
    "vocab_size": "Of the model that is made.",
    "hidden_size": "Of the model that is made.",
    "intermediate_size": "Of the model that is made.",
    "num_hidden_layers": "Of the model that is made.",
    "num_attention_heads": "Of the model that is made.",
    "num_key_value_heads": "Of the model that is made.",
    "initializer_range": "Standard deviation of the first weights.",
    "max_new_tokens": "Longest answer, in tokens.",
    "top_p": "Draw from the likeliest tokens that together have this probability; 1: from all.",
    "kv_cache_dtype": "Of vLLM's KV cache.",
    "tensor_parallel_size": "GPUs over which vLLM spreads one copy of the model.",
    "data_parallel_size": "Copies of the model that vLLM runs.",
    "max_tokens": "Longest reply, in tokens.",
    # of this project
    "id": "Column of the ids; without it they are made.",
    "system": "System message in front of the prompt.",
    "target": "The answer to learn.",
    "rejected": "A worse answer, or a list of them.",
    "prompts_per_step": "Prompts of one optimizer step.",
    "pairs_per_step": "Pairs of one optimizer step.",
    "dialogues_per_step": "Dialogues of one optimizer step.",
    "tokens_per_microbatch": "Tokens of a packed row: lower it when memory runs out.",
    "loss_on": "On the last turn of the assistant, or on all of them.",
    "n": "Answers to each prompt.",
    "mode": "docs/sampling.md; the others than `default` are those of the original project.",
    "lm_eval_batch_size": "A number, or `auto`.",
    "requests_at_once": "Sent to the judge's server.",
    "max_retries": "Of a request that failed.",
    "usd_per_million_output_tokens": "With both prices the cost is shown in dollars.",
}
"""What keys mean that have no text below their field, in whatever section."""

OWN = {
    "base.num_train_epochs": "Passes over the dialogues.",
    "base.reward_model.num_train_epochs": "Passes over the pairs.",
    "sample.temperature": "Above 0: at 0 all answers would be the same.",
    "sample.engine": "`vllm`, `transformers`, `data` (the answers that came with the data set), or "
    "`auto`: vLLM where there are a CUDA device and vLLM.",
}
"""What keys mean that mean something else in one section than elsewhere."""


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str
    """Dotted, as `--set` takes it."""
    model: type[Section]
    field: FieldInfo

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def meaning(self) -> str:
        """`OWN`'s, or the text below the field (here or inherited), or `COMMON`'s."""
        if self.name in OWN:
            return OWN[self.name]
        for model in self.model.__mro__:
            if found := texts(model).get(self.last):
                return found
        return COMMON.get(self.last, "")

    @property
    def is_machine(self) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("machine"))

    @property
    def row(self) -> str:
        """Its line of the table."""
        meaning = f"(machine) {self.meaning}" if self.is_machine else self.meaning
        cells = [f"`{self.name}`", self._type(), _value(self.field.get_default()), meaning]
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def _type(self) -> str:
        if self.last == "engine" and issubclass(self.model, DecodingConfig):
            return _choices(self.model.engines())  # a method, for `sample` has one more
        text = _type(self.field.annotation)
        limits = [*self.field.metadata, *_inner_metadata(self.field.annotation)]
        return ", ".join([text, *(limit for each in limits for limit in _limits(each))])


def keys(model: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key of a model and of the sections in it, in the order of the file."""
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", model, field)


def tables() -> str:
    """Every section with its stages and its keys."""
    top = [key for key in keys() if "." not in key.name]
    parts = [_table("At the top of the file", "", top)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not is_section(section):
            continue
        about = _unwrapped(inspect.getdoc(section) or "")
        stages = [stage for stage in STAGES if name in sections(Task(stage))]
        if not stages and name in sections(_CONTROL):
            stages = [f"{_CONTROL.stage} (of the method {_CONTROL.method})"]
        about += f"\n\nRead by the stages: {', '.join(stages)}."
        own = list(keys(section, f"{name}."))
        parts.append(_table(f"`{name}`", about, own))
    return "\n\n".join(parts)


def _table(title: str, about: str, own: list[Key]) -> str:
    lines = [f"## {title}", ""]
    if about:
        lines += [about, ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(key.row for key in own)])


@cache
def texts(model: type) -> dict[str, str]:
    """Field -> the text below it, of the fields that a class itself writes down."""
    if not issubclass(model, Section) or model is Section:
        return {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[field.target.id] = " ".join(text.value.split())
    return found


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _choices(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _type(annotation: Any) -> str:
    """As people say it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _choices(inner)
    if origin is Annotated:
        return _type(inner[0])
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin in (Union, types.UnionType):
        named = [_type(each) for each in inner if each is not type(None)]
        return " or ".join([*named, "empty"] if type(None) in inner else named)
    return {str: "text", bool: "true or false", int: "whole number", float: "number"}[annotation]


def _inner_metadata(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _limits(metadata: Any) -> Iterator[str]:
    """Limits of a value: attributes of what pydantic and annotated-types attach to a field."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for name, word in words.items():
        if (limit := getattr(metadata, name, None)) is not None:
            yield f"{word} {_number(limit)}"
    if (pattern := getattr(metadata, "pattern", None)) is not None:
        yield f"`{pattern}`"
    if (least := getattr(metadata, "min_length", None)) is not None:
        yield f"at least {least} of them"


def _value(value: Any) -> str:
    """A default, as YAML has it."""
    if value is None:
        return "empty"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_number(value) if isinstance(value, int | float) else value}`"


def _number(value: float) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("e-0", "e-")


def rewritten(text: str) -> str:
    """The document with a fresh block."""
    return documents.replaced(text, MARKERS, tables(), str(DOCUMENT))


def main(argv: list[str] | None = None) -> int:
    check = documents.parser(__doc__).parse_args(argv).check
    fresh = rewritten(DOCUMENT.read_text("utf-8"))
    return documents.finish({DOCUMENT: fresh}, "configuration.py", check=check)


if __name__ == "__main__":
    sys.exit(main())
