"""The cases that are measured, and how much work each of them is: tokens and FLOP, counted exactly.

Notation: P prompt tokens, R tokens per response, k rejected responses; a prompt can be laid out

    pairs     2k sequences of P+R tokens, the k pairs that other trainers see
    grouped   k+1 sequences of P+R tokens, the chosen response once
    trees     one prefix tree of P+(k+1)R tokens, the prompt once
    split     that tree in parts of P+2R tokens, as many as one pair has, the prompt in each

A product of an (m, n) and an (n, p) matrix counts 2mnp; element-wise work and norms count nothing.
Only score elements that causality allows count as attention.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Layout = Literal["pairs", "grouped", "trees", "split"]


@dataclass(frozen=True)
class Shape:
    """A Llama: what decides how much work a token is. `rank` is LoRA's, on all linears; 0: none."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rank: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven linears of a layer."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (self.hidden, query),
            (self.hidden, kv),
            (self.hidden, kv),
            (query, self.hidden),
            (self.hidden, self.ffn),
            (self.hidden, self.ffn),
            (self.ffn, self.hidden),
        )

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of all layers; embedding and head are not among them."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def lora_weights(self) -> int:
        return self.layers * self.rank * sum(a + b for a, b in self.linears)


@dataclass(frozen=True)
class Case:
    """One optimizer step: `prompts` prompts of P tokens with 1 + k responses of R tokens each."""

    prompt: int
    response: int
    k: int
    prompts: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def __str__(self) -> str:
        return f"{self.prompt},{self.response},{self.k}"


@dataclass(frozen=True)
class Counts:
    """T tokens, N predicted tokens, A (query, key) pairs per attention head."""

    tokens: int
    targets: int
    attention: int


def counts(case: Case, layout: Layout) -> Counts:
    """Of one optimizer step, if responses share nothing but the prompt."""
    p, r, k = case.prompt, case.response, case.k
    if layout in ("trees", "split"):
        parts = 1 if layout == "trees" else (k + 2) // 2
        # a response's queries see the whole prompt and their own triangle
        attention = parts * _triangle(p) + (k + 1) * (p * r + _triangle(r))
        one = Counts(parts * p + (k + 1) * r, (k + 1) * r, attention)
    else:
        sequences = 2 * k if layout == "pairs" else k + 1
        one = Counts(sequences * (p + r), sequences * r, sequences * _triangle(p + r))
    return Counts(*(case.prompts * value for value in asdict(one).values()))


def step_flop(
    shape: Shape,
    count: Counts,
    *,
    checkpointing: bool,
    reference: bool = True,
    rescored: bool = False,
    head_gemms: int = 2,
    head_rows: int | None = None,
) -> int:
    """FLOP of one optimizer step: policy forward and backward, and the reference's forward.

    The base is frozen, so its backward is the gradient of its inputs alone; checkpointing adds a
    second forward of the layers. Attention's backward is 2.5 times its forward. The adapter is off
    in the reference.

    Args:
        rescored: the policy is scored once more, without gradients, as for a tree in parts.
        head_gemms: products of the policy's rows with the head. Two with the unit gradient that
            `linear_logprob` keeps, three where backward computes the logits again.
        head_rows: rows whose logits are computed, if more than those that predict a target.
    """
    forwards = 2 if checkpointing else 1
    linear = 2 * shape.linear_weights * count.tokens
    lora = 2 * shape.lora_weights * count.tokens
    attention = 4 * shape.layers * shape.heads * shape.head_dim * count.attention
    head = 2 * shape.hidden * shape.vocab * (count.targets if head_rows is None else head_rows)
    total = (forwards + 1) * linear + (forwards + 2) * lora + head_gemms * head
    total += forwards * attention + 5 * attention // 2
    scorings = reference + rescored
    return total + scorings * (linear + attention + head) + rescored * lora


def token_ratio(prompt_over_response: float, k: int, layout: Layout) -> float:
    """The same by tokens alone, as a function of P/R: 2k(P+R) or (k+1)(P+R) over P+(k+1)R."""
    sequences = 2 * k if layout == "pairs" else k + 1
    return sequences * (prompt_over_response + 1) / (prompt_over_response + k + 1)


