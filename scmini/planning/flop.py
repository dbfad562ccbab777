"""Work in floating-point operations: counted as matrix products, 2mnp each; nothing else counts.

Of attention, the scores that causality allows. The same counts as bench/cases.py, which the tests
compare, so that hours can be told from the rates that benchmarks measure.
"""

from dataclasses import dataclass

from scmini.planning.shapes import Shape


@dataclass(frozen=True)
class Work:
    """Tokens computed, tokens predicted, (query, key) pairs per attention head, summed over rows.

    `rescored`: whether the rows are scored once more without gradients, as a tree in parts is.
    """

    tokens: int
    targets: int
    attention: int
    rescored: bool = False

    def times(self, number: float) -> "Work":
        """So many of these."""
        return Work(
            round(number * self.tokens),
            round(number * self.targets),
            round(number * self.attention),
            self.rescored,
        )


def tree_work(prompt: int, response: int, responses: int, limit: int | None = None) -> Work:
    """A prompt of so many tokens with responses that share nothing but the prompt.

    With a limit in tokens, a tree that is larger comes in parts, as scmini.training.batches cuts
    it: the prompt with as many responses as fit, at least one.
    """
    parts = 1
    if limit is not None and prompt + responses * response > limit:
        parts = -(-responses // max(1, (limit - prompt) // max(1, response)))
    attention = parts * _triangle(prompt) + responses * (prompt * response + _triangle(response))
    tokens = parts * prompt + responses * response
    return Work(tokens, responses * response, attention, rescored=parts > 1)


def training_flop(shape: Shape, rank: int, work: Work, *, checkpointing: bool) -> int:
    """Forward and backward of a frozen base with an adapter of this rank on all linears.

    Checkpointing computes the layers twice; attention's backward is 2.5 times its forward; the head
    takes two products, since its unit gradient is kept.
    """
    forwards = 2 if checkpointing else 1
    linear, lora, attention, head = _products(shape, rank, work)
    total = (forwards + 1) * linear + (forwards + 2) * lora + 2 * head
    total += forwards * attention + 5 * attention // 2
    return total + (linear + lora + attention + head if work.rescored else 0)


def full_training_flop(shape: Shape, work: Work) -> int:
    """Forward and backward of a model of which all weights are trained, without checkpointing.

    The head takes four products: its logits are computed again in backward.
    """
    linear, _, attention, head = _products(shape, 0, work)
    return 3 * linear + attention + 5 * attention // 2 + 4 * head


def scoring_flop(shape: Shape, rank: int, work: Work) -> int:
    """A forward pass without gradients."""
    return sum(_products(shape, rank, work))


def _products(shape: Shape, rank: int, work: Work) -> tuple[int, int, int, int]:
    """Forward FLOP of the linears, the adapter, attention, and the head."""
    return (
        2 * shape.linear_weights * work.tokens,
        2 * shape.lora_weights(rank) * work.tokens,
        4 * shape.layers * shape.query * work.attention,
        2 * shape.head_weights * work.targets,
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
