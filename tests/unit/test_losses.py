"""Losses against explicit loops over single numbers, and against one another."""

import math

import pytest
import torch
from training_helpers import response_groups, text_groups

from scmini.errors import ScminiError
from scmini.sections import DPOConfig
from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective, SFTObjective

BETA = 0.3
SIZES = [1, 3, 2, 1]


def _logps(groups: list[Group]) -> torch.Tensor:
    torch.manual_seed(1)
    count = sum(len(group.sequences) for group in groups)
    return (-25 + 8 * torch.randn(count, dtype=torch.float64)).requires_grad_()


def _by_group(values: list[float], groups: list[Group]) -> list[list[float]]:
    found, start = [], 0
    for group in groups:
        found.append(values[start : start + len(group.sequences)])
        start += len(group.sequences)
    return found


def _pair(loss_type: str, margin: float, smoothing: float) -> float:
    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    if loss_type == "sigmoid":
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    if loss_type == "ipo":
        return (margin / BETA - 1 / (2 * BETA)) ** 2
    return max(0.0, 1 - margin)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "alpha"),
    [
        ("sigmoid", 0.0, 0.0),
        ("sigmoid", 0.2, 0.5),
        ("ipo", 0.0, 0.0),
        ("hinge", 0.0, 1.0),
        ("softmax", 0.0, 0.0),
    ],
)
def test_loss_equals_loop(loss_type: str, smoothing: float, alpha: float) -> None:
    groups = response_groups(SIZES)
    logps = _logps(groups)
    expected = 0.0
    for group, values in zip(groups, _by_group(logps.tolist(), groups), strict=True):
        assert group.ref_logps is not None
        rewards = [BETA * (a - b) for a, b in zip(values, group.ref_logps, strict=True)]
        if loss_type == "softmax":
            expected += math.log(sum(math.exp(r) for r in rewards)) - rewards[0]
        else:
            k = len(rewards) - 1
            expected += sum(_pair(loss_type, rewards[0] - r, smoothing) for r in rewards[1:]) / k
        expected -= alpha * values[0] / group.num_scored[0]
    loss, _ = PreferenceObjective(BETA, loss_type, smoothing, alpha)(logps, groups)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logps)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_many_negatives_are_averaged_pairs(loss_type: str) -> None:
    """k negatives give the mean of k examples with one negative each: loss and gradient."""
    (group,) = response_groups([4])
    logps = _logps([group])
    objective = PreferenceObjective(BETA, loss_type)
    loss, _ = objective(logps, [group])
    (grad,) = torch.autograd.grad(loss, logps)
    assert group.ref_logps is not None
    pairs = [
        Group(
            "p",
            [group.sequences[0], group.sequences[j]],
            [1, 1],
            [group.ref_logps[0], group.ref_logps[j]],
        )
        for j in range(1, 5)
    ]
    flat = torch.cat([torch.stack((logps[0], logps[j])) for j in range(1, 5)])
    pairwise = objective(flat, pairs)[0] / 4
    torch.testing.assert_close(loss, pairwise)
    torch.testing.assert_close(grad, torch.autograd.grad(pairwise, logps)[0])


def test_softmax_with_one_negative_is_sigmoid() -> None:
    groups = response_groups([1, 1])
    logps = _logps(groups)
    one = PreferenceObjective(BETA, "softmax")(logps, groups)[0]
    two = PreferenceObjective(BETA, "sigmoid")(logps, groups)[0]
    torch.testing.assert_close(one, two)


def test_metrics_equal_loop() -> None:
    groups = response_groups(SIZES)
    logps = _logps(groups)
    _, metrics = PreferenceObjective(BETA)(logps, groups)
    expected = dict.fromkeys(PreferenceObjective.metrics, 0.0)
    for group, values in zip(groups, _by_group(logps.tolist(), groups), strict=True):
        assert group.ref_logps is not None
        rewards = [BETA * (a - b) for a, b in zip(values, group.ref_logps, strict=True)]
        mean = sum(rewards[1:]) / len(rewards[1:])
        wins = [rewards[0] > r for r in rewards[1:]]
        expected["rewards/chosen"] += rewards[0]
        expected["rewards/rejected"] += mean
        expected["rewards/margins"] += rewards[0] - mean
        expected["rewards/accuracies"] += sum(wins) / len(wins)
        expected["rewards/accuracies_all"] += all(wins)
        expected["logps/chosen"] += values[0]
        expected["logps/rejected"] += sum(values[1:]) / len(values[1:])
        ratios = [a - b for a, b in zip(values, group.ref_logps, strict=True)]
        drifts = [ratio / length for ratio, length in zip(ratios, group.num_scored, strict=True)]
        expected["logps/chosen_per_token"] += values[0] / group.num_scored[0]
        expected["drift/chosen_per_token"] += drifts[0]
        expected["drift/rejected_per_token"] += sum(drifts[1:]) / len(drifts[1:])
        expected["kl/rejected"] -= sum(ratios[1:]) / len(ratios[1:])
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-9), name
    assert 0 < expected["rewards/accuracies_all"] < len(groups)


def test_missing_negatives_get_no_gradient_of_others() -> None:
    """Prompts with different k side by side give what each gives alone."""
    groups = response_groups(SIZES)
    logps = _logps(groups)
    for loss_type in ("sigmoid", "softmax"):
        objective = PreferenceObjective(BETA, loss_type)
        (together,) = torch.autograd.grad(objective(logps, groups)[0], logps)
        start = 0
        for group in groups:
            stop = start + len(group.sequences)
            alone = logps.detach()[start:stop].requires_grad_()
            (grad,) = torch.autograd.grad(objective(alone, [group])[0], alone)
            torch.testing.assert_close(together[start:stop], grad)
            start = stop


def test_sft_weighs_tokens() -> None:
    groups = text_groups(3)
    logps = torch.tensor([-3.0, -5.0, -7.0])
    loss, metrics = SFTObjective()(logps, groups)
    assert loss.item() == 15
    assert metrics == {}
    assert [SFTObjective().weight(g) for g in groups] == [sum(g.num_scored) for g in groups]


def test_config_reaches_objective() -> None:
    config = DPOConfig(beta=0.7, label_smoothing=0.1, rpo_alpha=0.2)
    assert PreferenceObjective.of(config) == PreferenceObjective(0.7, "sigmoid", 0.1, 0.2)


def test_mistakes_are_named() -> None:
    (group,) = response_groups([1])
    with pytest.raises(ScminiError, match=r"p0.*reference"):
        PreferenceObjective(BETA)(torch.zeros(2), [Group("p0", group.sequences, [1, 1])])
    lonely = Group("p0", group.sequences[:1], [1], [0.0])
    with pytest.raises(ScminiError, match=r"p0.*no rejected"):
        PreferenceObjective(BETA)(torch.zeros(1), [lonely])
