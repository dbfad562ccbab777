"""The planner's memory against bytes that real models take, and its work against the benchmarks'.

Peaks are those of PyTorch's allocator on the CPU, as its profiler records them. What differs there
from CUDA is left out on both sides: the buffer of decoded weights, which on the CPU lives only
during a product, and the CUDA context. Models are wide enough for attention's scores, which
only the CPU holds, to be no part of the peak.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from scmini.models import loading
from scmini.models.attention import sequence_logps
from scmini.planning import memory
from scmini.planning.flop import scoring_flop, training_flop, tree_work
from scmini.planning.memory import CONTEXT, ITEMSIZE, Precision
from scmini.planning.shapes import KNOWN, Shape, shape_from_config
from scmini.sections import DPOConfig, ModelConfig, SFTConfig, TrainingConfig
from scmini.seeding import numpy_rng
from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective, SFTObjective
from scmini.training.scoring import score
from scmini.training.steps import Objective, Steps
from scmini.training.trainer import _arguments
from scmini.training.tree_trainer import TreeModule, TreeTrainer
from scmini_kernels import PrefixTree
from scmini_kernels.linear_logprob import WORKSPACE_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import cases
from cases import Case, counts, step_flop

VOCABULARY = 512
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT, RESPONSE, K, PROMPTS = 40, 32, 7, 2
GROUP = PROMPT + (K + 1) * RESPONSE


def saved_llama(folder: Path, size: str) -> LlamaConfig:
    config = LlamaConfig(vocab_size=VOCABULARY, **SIZES[size], **HEADS, eos_token_id=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return config


def shape(config: Any) -> Shape:
    return shape_from_config(config.to_dict(), "test", "test")


def groups(number: int = PROMPTS) -> list[Group]:
    draw = numpy_rng(0, "planner")

    def ids(length: int) -> list[int]:
        return [int(i) for i in draw.integers(2, VOCABULARY, length)]

    return [
        Group.of_responses(
            f"p{i}", ids(PROMPT), [ids(RESPONSE) for _ in range(K + 1)], [-90.0] * (K + 1)
        )
        for i in range(number)
    ]


def peak_of(work: Callable[[], Any]) -> int:
    """Most bytes that lived at once, above what lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    kineto: Any = seen.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most
    return most


def tensors_of(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif hasattr(value, "__dict__") and type(value).__name__ == "QuantState":
        yield from tensors_of(vars(value))


def model_bytes(model: nn.Module) -> tuple[int, int]:
    """Of the frozen weights (with what NF4 needs beside them), and of those that are trained."""
    frozen = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.nbytes
        else:
            state = getattr(parameter, "quant_state", None)
            frozen += parameter.data.nbytes + sum(t.nbytes for t in tensors_of(state))
    return frozen, trained


def trainer_of(model: nn.Module, section: TrainingConfig, out: Path) -> TreeTrainer:
    objective: Objective = (
        PreferenceObjective.of(section) if isinstance(section, DPOConfig) else SFTObjective()
    )
    args = _arguments(section, out, 0, 0.999)
    trainer = TreeTrainer(TreeModule(model), args, objective, section.tokens_per_microbatch)
    trainer.create_optimizer()
    model.train()  # models are loaded in eval mode, in which layers make no checkpoints
    return trainer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("dtype", "nf4"), [("bfloat16", True), ("float32", False)])
