"""GPU memory of each kind of work, in bytes, part by part at the moment when most is needed.

What a layer keeps for backward is what autograd saves in transformers' Llama with the LoRA layers
of scmini.models.qlora; the tests count it on real models. Liger's kernels keep less; it is counted
without them.
"""

from dataclasses import dataclass

from scmini.planning.shapes import Shape

GIB = 1 << 30
Parts = dict[str, int]

CONTEXT = int(0.6 * GIB)
"""CUDA context, kernels, and the workspaces of cuBLAS: assumed."""
ENGINE = int(1.5 * GIB)
"""vLLM's activations, sampler and CUDA graphs: assumed."""
ENGINE_EAGER = GIB
HEAD_WORKSPACE = 384 << 20
"""Most that `linear_logprob` takes by itself on a GPU."""
_LEAST_HEAD_ROWS, _HEAD_ALIGNMENT = 192, 64
_NF4_BLOCK, _ABSMAX_BLOCK, _NF4_TABLES = 64, 256, 64 + 1024 + 4
_ADAM_BLOCK, _ADAM_LEAST_8BIT, _ADAM_TABLES, _LEAST_PAGED = 256, 4096, 2048, 100_000
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Precision:
    """How a model is held: bytes of a number, and whether its linears are in NF4."""

    itemsize: int
    nf4: bool


