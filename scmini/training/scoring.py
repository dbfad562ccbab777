"""Log-probabilities without gradients: of the reference, and to check where training starts."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scmini.errors import ScminiError
from scmini.models.attention import is_half, plain_model
from scmini.models.memory import Knob, free, is_out_of_memory, too_large
from scmini.training.batches import Group, Microbatch, cut
from scmini.training.tree_trainer import TreeModule

LESS_MEMORY = "model.load_in_4bit: true or a smaller model.max_length"


def score(
    module: TreeModule, groups: Sequence[Group], tokens_per_microbatch: int | Knob
) -> list[list[float]]:
    """Log-probability of every sequence of every group, in nats, without gradients or dropout.

    Oversized groups are scored in parts, which changes nothing beyond rounding. Where a GPU's
    memory runs out, what is left is scored in smaller rows; a `Knob` stays lowered afterwards.

    Raises:
        DoesNotFit: a single sequence is too long for the GPU's memory (naming the prompt).
    """
    knob = Knob.of(tokens_per_microbatch)
    was_training = module.training
    module.eval()
    scores: list[list[float]] = []
    waiting = deque(cut(groups, knob.tokens))
    with torch.no_grad():
        while waiting:
            row = Row()
            flat = _score(module, waiting[0], row)
            if flat is None:
                free()
                where = f"while scoring prompt {waiting[0].groups[0].id!r}"
                if row.sequences <= 1 or knob.tokens == 1:
                    raise too_large(knob.key, row.tokens, where, LESS_MEMORY)
                knob.halve(row.tokens, where)
                left = [group for batch in waiting for group in batch.groups]
                waiting = deque(cut(left, knob.tokens))
                continue
            for group in waiting.popleft().groups:
                size = len(group.sequences)
                scores.append(flat[:size])
                flat = flat[size:]
    module.train(was_training)
    return scores


@dataclass
class Row:
    """What is being computed: its tokens and sequences."""

    tokens: int = 0
    sequences: int = 0


def _score(module: TreeModule, batch: Microbatch, row: Row) -> list[float] | None:
    """Of all sequences of a micro-batch; None where memory ran out, at `row`."""
    where = plain_model(module.model).device
    scores = []
    try:
        for tree in [batch.tree()] if batch.parts is None else batch.part_trees():
            row.tokens, row.sequences = tree.num_tokens, tree.num_sequences
            scores.append(module(tree.to(where)))
        flat: list[float] = torch.cat(scores).tolist()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return flat


def tolerance(ref_logp: float, num_tokens: int, half: bool) -> float:
    """Largest difference in nats that rounding explains between two scorings of one sequence.

    Errors of single tokens have random signs, so their sum grows like the root of the length. In
    float32 the bound is 1e-3 nat and 1e-4 of the value. In 16 bits a differently packed row rounds
    each token's log-probability by some hundredths of a nat; 0.1 a token is generous, and still a
    small part of what another adapter changes (tenths of a nat per token, all of one sign).
    """
    if half:
        return 0.1 * math.sqrt(num_tokens) + 0.002 * abs(ref_logp)
    return 1e-3 + 1e-4 * abs(ref_logp)


def check_start(
    module: TreeModule, groups: Sequence[Group], tokens_per_microbatch: int | Knob
) -> float:
    """Before the first step rewards must be 0: the policy still is its reference.

    Args:
        groups: those of the first optimizer step, with reference log-probabilities.

    Returns:
        The largest difference found, in nats.

    Raises:
        ScminiError: a difference beyond rounding, so the reference is not the policy's start.
    """
    half = is_half(module.model)
    worst = 0.0
    for group, scores in zip(groups, score(module, groups, tokens_per_microbatch), strict=True):
        assert group.ref_logps is not None
        for logp, ref, length in zip(scores, group.ref_logps, group.num_scored, strict=True):
            difference = abs(logp - ref)
            # Not `>`: a NaN must fail too.
            if not difference <= tolerance(ref, length, half):
                raise ScminiError(
                    f"the reference is not the policy's start: prompt {group.id!r} has a response "
                    f"of {length} tokens with log-probability {logp:.4f} under the policy before "
                    f"its first step, but {ref:.4f} in the reference. In between changed: the SFT "
                    "adapter or its base model, the tokenizer or chat template, or the precision "
                    "(model.dtype, model.load_in_4bit, another GPU or library). Run again with "
                    "--from reference --force"
                )
            worst = max(worst, difference)
    return worst
