"""Log-probabilities without gradients: of the reference, and to check where training starts."""

import math
from collections.abc import Sequence

import torch

from scmini.errors import ScminiError
from scmini.models.attention import is_half, plain_model
from scmini.training.batches import Group, cut
from scmini.training.trainer import TreeModule


def score(
    module: TreeModule, groups: Sequence[Group], tokens_per_microbatch: int
) -> list[list[float]]:
    """Log-probability of every sequence of every group, in nats, without gradients or dropout.

    Oversized groups are scored in parts, which changes nothing beyond rounding.
    """
    where = plain_model(module.model).device
    was_training = module.training
    module.eval()
    scores: list[list[float]] = []
    with torch.no_grad():
        for batch in cut(groups, tokens_per_microbatch):
            trees = [batch.tree()] if batch.parts is None else batch.part_trees()
            flat = torch.cat([module(tree.to(where)) for tree in trees]).tolist()
            for group in batch.groups:
                size = len(group.sequences)
                scores.append(flat[:size])
                flat = flat[size:]
    module.train(was_training)
    return scores


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


def check_start(module: TreeModule, groups: Sequence[Group], tokens_per_microbatch: int) -> float:
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
                    f"its first step, but {ref:.4f} in the reference. Base model, SFT adapter, "
                    "precision or chat template changed in between; run again with "
                    "--from reference --force"
                )
            worst = max(worst, difference)
    return worst
