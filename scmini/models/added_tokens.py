"""A named model with the tokens that its chat template needs, as a checkpoint of its own.

Adapters are trained on frozen embeddings and a frozen head, so a new token keeps the rows that it
gets here. With the mean of all head rows its logit is the mean of all logits, never the largest:
an end token like that would hardly ever end an answer. So the template's end token takes over the
input row and the head row of the old one, which a pretrained model says where a text ends, and the
old one gets the mean head row. Where input and head are tied, that is its one row; if such an end
token also begins texts it keeps the row, and both end an answer. All other new tokens stand in
prompts alone and get mean rows. A token that the model already has is left alone.

Rows beyond the tokenizer's tokens (padding) are used before the matrices grow; they grow in steps
of 8 where they had such a size, for the sake of matrix units.

No more than one tensor is in memory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from scmini.chat_templates import TEMPLATES
from scmini.errors import DataError
from scmini.models.checkpoint_files import (
    Stored,
    read_tensor,
    sharded,
    stored_tensors,
    write_checkpoint,
    write_json,
)
from scmini.models.loading import KEY, checkpoint_folder, load_tokenizer, quietly, reading
from scmini.sections import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
ROWS_STEP = 8


@dataclass(frozen=True)
class _Names:
    """What a model calls the weights that have a row for each token."""

    input: str
    head: tuple[str, ...]
    """Weight and, if it has one, bias; tied to the input, the weight may not be stored."""
    tied: bool


@dataclass(frozen=True)
class _Rows:
    """What becomes of the rows of these weights."""

    before: int
    after: int
    known: int
    """The first so many belong to tokens that were there."""
    copied: dict[int, int]
    """Row -> row whose value it gets."""
    mean_in_head: list[int]
    """Rows that get the mean in the head; in the input, only those that are new do."""
    new: list[int]


def add_tokens(config: ModelConfig, source: str, out: Path) -> dict[str, Any]:
    """Write the model `source` with the tokens of `config.chat_template` to the folder `out`.

    Returns:
        Facts: the tokens that were added, and the rows before and after.

    Raises:
        DataError: no weights in safetensors, a damaged file, or a model without end token or of a
            kind whose embeddings are not found.
        EnvironmentProblem: the model cannot be fetched.
    """
    assert config.chat_template is not None
    template = TEMPLATES[config.chat_template]
    assert template.end is not None
    folder = checkpoint_folder(config, source)
    stored = list(stored_tensors(folder))
    revision = config.revision if source == config.model_name_or_path else None
    tokenizer = load_tokenizer(source, revision)
    names = _names(folder, source)
    before = _rows_of(stored, names.input, source)
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in template.tokens if vocabulary.get(t, before) >= before]
    known = min(before, 1 + max(vocabulary.values()))
    old_end = tokenizer.eos_token_id
    if template.end in missing and old_end is None:
        raise DataError(
            f"{KEY}: {source} has no end token, whose place {template.end} could take; set "
            "eos_token in tokenizer_config.json"
        )
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in template.tokens],
        special_tokens=True,
    )
    tokenizer.eos_token = template.end
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in template.tokens}
    keeps_row = names.tied and old_end == tokenizer.bos_token_id
    moved = template.end in missing and not keeps_row
    rows = _Rows(
        before=before,
        after=_grown(before, max((ids[t] for t in missing), default=0)),
        known=known,
        copied={ids[template.end]: old_end} if template.end in missing else {},
        mean_in_head=[old_end] if moved else [],
        new=[ids[token] for token in missing],
    )
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, stored, names, rows if missing else None, out)
    with quietly():
        tokenizer.save_pretrained(str(out))
    _write_settings(folder, out, rows, ids[template.end], old_end if moved else None)
    return {"added_tokens": missing, "rows": [rows.before, rows.after]}


def _grown(before: int, largest: int) -> int:
    """Number of rows with which the largest id has one."""
    if largest < before:
        return before
    return -(-(largest + 1) // ROWS_STEP) * ROWS_STEP if before % ROWS_STEP == 0 else largest + 1


# ---------------------------------------------------------------- what is there


def _names(folder: Path, source: str) -> _Names:
    """Found in an empty model of the same kind."""
    with reading(source), torch.device("meta"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(settings)
    owners = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"{KEY}: {source}: {type(model).__name__} has no output head")
    stem = owners[id(head)]
    return _Names(
        input=f"{owners[id(model.get_input_embeddings())]}.weight",
        head=(f"{stem}.weight",) + ((f"{stem}.bias",) if head.bias is not None else ()),
        tied=bool(getattr(settings.get_text_config(), "tie_word_embeddings", False)),
    )


def _rows_of(stored: Sequence[Stored], name: str, source: str) -> int:
    """Rows of a stored weight."""
    for tensor in stored:
        if tensor.name == name:
            return tensor.shape[0]
    raise DataError(
        f"{KEY}: {source} stores no {name}, so tokens cannot be added to it; add them with "
        "transformers' resize_token_embeddings and name the folder that you save"
    )


# ---------------------------------------------------------------- weights


def _write_weights(
    folder: Path, stored: Sequence[Stored], names: _Names, rows: _Rows | None, out: Path
) -> None:
    """All weight files and their index; with `rows` None as they are."""
    tied_rows = {names.input, *names.head} if names.tied else set(names.head)
    changed = {names.input, *names.head} if rows else set()
    before = {tensor.name: tensor for tensor in stored}

    def make(tensor: Stored) -> Tensor:
        weight = read_tensor(folder, before[tensor.name])
        if rows is None or tensor.name not in changed:
            return weight
        return _with_rows(weight, rows, as_head=tensor.name in tied_rows)

    after = [
        replace(tensor, shape=(rows.after, *tensor.shape[1:]))
        if rows and tensor.name in changed
        else tensor
        for tensor in stored
    ]
    write_checkpoint(out, sharded(after, None), make)


def _with_rows(weight: Tensor, rows: _Rows, *, as_head: bool) -> Tensor:
    """[before, ...] -> [after, ...], of the same dtype."""
    mean = weight[: rows.known].mean(0, dtype=torch.float32).to(weight.dtype)
    made = weight.new_empty(rows.after, *weight.shape[1:])
    made[: rows.before] = weight
    made[rows.before :] = mean
    made[rows.new] = mean
    for row, source in rows.copied.items():
        made[row] = weight[source]
    if as_head and rows.mean_in_head:
        made[rows.mean_in_head] = mean
    return made


# ---------------------------------------------------------------- configurations


def _write_settings(folder: Path, out: Path, rows: _Rows, end: int, given_up: int | None) -> None:
    """generation_config.json, where there is one, and config.json, last of all.

    Tokens that ended a text before go on ending it, except one that has `given_up` its head row.
    """
    settings = json.loads((folder / CONFIG).read_bytes())
    named = settings.get("eos_token_id")
    if (folder / GENERATION).is_file():
        generation = json.loads((folder / GENERATION).read_bytes())
        named = generation.get("eos_token_id", named)
    ends = [end]
    for other in named if isinstance(named, list) else [named]:
        if other not in (None, given_up, *ends):
            ends.append(other)
    ending = ends if len(ends) > 1 else end
    if (folder / GENERATION).is_file():
        write_json(out / GENERATION, generation | {"eos_token_id": ending})
    settings["eos_token_id"] = ending
    if isinstance(settings.get("text_config"), dict) and "vocab_size" in settings["text_config"]:
        settings["text_config"]["vocab_size"] = rows.after
    if "vocab_size" in settings or "text_config" not in settings:
        settings["vocab_size"] = rows.after
    write_json(out / CONFIG, settings)