def test_a_training_step_takes_what_was_planned(
    tmp_path: Path, size: str, checkpointing: bool, dtype: str, nf4: bool
) -> None:
    """Through the stages' own pieces: adapter, checkpointing, trainer, optimizer."""
    rank, optim = 8, "adamw_torch"
    llama = saved_llama(tmp_path / "model", size)
    source = str(tmp_path / "model")
    settings = ModelConfig(
        **{"model_name_or_path": source, "load_in_4bit": nf4, "dtype": dtype}  # type: ignore[arg-type]
    )
    model = loading.fresh_adapter(settings, source, SFTConfig(lora_r=rank), 0)
    if checkpointing:
        loading.enable_checkpointing(model)
    section = DPOConfig(optim=optim, tokens_per_microbatch=PROMPTS * GROUP)
    trainer = trainer_of(model, section, tmp_path / "out")
    step = Steps(groups(), trainer.objective, section, 0)[0]
    optimizer: Any = trainer.optimizer
    trainer.training_step(trainer.model, step)
    optimizer.step()
    frozen, trained = model_bytes(model)
    moments = sum(t.nbytes for t in tensors_of(dict(optimizer.state)))
    row = peak_of(lambda: trainer.training_step(trainer.model, step))

    sizes, precision = shape(llama), Precision(ITEMSIZE[dtype], nf4)
    planned = memory.training(
        *(sizes, precision, rank, optim, PROMPTS * GROUP, PROMPTS * (K + 1) * RESPONSE),
        checkpointing=checkpointing,
        workspace=WORKSPACE_BYTES,
    )
    assert planned["weights"] == pytest.approx(frozen, rel=0.01)
    assert planned["adapter"] == 2 * trained
    assert planned["optimizer"] == pytest.approx(moments, rel=0.01)
    buffer = memory.decoding_buffer(sizes, precision)
    assert planned["other"] == buffer + CONTEXT
    assert planned["activations"] + planned["head"] == pytest.approx(row, rel=0.1)
    total = sum(planned.values()) - planned["other"]
    assert total == pytest.approx(frozen + 2 * trained + moments + row, rel=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_saves_what_was_planned(tmp_path: Path, dtype: str) -> None:
    """Counted where autograd packs tensors; the difference of two models is their layers'."""
    found = {}
    for number in (1, 3):
        config = LlamaConfig(
            vocab_size=VOCABULARY, **{**SIZES["tiny"], "num_hidden_layers": number}, **HEADS
        )
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / str(number))
        source = str(tmp_path / str(number))
        settings = ModelConfig(
            **{"model_name_or_path": source, "load_in_4bit": False, "dtype": dtype}  # type: ignore[arg-type]
        )
        model = loading.fresh_adapter(settings, source, SFTConfig(lora_r=8), 0)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        packed: dict[int, Tensor] = {}

        def pack(x: Tensor, packed: Any = packed, own: Any = own) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                packed[x.untyped_storage().data_ptr()] = x  # kept, so that no address comes twice
            return x

        tree = PrefixTree.pack([group.sequences for group in groups()])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sequence_logps(model, tree)
        found[number] = sum(x.untyped_storage().nbytes() for x in packed.values())
    planned = memory.saved_by_layer(shape(config), 8, ITEMSIZE[dtype])
    assert (found[3] - found[1]) / (2 * tree.num_tokens) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize(
    ("size", "dtype"),
    # In bfloat16 the CPU widens pieces of the head, which would be most of a tiny model's memory.
    [("tiny", "float32"), ("small", "float32"), ("small", "bfloat16")],
)
def test_scoring_takes_what_was_planned(tmp_path: Path, size: str, dtype: str) -> None:
    llama = saved_llama(tmp_path / "model", size)
    source = str(tmp_path / "model")
    settings = ModelConfig(
        **{"model_name_or_path": source, "load_in_4bit": False, "dtype": dtype}  # type: ignore[arg-type]
    )
    module = TreeModule(loading.load_policy(settings, source, None, trainable=False))
    texts = [Group.of_text("a", range(2, 402), [False] + [True] * 399)]
    score(module, texts, 400)
    row = peak_of(lambda: score(module, texts, 400))
    parts = memory.scoring_activations(
        shape(llama), ITEMSIZE[dtype], 400, 399, workspace=WORKSPACE_BYTES
    )
    assert sum(parts.values()) == pytest.approx(row, rel=0.1)