def nf4_bytes(weights: int) -> int:
    """A matrix in NF4 with double quantisation: 4 bits a weight, 8 for every 64, 32 for every 64 *
    256, and tables."""
    blocks = -(-weights // _NF4_BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // _ABSMAX_BLOCK) + _NF4_TABLES


def weight_bytes(shape: Shape, precision: Precision) -> int:
    """A frozen model as scmini.models.loading holds it: all but the linears is in 16 or 32 bits."""
    linears = shape.linear_weights * precision.itemsize
    if precision.nf4:
        linears = shape.layers * sum(nf4_bytes(a * b) for a, b in shape.linears)
    return linears + shape.other_weights * precision.itemsize


def served_bytes(shape: Shape, itemsize: int, quantization: str | None) -> int:
    """A model as vLLM holds it; its own 4 bits come without double quantisation."""
    packed = {"fp8": 1.0, "bitsandbytes": 0.5 + 4 / _NF4_BLOCK}
    per_linear = itemsize if quantization is None else packed[quantization]
    return int(shape.linear_weights * per_linear) + shape.other_weights * itemsize


def decoding_buffer(shape: Shape, precision: Precision) -> int:
    """The largest linear's decoded weights."""
    return max(a * b for a, b in shape.linears) * precision.itemsize if precision.nf4 else 0


def optimizer_bytes(shape: Shape, rank: int, optim: str, *, on_card: bool = True) -> int:
    """AdamW's two moments for an adapter.

    Paged ones lie in memory that moves to the host when the card is full: with `on_card` they
    count nothing, but for matrices too small to be paged.
    """
    matrices = [rank * size for pair in shape.linears for size in pair]
    tables = _ADAM_TABLES if "8bit" in optim and max(matrices) >= _ADAM_LEAST_8BIT else 0
    return shape.layers * sum(_moments(n, optim, on_card) for n in matrices) + tables


def _moments(numbers: int, optim: str, on_card: bool) -> int:
    if on_card and optim.startswith("paged") and numbers >= _LEAST_PAGED:
        return 0
    if "8bit" in optim and numbers >= _ADAM_LEAST_8BIT:
        return 2 * (numbers + 4 * -(-numbers // _ADAM_BLOCK))
    return 8 * numbers


def saved_by_layer(shape: Shape, rank: int, itemsize: int) -> int:
    """Bytes per token that one decoder layer keeps for backward.

    RMSNorm, twice: its input in float32, one statistic, its result. Attention: q, k, v, out, and
    the log-sum-exp of each head. SwiGLU: gate, its activation, up, their product. LoRA: x A for
    each of the linears.
    """
    norms = 2 * (4 * shape.hidden + 4 + itemsize * shape.hidden)
    attention = itemsize * 2 * (shape.query + shape.kv) + 4 * shape.heads
    return norms + attention + itemsize * (4 * shape.ffn + len(shape.linears) * rank)


def head_room(shape: Shape, targets: int, itemsize: int, workspace: int, *, gradients: bool) -> int:
    """Logits of a chunk in float32, their gradients in 16 bits, and the chunk's hidden states."""
    columns = -(-shape.vocab // _HEAD_ALIGNMENT) * _HEAD_ALIGNMENT
    second = 0 if itemsize == 4 else columns * itemsize
    rows = min(targets, max(_LEAST_HEAD_ROWS, workspace // (4 * columns + second)))
    return rows * (4 * columns + (second if gradients else 0) + shape.hidden * itemsize)


def training_activations(
    shape: Shape,
    rank: int,
    itemsize: int,
    tokens: int,
    targets: int,
    *,
    checkpointing: bool,
    workspace: int = HEAD_WORKSPACE,
) -> Parts:
    """What a row of so many tokens needs in forward and backward, beside weights and gradients.

    There are two moments: when the head works, and when the last layer's feed-forward network
    begins its backward (its gradients are two more of its width). The larger one counts.
    """
    saved = saved_by_layer(shape, rank, itemsize)
    stream = shape.hidden * itemsize
    kept = shape.layers * (stream if checkpointing else saved)
    kept += 2 * shape.head_dim * itemsize  # cos and sin
    room = head_room(shape, targets, itemsize, workspace, gradients=True)
    at_head = {
        "activations": tokens * (kept + 4 * shape.hidden + 4 + stream),
        "head": targets * (stream + 16) + room,
    }
    layer = stream + itemsize * (2 * shape.ffn - rank)
    if checkpointing:  # in float32 the first norm's input is the checkpoint itself
        layer += saved - (stream if itemsize == 4 else 0)
    in_layer = {"activations": tokens * (kept + layer), "head": 0}
    return max(at_head, in_layer, key=lambda parts: sum(parts.values()))


def scoring_activations(
    shape: Shape, itemsize: int, tokens: int, targets: int, workspace: int = HEAD_WORKSPACE
) -> Parts:
    """A forward pass without gradients: of one layer, or of the head, whichever is more."""
    ffn = 2 if shape.kind == "encoder" else 3
    row = 4 * shape.hidden + ffn * shape.ffn + 2 * shape.head_dim
    in_layer = {"activations": tokens * row * itemsize, "head": 0}
    if not targets:
        return in_layer
    room = head_room(shape, targets, itemsize, workspace, gradients=False)
    at_head = {"activations": tokens * shape.hidden * itemsize, "head": room}
    return max(at_head, in_layer, key=lambda parts: sum(parts.values()))


def training(
    shape: Shape,
    precision: Precision,
    rank: int,
    optim: str,
    tokens: int,
    targets: int,
    *,
    checkpointing: bool,
    workspace: int = HEAD_WORKSPACE,
) -> Parts:
    """A QLoRA step: frozen base, adapter and gradients in float32, moments, one row."""
    adapter = 4 * shape.lora_weights(rank)
    return {
        "weights": weight_bytes(shape, precision),
        "adapter": 2 * adapter,
        "optimizer": optimizer_bytes(shape, rank, optim),
        **training_activations(
            *(shape, rank, precision.itemsize, tokens, targets),
            checkpointing=checkpointing,
            workspace=workspace,
        ),
        "other": decoding_buffer(shape, precision) + CONTEXT,
    }


def full_training(shape: Shape, tokens: int, workspace: int = HEAD_WORKSPACE) -> Parts:
    """A step of which all weights are trained in float32, without checkpointing."""
    parts = training_activations(
        shape, 0, 4, tokens, tokens, checkpointing=False, workspace=workspace
    )
    trained_norms = (2 * shape.layers + 1) * 4 * shape.hidden * tokens
    return {
        "weights": 4 * shape.weights,
        "adapter": 4 * shape.weights,
        "optimizer": 8 * shape.weights,
        "activations": parts["activations"] + trained_norms,
        "head": parts["head"] + 4 * shape.head_weights,
        "other": CONTEXT,
    }


def scoring(
    shape: Shape,
    precision: Precision,
    rank: int,
    tokens: int,
    targets: int,
    workspace: int = HEAD_WORKSPACE,
) -> Parts:
    """A model that scores rows of so many tokens, with its adapter if it has one."""
    return {
        "weights": weight_bytes(shape, precision),
        "adapter": 4 * shape.lora_weights(rank),
        **scoring_activations(shape, precision.itemsize, tokens, targets, workspace),
        "other": decoding_buffer(shape, precision) + CONTEXT,
    }