def head_flop(shape: Shape, targets: int, mode: str) -> int:
    """Needed FLOP of the log-probabilities alone: one product, or two to train (frozen head)."""
    return (2 if mode == "train" else 1) * 2 * shape.hidden * shape.vocab * targets


def head_bytes(shape: Shape, targets: int, mode: str, itemsize: int) -> int:
    """Bytes that must cross memory at least: rows, head, results, and for training their gradient.

    The head is read once per product.
    """
    products = 2 if mode == "train" else 1
    matrices = products * itemsize * (targets + shape.vocab) * shape.hidden
    return matrices + (4 if mode == "forward" else 8) * targets


def attention_flop(shape: Shape, pairs: int, mode: str) -> int:
    """Needed FLOP of attention of one layer over `pairs` (query, key) pairs per head."""
    forward = 4 * shape.heads * shape.head_dim * pairs
    return forward if mode == "forward" else 7 * forward // 2


def attention_bytes(shape: Shape, tokens: int, mode: str, itemsize: int) -> int:
    """Bytes at least: q, k, v and the result; to train also these again and four gradients."""
    row = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * itemsize * tokens
    return row if mode == "forward" else 3 * row


SMALL = Shape("llama-30m", 8, 512, 8, 4, 64, 1408, 8192, rank=16)
"""For the CPU: minutes on one core. 32.0 M weights; 56.4 M with a vocabulary of 32,000."""
MISTRAL_7B = Shape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000, rank=64)
LLAMA_3_8B = Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, rank=64)

_STEP = {
    "cpu": [(SMALL, Case(128, 128, 16)), (SMALL, Case(512, 256, 8)), (SMALL, Case(128, 64, 4, 2))],
    "cuda": [
        (MISTRAL_7B, Case(*case))
        for case in (
            (128, 128, 16), (512, 256, 1), (512, 256, 4), (512, 256, 8), (512, 256, 16),
            (1024, 512, 16), (256, 1024, 16),
        )
    ],
}  # fmt: skip
_OPERATION = {
    "cpu": [(SMALL, Case(128, 64, 1)), (SMALL, Case(128, 64, 4)), (SMALL, Case(512, 256, 8))],
    "cuda": [
        (shape, Case(*case))
        for shape in (MISTRAL_7B, LLAMA_3_8B)
        for case in ((512, 256, 1), (512, 256, 3), (512, 256, 15), (1024, 512, 16))
    ],
}


def selected(
    what: str, device: str, case: Case | None, vocab: int | None
) -> list[tuple[Shape, Case]]:
    """The cases of a benchmark; a chosen case or vocabulary replaces the usual ones.

    Without a choice the CPU's step also gets (128, 64, 4) with a vocabulary of 32,000.
    """
    usual = (_STEP if what == "step" else _OPERATION)[device]
    if what == "packing":
        usual = _STEP[device]
    if what == "attention":  # where Llama-3-8B and Mistral-7B are alike
        usual = [(shape, each) for shape, each in usual if shape != LLAMA_3_8B]
    if case is not None:
        shapes = list(dict.fromkeys(shape for shape, _ in usual))
        # as many prompts in a step as the usual case of these sizes has
        known = {str(other): other for _, other in usual}
        usual = [(shape, known.get(str(case), case)) for shape in shapes]
    elif vocab is None and what == "step" and device == "cpu":
        usual = [*usual, (with_vocab(SMALL, 32000), Case(128, 64, 4, 2))]
    if vocab is not None:
        usual = [(with_vocab(shape, vocab), chosen) for shape, chosen in usual]
    return list(dict.fromkeys(usual))


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def with_vocab(shape: Shape, vocab: int) -> Shape:
    return Shape(**{**asdict(shape), "vocab": vocab})


def as_row(shape: Shape, case: Case) -> dict[str, Any]:
    """What identifies a case in a row of results."""
    return {
        "P": case.prompt,
        "R": case.response,
        "k": case.k,
        "prompts": case.prompts,
        "model": shape.name,
        "vocab": shape.vocab,
    }
