"""Checks of a whole model with its adapter, by the way that training takes."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from scmini.models.attention import is_half, plain_model
from scmini.models.loading import enable_checkpointing, fresh_adapter, quietly
from scmini.sections import ModelConfig, SFTConfig
from scmini.seeding import rng
from scmini.training.batches import Group, cut
from scmini.training.losses import PreferenceObjective
from scmini.training.scoring import check_start, score, tolerance
from scmini.training.tree_trainer import TreeModule, TreeTrainer
from scmini.verification.checks import FACTOR, Check, Finding, allowed, largest
from scmini.verification.separate import (
    Gradients,
    Result,
    gradient_error,
    separate,
    take_gradients,
    widened,
)
from scmini_kernels import PrefixTree

BETA = 0.1
WHOLE = 1 << 30
ADAPTER_STD = 0.02
"""Of LoRA's B: with the usual 0 half the gradients would be 0."""
TINY = LlamaConfig(
    vocab_size=499,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=None,
)


def tiny_subject(dtype: torch.dtype) -> nn.Module:
    """A Llama of random weights on this process's device, saved and loaded like any other."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with quietly():
            model: nn.Module = LlamaForCausalLM(TINY)
            cast(Any, model.to(dtype)).save_pretrained(folder)
        name: Any = str(dtype).removeprefix("torch.")
        return _subject(ModelConfig(load_in_4bit=False, dtype=name), folder, rank=8)


def chosen_subject(source: str) -> nn.Module:
    """A model as the default configuration loads it, with a random adapter of the default size.

    Raises:
        DataError, EnvironmentProblem: see `scmini.models.loading.load_base`.
    """
    config = ModelConfig(model_name_or_path=source)
    return _subject(config, source, rank=SFTConfig().lora_r)


def _subject(config: ModelConfig, source: str, rank: int) -> nn.Module:
    model = fresh_adapter(config, source, SFTConfig(lora_r=rank, lora_alpha=rank), seed=0)
    randomise(model)
    enable_checkpointing(model)
    return model.train()


def randomise(model: nn.Module) -> None:
    """Give LoRA's B random values, the same on every device."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) * ADAPTER_STD
            parameter.data.copy_(noise)


def random_groups(vocabulary: int) -> list[Group]:
    """Three prompts of 21 to 40 tokens, each with a chosen and eight rejected responses."""
    draw = rng(0, "groups of the verification")

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]

    groups = []
    for number in range(3):
        start = ids(2, 4)
        responses = [(start if j % 3 == 1 else []) + ids(1, 16) for j in range(9)]
        groups.append(Group.of_responses(f"prompt {number}", ids(21, 40), responses))
    return groups


def model_checks(model: nn.Module, implementation: str) -> list[Check]:
    """Packed = separate, the step in micro-batches = the whole step, step-0 rewards = 0.

    Args:
        model: on its device, in train mode without dropout, with something to train.
        implementation: what the two operations choose by themselves on this device.
    """
    proof = _Proof(model)
    dtype = str(plain_model(model).dtype).removeprefix("torch.")
    return [
        Check("packed = separate sequences", implementation, dtype, proof.packing),
        Check("whole step = step in micro-batches", implementation, dtype, proof.cutting),
        Check("step-0 rewards = 0", implementation, dtype, proof.start),
    ]


class _Yardstick(NamedTuple):
    """Separate sequences twice: in the model's dtype, and in a wider one, which is the truth."""

    plain: Result
    exact: Result

    @property
    def logps(self) -> float:
        """Allowed error of a log-probability, in nats."""
        return allowed(self.plain.logps, self.exact.logps)

    @property
    def gradients(self) -> float:
        """Allowed relative error of a gradient."""
        floor = torch.finfo(torch.float32).eps / 2
        return max(FACTOR * gradient_error(self.plain.gradients, self.exact.gradients), floor)


