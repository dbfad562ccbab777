"""Whole models three ways: separate sequences, packed in PyTorch, packed in Triton.

Equal log-probabilities, DPO loss and LoRA gradients in fp32, by budget: the error against separate
sequences in fp64 is at most twice the error that separate sequences make in fp32.
"""

import functools

import pytest
import torch

from scmini.models import attention
from scmini.models.loading import enable_checkpointing
from scmini.training.losses import PreferenceObjective
from scmini.verification.checks import allowed, largest
from scmini.verification.separate import gradient_error, separate, take_gradients, widened
from scmini_kernels import PrefixTree, linear_logprob, tree_attention
from tests.unit.training_helpers import response_groups, tiny_model, with_lora

OBJECTIVE = PreferenceObjective(0.1)
SIZES = [9, 1, 8]
"""k of each prompt: enough sequences for their largest error to be a steady number."""
WAYS = ("torch", "reference", "triton")
MODELS = ("llama", "mistral-window", "qwen3", "gemma2")


def loss_weights(logps, groups):
    """d loss / d logps of the DPO loss, by autograd."""
    leaf = logps.detach().requires_grad_()
    loss, _ = OBJECTIVE(leaf, groups)
    return torch.autograd.grad(loss, leaf)[0]


@pytest.fixture
def calls(monkeypatch):
    """What was called, and a function that makes models take an implementation."""
    seen = []

    def use(way):
        for operation in (tree_attention, linear_logprob):
            named = functools.partial(operation, impl=way)

            def counted(*arguments, named=named, **options):
                seen.append((named.func.__name__, named.keywords["impl"]))
                return named(*arguments, **options)

            monkeypatch.setattr(attention, operation.__name__, counted)

    return seen, use


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_three_ways(name, checkpointing, device, calls):
    model = with_lora(tiny_model(name)).to(device).train()
    if checkpointing:
        enable_checkpointing(model)
    groups = response_groups(SIZES)

    def weights(logps):
        return loss_weights(logps, groups)

    plain = separate(model, groups, weights)
    with widened(model):
        exact = separate(model, groups, weights)
    exact_loss = OBJECTIVE(exact.logps, groups)[0]
    tree = PrefixTree.pack([group.sequences for group in groups]).to(device)
    assert tree.num_tokens < tree.num_flat_tokens
    bound = allowed(plain.logps, exact.logps)
    gradient_bound = 2 * gradient_error(plain.gradients, exact.gradients)
    seen, use = calls
    for way in WAYS:
        use(way)
        seen.clear()
        logps = attention.sequence_logps(model, tree)
        loss = OBJECTIVE(logps, groups)[0]
        loss.backward()
        gradients = take_gradients(model)
        forwards = 2 if checkpointing else 1
        assert seen.count(("tree_attention", way)) == 2 * forwards, "two layers"
        assert seen.count(("linear_logprob", way)) == 1
        assert set(gradients) == set(plain.gradients)
        assert largest(logps, exact.logps) <= bound, way
        # What an error of this size of every log-probability can do to the loss.
        assert abs(loss.item() - exact_loss.item()) <= bound * exact.upstream.abs().sum(), way
        assert gradient_error(gradients, exact.gradients) <= gradient_bound, way


def test_the_budget_is_tight(device):
    """A model with one LoRA factor a hundredth of a percent off is outside of it."""
    model = with_lora(tiny_model()).to(device).train()
    groups = response_groups(SIZES)
    plain = separate(model, groups, torch.ones_like)
    with widened(model):
        exact = separate(model, groups, torch.ones_like)
    factor = next(p for n, p in model.named_parameters() if "lora_B" in n)
    factor.data.mul_(1 + 1e-4)
    tree = PrefixTree.pack([group.sequences for group in groups]).to(device)
    logps = attention.sequence_logps(model, tree)
    logps.sum().backward()
    gradients = take_gradients(model)
    assert largest(logps, exact.logps) > allowed(plain.logps, exact.logps)
    assert gradient_error(gradients, exact.gradients) > 2 * gradient_error(
        plain.gradients, exact.gradients
    )
