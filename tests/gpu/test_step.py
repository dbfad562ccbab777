"""Whole models on a GPU: a 7B-shaped NF4 model's DPO step in 24 GB, and equality in bf16.

Nothing is downloaded: weights are random, and quantised layer by layer on the device.
"""

import functools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from scmini.models import attention
from scmini.models.attention import plain_model
from scmini.models.loading import enable_checkpointing
from scmini.models.qlora import fuse_lora
from scmini.planning import memory
from scmini.planning.memory import Precision
from scmini.planning.shapes import KNOWN
from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule, TreeTrainer
from scmini.verification.checks import allowed, largest, run
from scmini.verification.model import model_checks, randomise
from scmini.verification.separate import gradient_error, separate, take_gradients, widened
from scmini_kernels import PrefixTree, linear_logprob, tree_attention

GIB = 2**30
CARD = 24 * GIB
MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def random_weights(model, device, std=0.02):
    """Give a model on the meta device bf16 weights; norms are 1, buffers (RoPE) as computed."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape, kind = parameter.shape, {"dtype": torch.bfloat16, "device": device}
            if parameter.dim() == 1:
                value = torch.ones(shape, **kind)
            else:
                value = torch.randn(shape, generator=generator, **kind) * std
            if isinstance(module, nn.Linear) and name == "weight" and hasattr(module, "quant_type"):
                value = quantised(module, value)
            else:
                value = nn.Parameter(value, requires_grad=False)
            setattr(module, name, value)


def quantised(layer, weight):
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=False,
        module=layer,
    )
    return packed.to(weight.device)


def nf4_model(config, device):
    """A causal LM whose linear layers, all but the head, are NF4 with double quantisation."""
    bnb = pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        model = MistralForCausalLM(config)
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear:
                        layer = bnb.nn.Linear4bit(
                            child.in_features,
                            child.out_features,
                            bias=False,
                            compute_dtype=torch.bfloat16,
                            compress_statistics=True,
                            quant_type="nf4",
                        )
                        layer.quant_type = "nf4"
                        setattr(parent, name, layer)
    random_weights(model, device)
    # The only buffers are the rotary frequencies, and a module of its own makes them anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.is_loaded_in_4bit = True  # by this PEFT knows
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapted(model, r):
    """With LoRA on all linear layers, both factors non-zero, checkpointing, as training has it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    randomise(policy)
    fuse_lora(policy)
    enable_checkpointing(policy)
    return policy.train()


def random_group(prompt, response, k, vocabulary):
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    return Group.of_responses("p", ids(prompt), [ids(response) for _ in range(1 + k)])


def dpo_step(policy, prompt, response, k, out):
    """One whole optimizer step on one prompt, reference included; loss and size of the gradients.

    The row holds all of the tree: nothing is cut.
    """
    from transformers import TrainingArguments

    inner = plain_model(policy)
    module = TreeModule(policy)
    group = random_group(prompt, response, k, inner.config.vocab_size)
    assert group.num_tokens == prompt + (k + 1) * response
    knob = group.num_tokens
    reference = score(module, [group], knob)[0]
    group = Group(group.id, group.sequences, group.num_scored, reference)
    args = TrainingArguments(
        output_dir=str(out), report_to=["none"], use_cpu=inner.device.type == "cpu"
    )
    trainer = TreeTrainer(module, args, PreferenceObjective(0.1), knob)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    step = {"groups": [group], "weight": 1.0, "idle": False}
    loss = trainer.training_step(module, step).item()
    sizes = {n: p.grad.abs().max().item() for n, p in policy.named_parameters() if p.requires_grad}
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    before = trained[0].detach().clone()
    optimizer.step()
    assert not torch.equal(before, trained[0])
    return loss, sizes