class _Proof:
    """What the checks of one model share."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.module = model, TreeModule(model)
        self.inner = plain_model(model)
        self.groups = random_groups(cast(Any, self.inner.get_input_embeddings()).num_embeddings)
        self.objective = PreferenceObjective(BETA)

    def packing(self) -> Iterator[Finding]:
        """Log-probabilities and gradients, for a random upstream gradient of both signs."""
        count = sum(len(group.sequences) for group in self.groups)
        random = torch.randn(count, generator=torch.Generator().manual_seed(3))
        yardstick = self._measure(self.groups, lambda logps: random.to(logps))
        tree = PrefixTree.pack([group.sequences for group in self.groups])
        logps = self.module(tree.to(self.inner.device))
        logps.backward(random.to(logps))
        gradients = take_gradients(self.model)
        exact = yardstick.exact
        yield Finding("log-probabilities", largest(logps, exact.logps), yardstick.logps)
        error = gradient_error(gradients, exact.gradients)
        yield Finding("gradients of the adapter", error, yardstick.gradients)

    def cutting(self) -> Iterator[Finding]:
        """The step of the trainer, with all in one row, cut between prompts, and in parts."""
        groups = self.referenced
        yardstick = self._measure(groups, lambda logps: self._loss_weights(logps, groups))
        # An error e of every log-probability changes the loss by at most this.
        loss_allowed = yardstick.logps * yardstick.exact.upstream.abs().sum().item()
        whole, whole_gradients = self._step(groups, WHOLE)
        error = gradient_error(whole_gradients, yardstick.exact.gradients)
        yield Finding("gradients of the whole step", error, yardstick.gradients)
        for knob in _knobs(groups):
            loss, gradients = self._step(groups, knob)
            what = f"with tokens_per_microbatch {knob}"
            yield Finding(f"loss {what}", abs(loss - whole), loss_allowed)
            error = gradient_error(gradients, whole_gradients)
            yield Finding(f"gradients {what}", error, yardstick.gradients)

    def start(self) -> Iterator[Finding]:
        """As training starts: scored once as a reference, then again by the policy, cut otherwise.

        The finding is the response that comes closest to its tolerance.
        """
        knob = _knobs(self.groups)[-1]
        references = score(self.module, self.groups, WHOLE)
        groups = _with_references(self.groups, references)
        check_start(self.module, groups, knob)
        findings = []
        for group, scores in zip(groups, score(self.module, groups, knob), strict=True):
            for logp, ref, length in zip(
                scores, group.ref_logps or (), group.num_scored, strict=True
            ):
                bound = tolerance(ref, length, is_half(self.model))
                findings.append(Finding("log-ratio, in nats", abs(logp - ref), bound))
        yield max(findings, key=lambda finding: finding.error / finding.allowed)

    @cached_property
    def referenced(self) -> list[Group]:
        """The groups with references some nats away, so that margins have both signs."""
        draw = rng(0, "references of the verification")
        return _with_references(
            self.groups,
            [
                [x + draw.uniform(-9, 9) for x in row]
                for row in score(self.module, self.groups, WHOLE)
            ],
        )

    def _measure(self, groups: Sequence[Group], upstream: Any) -> _Yardstick:
        plain = separate(self.model, groups, upstream)
        with widened(self.model):
            return _Yardstick(plain, separate(self.model, groups, upstream))

    def _loss_weights(self, logps: Tensor, groups: Sequence[Group]) -> Tensor:
        """d loss / d log-probability of the whole step."""
        leaf = logps.detach().requires_grad_()
        loss, _ = self.objective(leaf, groups)
        return torch.autograd.grad(loss / len(groups), leaf)[0]

    def _step(self, groups: Sequence[Group], knob: int) -> tuple[float, Gradients]:
        """Loss and gradients of the trainer's step."""
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                use_cpu=self.inner.device.type == "cpu",
                report_to=["none"],
                disable_tqdm=True,
            )
            trainer = TreeTrainer(self.module, args, self.objective, knob)
            step = {"groups": list(groups), "weight": float(len(groups)), "idle": False}
            loss = trainer.training_step(self.module, step).item()
        return loss, take_gradients(self.model)


def _knobs(groups: Sequence[Group]) -> list[int]:
    """Cuts that really cut: between prompts without parts, and every prompt in parts."""
    largest_group = max(group.num_tokens for group in groups)
    half = min(group.num_tokens for group in groups) // 2
    assert len(cut(groups, largest_group)) > 1
    assert all(batch.parts for batch in cut(groups, half))
    return [largest_group, half]


def _with_references(groups: Sequence[Group], logps: Sequence[list[float]]) -> list[Group]:
    return [
        Group(group.id, group.sequences, group.num_scored, references)
        for group, references in zip(groups, logps, strict=True)
    ]