def test_training_all_weights_takes_what_was_planned(tmp_path: Path) -> None:
    """The stage `base`."""
    config = LlamaConfig(vocab_size=VOCABULARY, **SIZES["small"], **HEADS, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    section = TrainingConfig(gradient_checkpointing=False)
    trainer = trainer_of(model, section, tmp_path)
    texts = [Group.of_text(str(i), range(2 + i, 302 + i), [False] + [True] * 299) for i in range(2)]
    step = Steps(texts, trainer.objective, section, 0)[0]
    trainer.training_step(trainer.model, step)
    optimizer: Any = trainer.optimizer
    optimizer.step()
    row = peak_of(lambda: trainer.training_step(trainer.model, step))
    _, trained = model_bytes(model)
    moments = sum(t.nbytes for t in tensors_of(dict(optimizer.state)))
    planned = memory.full_training(shape(config), 600, workspace=WORKSPACE_BYTES)
    assert planned["weights"] + planned["adapter"] == 2 * trained
    assert planned["optimizer"] == pytest.approx(moments, rel=0.01)
    assert sum(planned.values()) - CONTEXT == pytest.approx(2 * trained + moments + row, rel=0.1)


@pytest.mark.parametrize("size", [64 * 64, 352 * 128, 1000 * 100, 14336 * 64])
def test_nf4_takes_what_bitsandbytes_takes(size: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(
        torch.randn(size), quant_type="nf4", compress_statistics=True
    )
    assert memory.nf4_bytes(size) == packed.nbytes + sum(t.nbytes for t in tensors_of(state))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("rank", [4, 64])
def test_the_moments_of_bitsandbytes(optim: str, rank: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    one = Shape("test", 1, 256, 4, 2, 64, 512, 64)
    matrices = [torch.zeros(rank, n, requires_grad=True) for pair in one.linears for n in pair]
    kinds = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_32bit": bnb.optim.PagedAdamW32bit}
    optimizer = kinds[optim](matrices)
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    with pytest.warns(UserWarning, match="Paged") if "paged" in optim else torch.no_grad():
        optimizer.step()
    states = {id(t): t.nbytes for t in tensors_of(dict(optimizer.state))}
    planned = memory.optimizer_bytes(one, rank, optim, on_card=False)
    assert planned == sum(states.values())
    if "paged" in optim:
        assert memory.optimizer_bytes(one, 1024, optim) == 0
        assert memory.optimizer_bytes(one, rank, optim) == planned  # too small to be paged


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (MistralConfig(vocab_size=32000), "mistralai/Mistral-7B-v0.1"),
        (LlamaConfig(), "meta-llama/Llama-2-7b-chat-hf"),
        (
            BertConfig(
                **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
                intermediate_size=4096,
            ),
            "WhereIsAI/UAE-Large-V1",
        ),
        (
            BertConfig(
                **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
                intermediate_size=1536,
            ),
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
    ],
)
def test_known_shapes_have_as_many_weights_as_transformers_gives_them(
    config: Any, known: str
) -> None:
    """Bodies without an output embedding, made without memory."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    sizes = KNOWN[known]
    head = sizes.head_weights if sizes.kind == "decoder" else 0
    assert sum(p.numel() for p in model.parameters()) == sizes.weights - head
    read = shape_from_config(config.to_dict(), known, "test")
    assert replace(read, file_bytes=sizes.file_bytes) == sizes


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", [(128, 256, 16), (512, 256, 1), (7, 5, 3)])
def test_work_is_that_of_the_benchmarks(case: tuple[int, int, int], checkpointing: bool) -> None:
    sizes, bench = KNOWN["mistralai/Mistral-7B-v0.1"], cases.MISTRAL_7B
    assert sizes.linear_weights == bench.linear_weights
    assert sizes.lora_weights(bench.rank) == bench.lora_weights
    prompt, response, k = case
    layouts = {"trees": None, "split": prompt + 2 * response}
    for layout, limit in layouts.items():
        work = tree_work(prompt, response, k + 1, limit)
        count = counts(Case(prompt, response, k), layout)  # type: ignore[arg-type]
        assert (work.tokens, work.targets, work.attention) == (
            count.tokens,
            count.targets,
            count.attention,
        )
        expected = step_flop(
            bench, count, checkpointing=checkpointing, reference=False, rescored=work.rescored
        )
        assert training_flop(sizes, bench.rank, work, checkpointing=checkpointing) == expected
        alone = {"checkpointing": checkpointing, "rescored": work.rescored}
        reference = step_flop(bench, count, **alone) - step_flop(
            bench, count, reference=False, **alone
        )
        assert scoring_flop(sizes, 0, work) == reference
