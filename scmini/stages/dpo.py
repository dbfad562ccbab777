"""DPO with one chosen and k rejected responses, from a copy of the SFT adapter."""

from pathlib import Path

from scmini.config import Config
from scmini.errors import DataError
from scmini.models import loading
from scmini.models.memory import Knob
from scmini.records import read_pairs, read_table
from scmini.store import Work
from scmini.training import checkpoints
from scmini.training.batches import Group
from scmini.training.example import show_group
from scmini.training.losses import PreferenceObjective
from scmini.training.preferences import TARGET, Responses
from scmini.training.scoring import check_start
from scmini.training.steps import Steps
from scmini.training.trackers import label
from scmini.training.trainer import train
from scmini.training.tree_trainer import TreeModule

TOO_LONG = "response longer than model.max_length"


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Train on pairs/<method>.jsonl; writes what `train` does, with the weights in adapter/."""
    assert work.method is not None
    adapter = inputs["sft"] / "adapter"
    tokenizer = loading.load_tokenizer(str(adapter))
    responses = Responses.read(tokenizer, config.model.max_length, inputs)
    groups, dropped = _groups(config, inputs, work.method, responses)
    if dropped:
        work.count(TOO_LONG, dropped)
    if not groups:
        raise DataError(f"{work.method}: no pair is left to train on")
    show_group(work.path, tokenizer, groups[0])
    source = loading.model_source(config, inputs)
    model = loading.load_policy(config.model, source, adapter, trainable=True)
    objective = PreferenceObjective.of(config.dpo)
    if checkpoints.newest(work.path) is None:
        first = Steps(groups, objective, config.dpo, config.seed)[0]["groups"]
        knob = Knob(config.dpo.tokens_per_microbatch, "dpo.tokens_per_microbatch")
        check_start(TreeModule(model), first, knob)
    if config.dpo.gradient_checkpointing:
        loading.enable_checkpointing(model)
    trained = train(
        model,
        groups,
        objective,
        config.dpo,
        out=work.path,
        seed=config.seed,
        save_as="adapter",
        tokenizer=tokenizer,
        label=label(config, config.dpo, work.method),
    )
    trained.note_in(work)


def _groups(
    config: Config, inputs: dict[str, Path], method: str, responses: Responses
) -> tuple[list[Group], int]:
    """Training examples with their reference log-probabilities, and how many were too long."""
    pairs = read_pairs(inputs["filter"] / "pairs" / f"{method}.jsonl")[: config.dpo.num_prompts]
    path = inputs["reference"] / "by-method" / f"{method}.parquet"
    reference = {(row["id"], row["response_index"]): row for row in read_table(path).to_pylist()}
    groups, dropped = [], 0
    for pair in pairs:
        indices = [TARGET, *pair.response_index]
        group = responses.group(pair.id, indices)
        if group is None:
            dropped += 1
            continue
        rows = [reference.get((pair.id, index)) for index in indices]
        for row, index, length in zip(rows, indices, group.num_scored, strict=True):
            if row is None or row["num_tokens"] != length:
                raise DataError(
                    f"{path}: no log-probability of response {index} of prompt {pair.id!r} with "
                    f"{length} tokens; run again with --from reference --force"
                )
        logps = [row["logp"] for row in rows if row is not None]
        groups.append(Group(group.id, group.sequences, group.num_scored, logps))
    return groups, dropped
