"""Random numbers by name: the same seed and names give the same numbers, in any order of work."""

import hashlib
import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derived_seed(seed: int, *names: str) -> int:
    """A seed in [0, 2**63) for what `names` say, unrelated to that of any other names."""
    named = json.dumps([seed, *names]).encode()
    return int.from_bytes(hashlib.sha256(named).digest()[:8], "big") >> 1


def rng(seed: int, *names: str) -> random.Random:
    """A generator of the standard library for what `names` say."""
    return random.Random(derived_seed(seed, *names))


def numpy_rng(seed: int, *names: str) -> "np.random.Generator":
    """A numpy generator (PCG64) for what `names` say."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derived_seed(seed, *names)))
