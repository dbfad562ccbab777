"""Drawing answers: the memory that an engine takes, how many answers it draws at once, how fast."""

from dataclasses import dataclass

from scmini.planning import cards, memory
from scmini.planning.cards import Card
from scmini.planning.flop import scoring_flop, tree_work
from scmini.planning.memory import Parts, Precision
from scmini.planning.shapes import Shape
from scmini.sections import DecodingConfig

ENGINE_START_SECONDS = 60.0
"""vLLM's compilation and CUDA graphs."""
STEP_SECONDS = 0.04
"""Of one token for a whole batch under transformers, beside the work: launching its kernels."""
_NF4_STEP_BYTES = 4.5
"""Per weight: NF4 is read, 16 bits are written and read again."""


@dataclass(frozen=True)
class Asked:
    """n answers to each of so many prompts; mean lengths, and the longest sequence, in tokens."""

    prompts: int
    n: int
    prompt: int
    answer: int
    longest: int


@dataclass(frozen=True)
class Drawn:
    """Memory, sequences decoded at once, and time."""

    engine: str
    parts: Parts
    at_once: int
    seconds: float | None


def drawing(
    shape: Shape,
    precision: Precision,
    rank: int,
    decoding: DecodingConfig,
    asked: Asked,
    card: Card,
) -> Drawn:
    """Under the engine that the configuration names; `auto` is planned as vLLM, which it takes
    where it finds it."""
    if decoding.engine == "transformers":
        return _transformers(shape, precision, rank, decoding, asked, card)
    return _vllm(shape, precision.itemsize, rank, decoding, asked, card)


def _vllm(
    shape: Shape, itemsize: int, rank: int, decoding: DecodingConfig, asked: Asked, card: Card
) -> Drawn:
    """The KV cache gets what the rest leaves, up to what is needed; one sequence at least."""
    weights = memory.served_bytes(shape, itemsize, decoding.quantization)
    adapter = itemsize * shape.lora_weights(rank) if decoding.weights == "adapter" else 0
    engine = memory.ENGINE_EAGER if decoding.enforce_eager else memory.ENGINE
    other = engine + memory.CONTEXT
    share = decoding.gpu_memory_utilization
    room = card.usable if share is None else min(card.usable, int(share * card.memory))
    ways = decoding.tensor_parallel_size * decoding.data_parallel_size
    per_token = shape.kv_weights_per_token * (1 if decoding.kv_cache_dtype == "fp8" else itemsize)
    if decoding.tensor_parallel_size > 1:  # weights and cache lie split over the cards
        weights, adapter, per_token = (
            -(-each // decoding.tensor_parallel_size) for each in (weights, adapter, per_token)
        )
    each = per_token * (asked.prompt / asked.n + asked.answer)  # answers share their prompt
    wanted = min(decoding.max_num_seqs, asked.prompts * asked.n)
    cache = min(int(wanted * each), room - weights - adapter - other)
    cache = max(cache, per_token * asked.longest)
    at_once = max(1, min(wanted, int(cache / each)))
    parts = {"weights": weights, "adapter": adapter, "KV cache": cache, "other": other}
    seconds = _seconds(shape, rank, weights + adapter, per_token, asked, at_once, card, 0.0)
    if seconds is not None:
        seconds = seconds / ways + ENGINE_START_SECONDS
    return Drawn("vllm", parts, at_once, seconds)


def _transformers(
    shape: Shape,
    precision: Precision,
    rank: int,
    decoding: DecodingConfig,
    asked: Asked,
    card: Card,
) -> Drawn:
    """Our own loop: a row of the cache per answer, made larger by copying it layer by layer."""
    itemsize = precision.itemsize
    at_once = min(decoding.batch_size, asked.prompts * asked.n)
    per_token = shape.kv_weights_per_token * itemsize
    cache = at_once * (asked.prompt + asked.answer) * per_token
    copied = cache // (2 * shape.layers)
    logits = 5 * 4 * at_once * shape.vocab  # logits, probabilities, their sums by answer
    prompts = -(-at_once // asked.n) * asked.prompt
    parts = {
        "weights": memory.weight_bytes(shape, precision),
        "adapter": 4 * shape.lora_weights(rank),
        "KV cache": cache + copied,
        "head": logits,
        "activations": memory.scoring_activations(shape, itemsize, prompts, 0)["activations"],
        "other": memory.decoding_buffer(shape, precision) + memory.CONTEXT,
    }
    moved = parts["weights"]
    if precision.nf4:
        moved = int(_NF4_STEP_BYTES * shape.linear_weights) + itemsize * shape.other_weights
    seconds = _seconds(shape, rank, moved, per_token, asked, at_once, card, STEP_SECONDS)
    return Drawn("transformers", parts, at_once, seconds)


def _seconds(
    shape: Shape,
    rank: int,
    weights: int,
    per_token: int,
    asked: Asked,
    at_once: int,
    card: Card,
    overhead: float,
) -> float | None:
    """Each prompt is computed once. Then every token of all answers under way reads the weights,
    and the keys and values of half an answer on average; or the products take longer."""
    if card.tflops is None or card.gigabytes_per_second is None:
        return None
    rate = card.tflops * 1e12 * card.efficiency
    bandwidth = card.gigabytes_per_second * 1e9 * cards.DECODING_SHARE
    prefill = scoring_flop(shape, rank, tree_work(asked.prompt, 0, 0)) * asked.prompts / rate
    context = asked.prompt + asked.answer / 2
    read = (weights + at_once * context * per_token) / bandwidth
    products = 2 * at_once * (shape.linear_weights + shape.head_weights) / rate
    steps = asked.prompts * asked.n * asked.answer / at_once
    return prefill + steps * (max(read, products) + overhead)
