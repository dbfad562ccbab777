"""Supervised fine-tuning on the targets: a fresh adapter, or (`sft-continued`) more of the same."""

from pathlib import Path

from peft import PeftModel

from scmini.chat import check_tokenizer
from scmini.config import Config
from scmini.errors import DataError
from scmini.models import loading
from scmini.records import read_examples
from scmini.store import Work
from scmini.training.batches import Group
from scmini.training.checkpoints import peak_gib
from scmini.training.example import show_group
from scmini.training.losses import SFTObjective
from scmini.training.preferences import sft_group
from scmini.training.trackers import label
from scmini.training.trainer import train

SEED_OF_CONTINUED = 1
"""Added to the seed of `sft-continued`, so that it meets the prompts in another order."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Train on data/train.jsonl; writes what `train` does, with the weights in adapter/.

    With `sft.num_train_epochs: 0` the adapter is a fresh one, which changes nothing.
    """
    continued = work.method == "sft-continued"
    section = config.sft_continued if continued else config.sft
    source = loading.model_source(config, inputs)
    adapter = inputs["sft"] / "adapter" if continued else None
    if adapter:
        tokenizer = loading.load_tokenizer(str(adapter))
    else:
        tokenizer = loading.load_base_tokenizer(config.model, source)
    check_tokenizer(tokenizer)
    examples = read_examples(inputs["data"] / "train.jsonl")[: section.num_prompts]
    found = [sft_group(tokenizer, e, section.loss_on, config.model.max_length) for e in examples]
    groups: list[Group] = [group for group in found if group is not None]
    if len(groups) < len(found):
        work.count("target longer than model.max_length", len(found) - len(groups))
    if not groups:
        raise DataError("no training prompt is left; raise model.max_length")
    show_group(work.path, tokenizer, groups[0])
    if adapter:
        model = loading.load_policy(config.model, source, adapter, trainable=True)
    else:
        model = loading.fresh_adapter(config.model, source, config.sft, config.seed)
    if not section.num_train_epochs:  # the named model is an SFT model already
        assert isinstance(model, PeftModel)
        loading.save_adapter(model, work.path / "adapter", tokenizer)
        work.note("steps", 0)
        work.note("peak_gib", round(peak_gib(), 3))
        return
    if section.gradient_checkpointing:
        loading.enable_checkpointing(model)
    trained = train(
        model,
        groups,
        SFTObjective(),
        section,
        out=work.path,
        seed=config.seed + (SEED_OF_CONTINUED if continued else 0),
        save_as="adapter",
        tokenizer=tokenizer,
        label=label(config, section, work.method or "sft"),
    )
    trained.note_in(work)
