"""Texts to unit vectors, whose inner product says how alike two texts are.

`hashed-ngrams` needs no download. Anything else is the folder or the name on the Hugging Face hub
of a sentence-transformers model, or of a plain transformers model.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from scmini.models.hashed_ngrams import Flags, HashedNgramEncoder, Vectors
from scmini.models.sentence_encoder import SentenceTransformerEncoder
from scmini.sections import EmbedConfig


class Encoder(Protocol):
    """What the stage `embed` asks of an encoder."""

    dimensions: int

    def fit(self, batches: Iterable[list[str]], kept: Path | None = None) -> None:
        """Learn what there is to learn from all texts; they need not fit into memory at once.

        Args:
            kept: a file in which the result may be left, and found another time.
        """

    def encode(
        self, texts: list[str], on_share: Callable[[float], None] = ...
    ) -> tuple[Vectors, Flags]:
        """Vectors in the order of the texts, however they are batched.

        Args:
            on_share: called now and then with the share of the work that is done, 0 to 1.

        Returns:
            [texts, dimensions] float32 of length 1, zeros for a text with nothing in it; and
            [texts] bool: which of them are longer than the encoder reads at once.
        """


def build_encoder(config: EmbedConfig) -> Encoder:
    """The encoder that `embed.encoder` names.

    Raises:
        ConfigError: a key that the encoder cannot follow.
        DataError: a folder that is missing or holds no such model.
        EnvironmentProblem: a missing package, or a hub name that cannot be fetched.
    """
    if config.encoder == "hashed-ngrams":
        return HashedNgramEncoder(config.dimensions)
    return SentenceTransformerEncoder(config)