@pytest.fixture
def card():
    """A GPU of at most 24 GiB, whatever there is."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    torch.cuda.reset_peak_memory_stats()
    yield torch.device("cuda", 0)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_7b_step_fits_24_gb(card, tmp_path, capsys):
    policy = adapted(nf4_model(MistralConfig(**MISTRAL_7B), card), r=64)
    weights = torch.cuda.memory_allocated()
    loss, sizes = dpo_step(policy, 1024, 512, 16, tmp_path)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with capsys.disabled():
        print(
            f"\n7B NF4, (P, R, k) = (1024, 512, 16): weights {weights / GIB:.2f} GiB, peak "
            f"{allocated / GIB:.2f} GiB allocated, {reserved / GIB:.2f} GiB reserved"
        )
    # Rewards are 0 before the first step, so the loss is log 2 up to rounding of the margins.
    assert loss == pytest.approx(0.6931, abs=0.2)
    assert len(sizes) == 32 * 7 * 2
    assert all(0 < size < float("inf") for size in sizes.values())
    assert allocated < CARD
    shape, row = KNOWN["mistralai/Mistral-7B-v0.1"], (1024 + 17 * 512, 17 * 512)
    parts = memory.training(shape, Precision(2, True), 64, "adamw_torch", *row, checkpointing=True)
    planned = sum(parts.values()) - memory.CONTEXT
    with capsys.disabled():
        print(f"planned {planned / GIB:.2f} GiB")
    assert planned == pytest.approx(allocated, rel=0.1)


def test_the_same_step_small(device, tmp_path):
    """The model that is built by hand is one that bitsandbytes, PEFT and the trainer take."""
    shape = {**MISTRAL_7B, **SMALL, "num_hidden_layers": 2, "vocab_size": 500, "hidden_size": 128}
    policy = adapted(nf4_model(MistralConfig(**shape), device), r=4)
    assert sum(hasattr(m, "quant_state") for m in policy.modules()) == 2 * 7
    loss, sizes = dpo_step(policy, 9, 5, 3, tmp_path)
    assert loss == pytest.approx(0.6931, abs=0.2)
    assert len(sizes) == 2 * 7 * 2
    assert all(0 < size < float("inf") for size in sizes.values())


@pytest.mark.gpu
def test_memory_that_runs_out(card, tmp_path):
    """The allocator's own error: the step is done again in smaller rows, and gives the same."""
    from transformers import TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(card, torch.bfloat16).requires_grad_(False)
    policy = adapted(model, r=16)
    module = TreeModule(policy)
    drawn = [random_group(64, length, 7, 8000) for length in range(200, 280, 10)]
    groups = [
        Group(f"p{n}", g.sequences, g.num_scored, [-8.99 * m for m in g.num_scored])
        for n, g in enumerate(drawn)
    ]
    knob = sum(group.num_tokens for group in groups)

    def step():
        policy.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        args = TrainingArguments(output_dir=str(tmp_path), report_to=["none"])
        trainer = TreeTrainer(module, args, PreferenceObjective(0.1), knob)
        share = {"groups": groups, "weight": float(len(groups)), "idle": False}
        loss = trainer.training_step(module, share).item()
        return trainer, loss, take_gradients(policy), before

    _, roomy, expected, before = step()
    peak = torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    trainer, loss, gradients, _ = step()
    lowered = trainer.schedule.lowered_to
    assert lowered is not None
    assert lowered < knob
    assert torch.cuda.max_memory_reserved() < before + 0.6 * (peak - before)
    assert loss == pytest.approx(roomy, rel=1e-2)
    assert gradient_error(gradients, expected) < 0.05


@pytest.mark.gpu
def test_packed_is_separate_in_nf4(card):
    """And the step cut into micro-batches, and rewards of 0, on NF4 layers in bf16."""
    shape = {**MISTRAL_7B, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8000}
    policy = adapted(nf4_model(MistralConfig(**shape), card), r=16)
    rows = []
    run(model_checks(policy, "triton"), lambda _: None, rows.append)
    assert len(rows) == 8
    assert all(row.passed for row in rows), rows


@pytest.mark.gpu
def test_three_ways_in_bf16(card, monkeypatch):
    """Hidden 512: separate sequences, packed in PyTorch, packed in Triton."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(card, torch.bfloat16).requires_grad_(False)
    policy = adapted(model, r=16)
    drawn = [random_group(100, n, 15, 8000) for n in (60, 37, 90)]
    objective = PreferenceObjective(0.1)
    # References at log 8000 per token, about where a random model is: margins of both signs.
    groups = [
        Group(g.id, g.sequences, g.num_scored, [-8.99 * n for n in g.num_scored]) for g in drawn
    ]

    def weights(logps):
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf, groups)[0], leaf)[0]

    plain = separate(policy, groups, weights)
    with widened(policy):
        exact = separate(policy, groups, weights)
    tree = PrefixTree.pack([group.sequences for group in groups]).to(card)
    bound = allowed(plain.logps, exact.logps)
    gradient_bound = 2 * gradient_error(plain.gradients, exact.gradients)
    for way in ("torch", "reference", "triton"):
        for operation in (tree_attention, linear_logprob):
            named = functools.partial(operation, impl=way)
            monkeypatch.setattr(attention, operation.__name__, named)
        logps = attention.sequence_logps(policy, tree)
        objective(logps, groups)[0].backward()
        gradients = take_gradients(policy)
        assert largest(logps, exact.logps) <= bound, way
        assert gradient_error(gradients, exact.gradients) <= gradient_bound, way
